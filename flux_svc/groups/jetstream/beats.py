"""How the nodes know who keeps the groups, and the keeper that it still does.

The keeper beats; NATS carries each beat to all nodes, to the keeper itself, too. A node that heard
none for `SILENT_BEATS` beats of its own running takes the keeper's place. The keeper trusts itself
for less: for `VALID_S` since it *sent* a beat that came back. So it has ended before anybody takes
its place, however late it notices that it stood still.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque

from flux_svc.groups.jetstream.place import Fence
from flux_svc.logs.jetstream.wire import Wire

BEAT_S = 0.25
SILENT_BEATS = 16
"""4 s. A beat of one's own takes `BEAT_S` at least, and only one is counted for a time in which the
node stood still."""
VALID_S = 3.0
_UNHEARD_BEATS = 64


class Beats:
    """What is heard on one connection."""

    def __init__(self, wire: Wire, subject: str, node: str) -> None:
        self._wire = wire
        self._subject = subject
        self._node = node
        self._silent_beats = 0
        self._changed = asyncio.Event()
        self._sent: deque[tuple[int, float]] = deque(maxlen=_UNHEARD_BEATS)
        self._number = 0
        self._trusted_until_s = float("-inf")
        self.newest = Fence(0, "")
        """Of the newest term that was heard of."""

    @property
    def silent(self) -> bool:
        return self._silent_beats >= SILENT_BEATS

    @property
    def valid(self) -> bool:
        """Whether this node, as the keeper, may still act."""
        return asyncio.get_running_loop().time() < self._trusted_until_s

    def hear(self, body: bytes) -> None:
        fence, node, number = json.loads(body)
        if fence < self.newest.sequence:
            return
        if fence > self.newest.sequence or node != self.newest.node:
            self.newest = Fence(fence, node)
            self._changed.set()
        self._silent_beats = 0
        if node == self._node:
            # A trust that has run out is never renewed: another node may have the place since.
            valid = self.valid
            while self._sent and self._sent[0][0] <= number:
                sent_s = self._sent.popleft()[1]
                if valid:
                    self._trusted_until_s = sent_s + VALID_S

    def begin(self, fence: Fence) -> None:
        """A term was found, or begins: its silence is counted from here."""
        self.newest = fence
        self._silent_beats = 0

    def trust(self, begun_s: float) -> None:
        """The fence was set by a question that was asked then."""
        self._trusted_until_s = begun_s + VALID_S

    async def send(self, fence: Fence) -> None:
        """Raises Unavailable."""
        self._number += 1
        self._sent.append((self._number, asyncio.get_running_loop().time()))
        body = json.dumps([fence.sequence, fence.node, self._number]).encode()
        await self._wire.send(self._subject, body)

    async def rest(self, *events: asyncio.Event) -> None:
        """Waits for the next beat of one's own, for another term, or for one of the events."""
        if not await first_of(BEAT_S, self._changed, *events):
            self._silent_beats += 1
        self._changed.clear()


async def first_of(limit_s: float, *events: asyncio.Event) -> bool:
    """Whether one of them was set within a time."""
    waits = [asyncio.ensure_future(one.wait()) for one in events]
    try:
        await asyncio.wait(waits, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        return any(one.is_set() for one in events)
    finally:
        for one in waits:
            one.cancel()
