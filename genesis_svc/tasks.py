"""Orders for work, and what becomes of tasks that nobody ends. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from aither.flux.v1 import event_pb2
from aither.genesis.v1 import decision_pb2, task_pb2
from genesis_svc import actions
from genesis_svc.ids import step_id
from genesis_svc.outgoing import Outgoing
from genesis_svc.values import FAILED, Task

OVERDUE_GRACE_S = 30.0
"""Beyond its timeout, a task may wait this long for a worker and for its events to come round."""


def request(
    task_id: str,
    action: decision_pb2.Action,
    *,
    agent: str,
    attempt: int,
    epoch: int,
    effort: int,
    cause: event_pb2.Event | None = None,
) -> Outgoing:
    """The order for one try of a task."""
    told = task_pb2.TaskRequested(
        task_id=task_id, action=action, agent=agent, attempt=attempt, epoch=epoch, effort=effort
    )
    told.timeout.FromNanoseconds(int(actions.timeout_s(effort) * 1e9))
    return Outgoing(
        f"genesis.task.{action.kind}.requested",
        told,
        id=step_id(task_id, attempt, "requested"),
        cause=cause,
        awaited=True,
        agent=agent,
    )


def reconcile(
    tasks: Iterable[Task], epoch: int, now_ns: int, *, stream_up_s: float
) -> list[Outgoing]:
    """What must be said so that every open task comes to its end.

    A try that failed, or that an older Genesis asked for and did not see ended, is asked for again
    until the tries its effort is worth are used up; then the task is dead. A try that nobody ends
    is declared failed, but not before the stream was up for a while (`stream_up_s`): its end may
    stand in the log, unread.
    """
    told = (_next_step(task, epoch, now_ns, stream_up_s) for task in tasks)
    return [outgoing for outgoing in told if outgoing is not None]


def _next_step(task: Task, epoch: int, now_ns: int, stream_up_s: float) -> Outgoing | None:
    waited_s = (now_ns - task.changed_ns) / 1e9
    if task.state == FAILED:
        if not task.retryable:
            return _dead(task, task.error)
        return _again(task, epoch, task.error) if waited_s >= backoff_s(task.attempt) else None
    if task.epoch < epoch:
        return _again(task, epoch, "Genesis ended before the task did")
    if waited_s > task.timeout_s + OVERDUE_GRACE_S and stream_up_s >= OVERDUE_GRACE_S:
        return _overdue(task, waited_s)
    return None


def backoff_s(attempt: int) -> float:
    """Seconds between a failed try and the next one."""
    return min(60.0, 2.0 ** (attempt - 1))


def _again(task: Task, epoch: int, error: str) -> Outgoing:
    if task.action is None:
        return _dead(task, f"{error}; its input is too large to be asked for again")
    if task.attempt >= actions.attempts(task.effort):
        return _dead(task, error)
    return request(
        task.id,
        task.action,
        agent=task.agent,
        attempt=task.attempt + 1,
        epoch=epoch,
        effort=task.effort,
    )


def _overdue(task: Task, waited_s: float) -> Outgoing:
    told = task_pb2.TaskFailed(
        task_id=task.id,
        attempt=task.attempt,
        error=f"no worker ended it within {waited_s:.0f} s",
        will_retry=task.attempt < actions.attempts(task.effort),
    )
    return Outgoing(
        f"genesis.task.{task.kind}.failed",
        told,
        id=step_id(task.id, task.attempt, "overdue"),
        awaited=True,
    )


def _dead(task: Task, error: str) -> Outgoing:
    told = task_pb2.TaskDead(task_id=task.id, attempts=task.attempt, error=error)
    return Outgoing(
        f"genesis.task.{task.kind}.dead", told, id=step_id(task.id, 0, "dead"), awaited=True
    )
