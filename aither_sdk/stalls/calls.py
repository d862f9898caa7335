"""The unary calls that are being answered, and whose code the loop runs at this moment."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Coroutine, Generator
from typing import Any, TypeVar

from aither_sdk.beat import Heart, pack_span
from aither_sdk.stalls.record import MAX_CALLS, Call, SpanRef

T = TypeVar("T")


class CallsInFlight:
    """Owned by the loop, read by the watchdog."""

    def __init__(self, heart: Heart) -> None:
        self._heart = heart
        self._calls: dict[int, tuple[str, SpanRef | None, int]] = {}
        self._next = 0

    def begin(self, method: str, span: SpanRef | None) -> int:
        """A key for `end`."""
        self._next += 1
        self._calls[self._next] = (method, span, time.monotonic_ns())
        return self._next

    def end(self, key: int) -> int:
        """For how many nanoseconds of the call the loop stood still."""
        _, _, begin_ns = self._calls.pop(key)
        return self._heart.stalled_ns(begin_ns, time.monotonic_ns())

    def running(self) -> tuple[Call, ...]:
        """Longest first. Safe in any thread."""
        now_ns = time.monotonic_ns()
        calls = list(self._calls.values())[:MAX_CALLS]  # oldest first, and one step to copy
        return tuple(Call(method, span, now_ns - begin_ns) for method, span, begin_ns in calls)

    def traced(self, span: SpanRef | None, work: Coroutine[Any, Any, T]) -> Awaitable[T]:
        """`work`, and while the loop runs it the beat cell names its span: so the witness knows
        the interrupted trace while something holds the GIL. 0.6 us a step."""
        if span is None or not span.sampled:
            return work
        return _Traced(self._heart, pack_span(span.trace_id, span.span_id), work)


class _Traced(Awaitable[T]):
    def __init__(self, heart: Heart, packed: bytes, work: Coroutine[Any, Any, T]) -> None:
        self._cell = heart.cell
        self._packed = packed
        self._work = work

    def __await__(self) -> Generator[Any, Any, T]:
        work, cell, packed = self._work, self._cell, self._packed
        step, value = work.send, None
        try:
            while True:
                cell.enter_span(packed)
                try:
                    awaited = step(value)
                except StopIteration as done:
                    result: T = done.value
                    return result
                finally:
                    cell.leave_span()
                try:
                    step, value = work.send, (yield awaited)
                except GeneratorExit:
                    work.close()
                    raise
                except BaseException as error:
                    step, value = work.throw, error
        finally:
            work.close()
