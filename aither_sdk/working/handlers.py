"""The handlers of a worker: a bounded number of tasks, each with one event, judged at its end."""

from __future__ import annotations

import asyncio
import contextvars
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextvars import ContextVar
from functools import partial

from opentelemetry import context as otel_context
from opentelemetry.trace import StatusCode

from aither.flux.v1.event_pb2 import Event
from aither.flux.v1.flux_service_pb2 import Delivery
from aither_sdk.events import handling
from aither_sdk.messaging_spans import destination_template, process_span
from aither_sdk.words import Words
from aither_sdk.working.leases import Lease
from aither_sdk.working.verdicts import ACK, Park, Retry, Verdict, judge

_log = Words("aither_sdk")

Handler = Callable[[Event], Awaitable[object]]
Handling = asyncio.Task[Verdict]
Ended = Callable[[Lease, Verdict | None], None]
"""Told once of each lease whose handler began; None: it was cancelled and there is no verdict."""

_delivery: ContextVar[Delivery | None] = ContextVar("aither_delivery", default=None)


def current_delivery() -> Delivery | None:
    """The delivery that this task is handling, with its attempt; None outside of a handler."""
    return _delivery.get()


class Handlers:
    """Runs `concurrency` handlers; further leases wait in order, as many as the worker's window."""

    def __init__(
        self,
        consumer: str,
        handler: Handler | None,
        concurrency: int,
        park_on: tuple[type[Exception], ...],
        max_handling_s: float | None,
        may_begin: Callable[[Lease], bool],
        ended: Ended,
    ) -> None:
        """`may_begin` is asked right before a handler runs; what it says no to is `lost`."""
        self.filters: Sequence[str] = ()
        """The group's; one of them names the spans."""
        self.closing = False
        """While set nothing begins, and a cancelled handler has no verdict."""
        self._consumer = consumer
        self._handler = handler
        self._concurrency = concurrency
        self._park_on = park_on
        self._max_handling_s = max_handling_s
        self._may_begin = may_begin
        self._ended = ended
        self._waiting: deque[Lease] = deque()
        self._tasks: dict[Lease, Handling] = {}
        self._context: contextvars.Context | None = None

    def open(self) -> None:
        """Handlers see what their opener sees, except for the span he is in."""
        self._context = contextvars.copy_context()
        self._context.run(otel_context.attach, otel_context.Context())

    @property
    def tasks(self) -> set[Handling]:
        return set(self._tasks.values())

    @property
    def running(self) -> int:
        return len(self._tasks)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def in_hand(self) -> list[Lease]:
        """Those that take up room, lost ones whose handlers have not ended among them."""
        return [*self._tasks, *self._waiting]

    def add(self, lease: Lease, now_s: float) -> None:
        """Begins with it as soon as there is a free place."""
        self._waiting.append(lease)
        self.begin(now_s)

    def begin(self, now_s: float) -> None:
        """Fills the free places."""
        assert self._context is not None
        while self._waiting and self.running < self._concurrency and not self.closing:
            lease = self._waiting.popleft()
            lease.begun_s = now_s
            task = asyncio.get_running_loop().create_task(
                self._handle(lease, self._still_ending(lease)),
                name=f"worker {self._consumer} #{lease.sequence}",
                context=self._context.copy(),
            )
            self._tasks[lease] = task
            # Not in the task: one that is cancelled before its first step never runs.
            task.add_done_callback(partial(self._has_ended, lease))

    def drop_waiting(self) -> list[Lease]:
        """Those that have not begun, and now never will."""
        dropped = list(self._waiting)
        self._waiting.clear()
        return dropped

    def end(self, lease: Lease) -> bool:
        """Cancels the handler of what is not ours any more. True where none had begun."""
        task = self._tasks.get(lease)
        if task is not None:
            task.cancel(f"the lease of event {lease.sequence} is lost: {lease.lost}")
        elif lease in self._waiting:
            self._waiting.remove(lease)
            return True
        return False

    def end_overdue(self, now_s: float) -> None:
        """Cancels those that have run for longer than they may."""
        if self._max_handling_s is None:
            return
        for lease, task in self._tasks.items():
            if now_s - (lease.begun_s or now_s) > self._max_handling_s and not lease.overdue:
                lease.overdue = True
                task.cancel(f"longer than {self._max_handling_s:g} s")

    def cancel(self) -> None:
        for task in self._tasks.values():
            task.cancel("the worker drains")

    # -- one of them

    def _still_ending(self, lease: Lease) -> Handling | None:
        """The handler of the same event that was cancelled and has not ended."""
        same = (task for other, task in self._tasks.items() if other.key == lease.key)
        return next(same, None)

    async def _handle(self, lease: Lease, before: Handling | None) -> Verdict:
        if before is not None:
            await asyncio.wait({before})  # never two handlers of one event in one worker
        if not self._may_begin(lease):
            raise asyncio.CancelledError
        return await self._judged(lease)

    def _has_ended(self, lease: Lease, task: Handling) -> None:
        del self._tasks[lease]
        verdict: Verdict | None = None
        if not task.cancelled():
            # What is no Exception is no verdict of `_judged`, and must cost no lease for ever.
            error = task.exception()
            verdict = task.result() if error is None else self._torn_out(lease, error)
        elif lease.overdue:
            told = f"its handler took longer than {self._max_handling_s:g} s"
            verdict = Verdict("retry", reason=told)
        elif not lease.lost and not self.closing:
            verdict = Verdict("retry", reason="its handler was cancelled")
        self._ended(lease, verdict)

    def _torn_out(self, lease: Lease, error: BaseException) -> Verdict:
        """The verdict on one that raised what is no Exception. A KeyboardInterrupt or SystemExit
        ends the loop by itself; anything else ends nothing but this attempt."""
        _log.error(
            "worker.handler_failed",
            consumer=self._consumer,
            subject=lease.delivery.event.subject,
            sequence=lease.sequence,
            attempt=lease.attempt,
            error=f"{type(error).__name__}: {error}",
            exc_info=error,
        )
        return judge(error)

    async def _judged(self, lease: Lease) -> Verdict:
        assert self._handler is not None
        event = lease.delivery.event
        _delivery.set(lease.delivery)
        template = destination_template(event.subject, self.filters)
        with process_span(event, template, self._consumer) as span, handling(event):
            try:
                await self._handler(event)
            except Exception as error:
                span.record_exception(error)
                span.set_attribute("error.type", type(error).__qualname__)
                if not isinstance(error, Retry | Park):
                    span.set_status(StatusCode.ERROR)
                    _log.warning(
                        "worker.handler_failed",
                        consumer=self._consumer,
                        subject=event.subject,
                        sequence=event.sequence,
                        attempt=lease.attempt,
                        error=f"{type(error).__name__}: {error}",
                        # Where it was: once an event, for its attempts fail alike.
                        exc_info=error if lease.attempt == 1 else None,
                    )
                return judge(error, self._park_on)
        return ACK
