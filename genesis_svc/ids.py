"""Identifiers that follow from their cause, so that the same cause never makes two of a thing.

All are UUID version 5 (RFC 9562): a restarted Genesis that comes to the same conclusion publishes
the same event again, and Flux stores it once.
"""

from __future__ import annotations

from uuid import UUID, uuid5

_NAMESPACE = UUID("6b0a3d6e-8d0c-5b57-9b1e-6f0f6c3f2a11")


def decision_id(epoch: int, tick: int, agent: str) -> str:
    """Of what an agent decided in a tick."""
    return _id("decision", epoch, tick, agent)


def routine_decision_id(routine: str, due_ns: int) -> str:
    """Of one due run of a routine, the same in every epoch: it runs once, whoever notices."""
    return _id("routine", routine, due_ns)


def task_id(cause: str) -> str:
    """Of the task that a decision (its id) or a command ("source/id") became."""
    return _id("task", cause)


def step_id(task: str, attempt: int, state: str) -> str:
    """Of the event that tells a task's state; one for each try."""
    return _id("step", task, attempt, state)


def effect_id(task: str) -> str:
    """Of the event that a publish task publishes, the same in every try: it happens once."""
    return _id("effect", task)


def answer_id(command: str) -> str:
    """Of the answer to a command ("source/id")."""
    return _id("answer", command)


def fraction(*parts: object) -> float:
    """A number in [0, 1) that follows from the parts: chance that can be repeated."""
    return UUID(_id("fraction", *parts)).int / 2**128


def _id(*parts: object) -> str:
    return str(uuid5(_NAMESPACE, "\x1f".join(map(str, parts))))
