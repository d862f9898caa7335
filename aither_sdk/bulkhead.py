"""So many at once, so few waiting, and not for long: a slow dependency holds up only so much."""

from __future__ import annotations

import asyncio
from collections import deque
from types import TracebackType

from aither_sdk.errors import ResourceExhausted


class Bulkhead:
    """`async with bulkhead:` holds one of `limit` places; `waiting` more may queue for one, first
    come first served, and nobody queues longer than `wait_s`. Owned by one loop.

    Entering raises ResourceExhausted BULKHEAD_FULL, and counts it, when there is no room to wait or
    the wait was in vain. Safe to cancel: a place that was given to a cancelled waiter goes to the
    next one.
    """

    def __init__(self, name: str, *, limit: int, waiting: int = 0, wait_s: float = 1.0) -> None:
        if limit < 1 or waiting < 0:
            raise ValueError(f"{name}: limit {limit}, waiting {waiting}; use 1 and 0 at least")
        self.name = name
        self.limit = limit
        self.waiting = waiting
        self.refused = 0
        self._wait_s = wait_s
        self._taken = 0
        self._queue: deque[asyncio.Future[None]] = deque()

    @property
    def taken(self) -> int:
        """Places in use."""
        return self._taken

    @property
    def queued(self) -> int:
        """Waiting for a place."""
        return len(self._queue)

    async def __aenter__(self) -> None:
        if self._taken < self.limit and not self._queue:
            self._taken += 1
            return
        if len(self._queue) >= self.waiting:
            raise self._full("no more may wait")
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append(place)
        try:
            async with asyncio.timeout(self._wait_s):
                await place
        except BaseException as error:
            if place.done() and not place.cancelled():
                self._leave()  # it was given in the moment in which the waiter went away
            elif place in self._queue:
                self._queue.remove(place)
            if isinstance(error, TimeoutError):
                raise self._full(f"waiting {self._wait_s:g} s was in vain") from None
            raise

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._leave()

    def _leave(self) -> None:
        while self._queue:
            place = self._queue.popleft()
            if not place.done():
                place.set_result(None)  # the place changes hands
                return
        self._taken -= 1

    def _full(self, why: str) -> ResourceExhausted:
        self.refused += 1
        return ResourceExhausted(
            f"{self.limit} calls of {self.name} are under way and {why}; ask more rarely, or "
            "repeat in a moment",
            reason="BULKHEAD_FULL",
            metadata={"dependency": self.name, "limit": str(self.limit)},
            retry_after_s=self._wait_s,
        )
