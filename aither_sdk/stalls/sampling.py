"""The loop's stack, its task and its trace context, taken from another thread.

Only what is safe beside a running loop on Python 3.11 to 3.14: `sys._current_frames`, the frame of
`asyncio.events.Handle._run` (of the standard library's loop; on another one tasks are known, bare
callbacks have no name and no span), and copies of sets that the interpreter makes in one step.
"""

from __future__ import annotations

import asyncio
import sys
from asyncio import base_events, events
from collections import Counter, deque
from collections.abc import Iterator
from contextvars import Context
from dataclasses import dataclass, replace
from types import CodeType, FrameType
from typing import Any

from opentelemetry import trace

from aither_sdk.stalls.stacks import Frame, Stack, spell

_RUN: CodeType = events.Handle._run.__code__
_RUN_ONCE: CodeType = getattr(base_events.BaseEventLoop, "_run_once").__code__  # noqa: B009
_RUNNERS = ("asyncio", "uvloop")
"""Whoever is found in these and in no callback waits for events."""
_INNER_FRAMES, _OUTER_FRAMES = 69, 30
"""Of a deep recursion; between them one line tells how many are left out."""
_DEEPEST_FRAMES = 20_000
"""So far down the callback is looked for that runs."""
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
    """What the callback runs; where none does, what runs in a turn of the loop: its own code, or
    what came into it, as a signal's handler does. Who runs the loop is not in it."""

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
    stack = _Stack()
    for at in _from_inside(frame):
        code = at.f_code
        if handle is None or stack.has_room:  # what lies below a callback is the same in each
            stack.add(at)
        if code is _RUN and handle is None:
            handle = at.f_locals.get("self")
            held = getattr(handle, "_context", None)
            context = held.copy() if isinstance(held, Context) else None
            within = stack.whole()
        if code is _RUN_ONCE and handle is None and not within:
            within = stack.whole()
    if handle is None and is_foreign(loop):
        handle, context = _foreign(loop, frame)
    task_name, coroutine = _task(loop, handle)
    if len(within) == 1 and handle is not None:
        within = (replace(within[0], function=coroutine),)  # it is in C and has no frame
    return Seen(stack.whole(), handle, task_name, coroutine, context, within)


def _from_inside(frame: FrameType) -> Iterator[FrameType]:
    at: FrameType | None = frame
    for _ in range(_DEEPEST_FRAMES):
        if at is None:
            return
        yield at
        at = at.f_back


class _Stack:
    """Takes frames from the innermost on; keeps those at both ends."""

    def __init__(self) -> None:
        self._inner: list[Frame] = []
        self._outer: deque[FrameType] = deque(maxlen=_OUTER_FRAMES)
        self._beyond = 0

    @property
    def has_room(self) -> bool:
        return len(self._inner) < _INNER_FRAMES

    def add(self, at: FrameType) -> None:
        if self.has_room:
            self._inner.append(_frame(at))
        else:
            self._outer.append(at)
            self._beyond += 1

    def whole(self) -> Stack:
        left_out = self._beyond - len(self._outer)
        note = (Frame(f"({left_out} frames left out)", "", 0),) if left_out else ()
        outer = tuple(_frame(at) for at in reversed(self._outer))
        return (*outer, *note, *reversed(self._inner))


def _frame(at: FrameType) -> Frame:
    code = at.f_code
    name = f"{at.f_globals.get('__name__', '')}.{code.co_qualname}"
    return Frame(spell(name), spell(code.co_filename), at.f_lineno or 0)


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
        stack = _Stack()
        for at in _from_inside(frame):
            stack.add(at)
        stacks.append(stack.whole())
    return sorted(stacks, key=len, reverse=True)[:limit]


def running_tasks(loop: asyncio.AbstractEventLoop) -> list[tuple[str, int]]:
    """The loop's tasks by coroutine, most frequent first. Empty where that is not safe to ask. A
    hundred thousand are not all looked at while the loop may want the GIL: the rest is a number."""
    tasks, more = _all_tasks(loop)
    counted = Counter(
        _coroutine(task) for task in tasks if not task.done() and task.get_loop() is loop
    ).most_common(_NAMED_COROUTINES)
    return [*counted, ("(not looked at)", more)] if more else counted


def _all_tasks(loop: asyncio.AbstractEventLoop) -> tuple[list[asyncio.Task[Any]], int]:
    """Some, and how many more there are."""
    if sys.version_info >= (3, 14):
        found = list(asyncio.all_tasks(loop))  # made for other threads from this version on
        return found[:_MAX_TASKS], len(found[_MAX_TASKS:])
    tasks: Any = asyncio.tasks
    known = getattr(tasks, "_scheduled_tasks", None) or getattr(tasks, "_all_tasks", None)
    try:
        # One step of the interpreter each: `list` of a set of references runs no Python code.
        references = list(known.data) if known is not None else []
        eager = list(getattr(tasks, "_eager_tasks", ()))
    except (AttributeError, RuntimeError):
        return [], 0
    looked_at = [task for reference in references[:_MAX_TASKS] if (task := reference()) is not None]
    return looked_at + eager[:_MAX_TASKS], len(references[_MAX_TASKS:]) + len(eager[_MAX_TASKS:])


def _task(loop: asyncio.AbstractEventLoop, handle: Any) -> tuple[str, str]:
    if handle is None:
        return "", ""
    task = _current_task(loop)
    if task is not None:
        return spell(task.get_name()), _coroutine(task)
    callback = getattr(handle, "_callback", handle)
    name = getattr(callback, "__qualname__", None) or type(callback).__qualname__
    module = getattr(callback, "__module__", None)
    return "", spell(f"{module}.{name}" if module else name)


def _current_task(loop: asyncio.AbstractEventLoop) -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task(loop)
    except RuntimeError:
        return None


def _coroutine(task: asyncio.Task[Any]) -> str:
    coroutine = task.get_coro()
    return spell(str(getattr(coroutine, "__qualname__", None) or type(coroutine).__qualname__))
