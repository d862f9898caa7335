"""What waits for the writer of a log: counted, bounded, and let in by turns."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from aither_sdk.errors import AitherError
from flux_svc.logs.faults import write_queue_full


class Waiting(Protocol):
    """A batch on its way to the writer."""

    @property
    def events(self) -> int: ...

    @property
    def bytes(self) -> int: ...

    @property
    def abandoned(self) -> bool:
        """Nobody waits for its answer any more."""
        ...

    def refuse(self, error: AitherError) -> None: ...


W = TypeVar("W", bound=Waiting)


class WriteQueue(Generic[W]):
    """Lets batches through to `put` while there is room; owned by the loop.

    Those that may wait are let in strictly in the order they came, in the very call that made room,
    so that a later batch of the same stream never overtakes. Those that may not wait take what room
    there is between.
    """

    def __init__(self, put: Callable[[W], None], *, max_events: int, max_bytes: int) -> None:
        self._put = put
        self._max_events = max_events
        self._max_bytes = max_bytes
        self._events = 0
        self._bytes = 0
        """What is with the writer."""
        self._waiting: deque[W] = deque()
        """Bounded by those who wait: a stream stops reading after a few batches."""

    def add(self, job: W, *, wait: bool) -> None:
        """Raises ResourceExhausted WRITE_QUEUE_FULL when there is no room and `wait` is unset."""
        if wait and (self._waiting or not self._fits(job)):
            self._waiting.append(job)
        elif self._fits(job):
            self._let_in(job)
        else:
            raise write_queue_full(self._events, self._bytes)

    def done(self, job: W) -> None:
        """The writer has answered: its room goes to those who wait."""
        self._events -= job.events
        self._bytes -= job.bytes
        while self._waiting:
            following = self._waiting[0]
            if following.abandoned:
                self._waiting.popleft()
            elif self._fits(following):
                self._let_in(self._waiting.popleft())
            else:
                break

    def refuse_waiting(self, error: AitherError) -> None:
        """Sends away all that were not let in."""
        while self._waiting:
            self._waiting.popleft().refuse(error)

    def _fits(self, job: W) -> bool:
        # A batch larger than the whole bound may pass alone: refusing it could never end.
        return not self._events or (
            self._events + job.events <= self._max_events
            and self._bytes + job.bytes <= self._max_bytes
        )

    def _let_in(self, job: W) -> None:
        self._events += job.events
        self._bytes += job.bytes
        self._put(job)
