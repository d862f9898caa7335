"""What has arrived from publishers and is not answered yet: counted over all of them, and bounded.

The log's queue bounds what waits for the disk. This bounds what stands before it: batches that
publish streams have read ahead, those that wait for their quota, and calls of Publish that wait for
their answer. However slow the disk and however many the publishers, their memory here is at most
MAX_BYTES, MAX_HELD_BYTES, MAX_CALLS, and one batch for each stream that was just reading when the
bound was met.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from aither_sdk.errors import ResourceExhausted

MAX_BYTES = 64 * 2**20
"""Of memory for batches of publish streams, half of it events. Streams read on when half of them
are answered. At 60 k events/s of 200 bytes it is 3 s of work."""
MAX_HELD_BYTES = 64 * 2**20
"""Of batches that wait for their quota. They are counted apart, so that who is slowed does not slow
the others; with more of them the next that would have to wait is refused and comes again."""
MAX_CALLS = 4096
"""Of Publish at once; about 25 KB of gRPC's memory each."""
_EVENT_BYTES = 256
"""What a decoded event takes beside its encoded size."""


def weight(events: int, size: int) -> int:
    """Bytes of memory that a batch of this encoded size takes, nearly: decoded, and encoded again
    for the log."""
    return 2 * size + events * _EVENT_BYTES


class Intake:
    """Owned by the loop."""

    def __init__(
        self,
        *,
        max_bytes: int = MAX_BYTES,
        max_held_bytes: int = MAX_HELD_BYTES,
        max_calls: int = MAX_CALLS,
    ) -> None:
        self._max_bytes = max_bytes
        self._max_held_bytes = max_held_bytes
        self._max_calls = max_calls
        self._bytes = 0
        self._held_bytes = 0
        self._calls = 0
        self._room = asyncio.Event()
        self._room.set()

    @property
    def bytes(self) -> int:
        """Of batches of streams."""
        return self._bytes

    @property
    def calls(self) -> int:
        """Of Publish."""
        return self._calls

    async def until_room(self) -> None:
        """Before a stream reads its next batch: flow control holds back what is not read.

        Once the bound was met everybody waits until half of it is free, so no stream keeps the room
        to itself.
        """
        await self._room.wait()

    def take(self, batch_bytes: int) -> None:
        """A stream has read a batch."""
        self._bytes += batch_bytes
        if self._bytes >= self._max_bytes:
            self._room.clear()

    def done(self, batch_bytes: int) -> None:
        """It is answered, or nobody waits for the answer."""
        self._bytes -= batch_bytes
        if self._bytes <= self._max_bytes // 2:
            self._room.set()

    @contextmanager
    def held(self, batch_bytes: int, wait_s: float) -> Iterator[None]:
        """While a batch that was read waits for its quota. Raises ResourceExhausted when too many
        do already."""
        if self._held_bytes and self._held_bytes + batch_bytes > self._max_held_bytes:
            raise ResourceExhausted(
                f"{self._held_bytes} bytes of batches wait for their quotas already; wait, then "
                "repeat with the same ids, open fewer streams, or raise flux.quotas",
                reason="QUOTA_EXCEEDED",
                metadata={"held_bytes": str(self._held_bytes)},
                retry_after_s=wait_s,
            )
        self._held_bytes += batch_bytes
        try:
            yield
        finally:
            self._held_bytes -= batch_bytes

    def enter(self) -> None:
        """A call of Publish. Raises ResourceExhausted when too many wait already."""
        if self._calls >= self._max_calls:
            raise ResourceExhausted(
                f"{self._calls} calls of Publish wait for the disk already; wait, then repeat with "
                "the same ids, or use PublishStream, which batches",
                reason="WRITE_QUEUE_FULL",
                metadata={"calls": str(self._calls)},
                retry_after_s=0.1,
            )
        self._calls += 1

    def leave(self) -> None:
        """It is answered, refused or cancelled."""
        self._calls -= 1
