"""The loop's stack, its task and its trace context, taken from another thread.

Only what is safe beside a running loop on Python 3.11 to 3.14: `sys._current_frames`, the frame of
`asyncio.events.Handle._run` (of the standard library's loop; on another one tasks are known, bare
callbacks have no name and no span), and copies of sets that the interpreter makes in one step.
"""

from __future__ import annotations

import asyncio
import sys
from asyncio import base_events, events
from collections import Counter
from contextvars import Context
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

from opentelemetry import trace

from aither_sdk.stalls.stacks import Frame, Stack

_RUN: CodeType = events.Handle._run.__code__
_RUN_ONCE: CodeType = getattr(base_events.BaseEventLoop, "_run_once").__code__  # noqa: B009
_RUNNERS = ("asyncio", "uvloop")
"""Whoever is found in these and in no callback waits for events."""
_MAX_FRAMES = 200
_MAX_TASKS = 5_000
_NAMED_COROUTINES = 10


@dataclass(frozen=True, slots=True)
class Seen:
    """The loop's thread at one moment."""

    stack: Stack
    handle: Any
    """The callback that runs, by identity; None: none does."""
    task_name: str = ""
    coroutine: str = ""
    """Of the task, or the callback's name."""
    context: Context | None = None
    """A copy of what the callback runs in."""
    within: Stack = ()
    """Where no callback runs: what runs in a turn of the loop. Its own code, or what came into it,
    as a signal's handler does."""

    @property
    def span(self) -> trace.SpanContext | None:
        """The span that was open there."""
        if self.context is None:
            return None
        found = self.context.run(trace.get_current_span).get_span_context()
        return found if found.is_valid else None


def is_foreign(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether the loop is not the standard library's and runs callbacks in a way of its own."""
    return not isinstance(loop, asyncio.BaseEventLoop)


def look(loop: asyncio.AbstractEventLoop, ident: int) -> Seen | None:
    """Looks at the thread `ident` in which `loop` runs. None: it has ended. About 50 us."""
    frame = sys._current_frames().get(ident)
    if frame is None:
        return None
    handle = context = None
    within: Stack = ()
    stack: list[Frame] = []
    at: FrameType | None = frame
    while at is not None and len(stack) < _MAX_FRAMES:
        code = at.f_code
        module = at.f_globals.get("__name__", "")
        stack.append(Frame(f"{module}.{code.co_qualname}", code.co_filename, at.f_lineno or 0))
        if code is _RUN and handle is None:
            handle = at.f_locals.get("self")
            held = getattr(handle, "_context", None)
            context = held.copy() if isinstance(held, Context) else None
        if code is _RUN_ONCE and handle is None and not within:
            within = tuple(reversed(stack))
        at = at.f_back
    if handle is None and is_foreign(loop):
        handle, context = _foreign(loop, frame)
    task_name, coroutine = _task(loop, handle)
    return Seen(tuple(reversed(stack)), handle, task_name, coroutine, context, within)


def _foreign(loop: asyncio.AbstractEventLoop, frame: FrameType) -> tuple[Any, Context | None]:
    """What runs in another loop, such as uvloop, whose callbacks have no frame: the task; its
    context where Python tells it (3.12 on)."""
    task = _current_task(loop)
    if task is not None:
        get_context: Any = getattr(task, "get_context", None)
        return task, get_context().copy() if get_context is not None else None
    module = str(frame.f_globals.get("__name__", "")).partition(".")[0]
    return (None if module in _RUNNERS else frame.f_code), None


def other_stacks(but: frozenset[int], limit: int = 4) -> list[Stack]:
    """Stacks of the other Python threads, those with most frames first; for who holds the GIL."""
    stacks: list[Stack] = []
    for ident, frame in sys._current_frames().items():
        if ident in but:
            continue
        stack: list[Frame] = []
        at: FrameType | None = frame
        while at is not None and len(stack) < _MAX_FRAMES:
            code = at.f_code
            name = f"{at.f_globals.get('__name__', '')}.{code.co_qualname}"
            stack.append(Frame(name, code.co_filename, at.f_lineno or 0))
            at = at.f_back
        stacks.append(tuple(reversed(stack)))
    return sorted(stacks, key=len, reverse=True)[:limit]


def running_tasks(loop: asyncio.AbstractEventLoop) -> list[tuple[str, int]]:
    """The loop's tasks by coroutine, most frequent first. Empty where that is not safe to ask."""
    counted = Counter(
        _coroutine(task)
        for task in _all_tasks(loop)[:_MAX_TASKS]
        if not task.done() and task.get_loop() is loop
    )
    return counted.most_common(_NAMED_COROUTINES)


def _all_tasks(loop: asyncio.AbstractEventLoop) -> list[asyncio.Task[Any]]:
    if sys.version_info >= (3, 14):
        return list(asyncio.all_tasks(loop))  # made for other threads from this version on
    tasks: Any = asyncio.tasks
    known = getattr(tasks, "_scheduled_tasks", None) or getattr(tasks, "_all_tasks", None)
    try:
        # One step of the interpreter each: `list` of a set of references runs no Python code.
        references = list(known.data) if known is not None else []
        eager = list(getattr(tasks, "_eager_tasks", ()))
    except (AttributeError, RuntimeError):
        return []
    return [task for reference in references if (task := reference()) is not None] + eager


def _task(loop: asyncio.AbstractEventLoop, handle: Any) -> tuple[str, str]:
    if handle is None:
        return "", ""
    task = _current_task(loop)
    if task is not None:
        return task.get_name(), _coroutine(task)
    callback = getattr(handle, "_callback", handle)
    name = getattr(callback, "__qualname__", None) or type(callback).__qualname__
    return "", f"{getattr(callback, '__module__', '') or ''}.{name}"


def _current_task(loop: asyncio.AbstractEventLoop) -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task(loop)
    except RuntimeError:
        return None


def _coroutine(task: asyncio.Task[Any]) -> str:
    coroutine = task.get_coro()
    return str(getattr(coroutine, "__qualname__", None) or type(coroutine).__qualname__)
