"""A link between two nodes: parcels in order and whole, or the knowledge that it is broken.

NATS keeps the order between two connections but forgets what it cannot deliver. So messages are
numbered, both ends say something at least four times a second, and a number that is missing or an
end that is silent breaks the link for good. Nothing is ever sent again over it: what hangs on a
link ends with it.
"""

from __future__ import annotations

import asyncio
import struct
from collections import deque
from collections.abc import Callable

import structlog

from aither_sdk.errors import AitherError
from flux_svc.groups.jetstream.parcel import (
    PIECE_OVERHEAD,
    Parcel,
    Piece,
    pack,
    pieces,
    unpack,
)
from flux_svc.logs.jetstream.wire import Wire

BEAT_S = 0.25
SILENT_BEATS = 12
"""Beats of one's own without a word of the other: 3 s of this node's running. Whoever stood still
itself hears what waited for it before it counts further."""
_MOST_WAITING = 4096
"""Parcels that wait to be sent. Who sends is paced by answers, so that more of them means that the
socket takes nothing."""

logger = structlog.get_logger()


class Link:
    """`run` is its task. `hear` takes each parcel of the other end."""

    def __init__(
        self, wire: Wire, subject: str, session: bytes, hear: Callable[[Parcel], None]
    ) -> None:
        self.session = session
        self.broken = asyncio.Event()
        self._wire = wire
        self._subject = subject
        self._hear = hear
        self._piece_bytes = max(1024, wire.max_payload - PIECE_OVERHEAD - 1024)
        self._waiting: deque[Parcel] = deque()
        self._more = asyncio.Event()
        self._sent = 0
        self._heard = 0
        self._parts: list[bytes] = []
        self._silent_beats = 0

    def send(self, parcel: Parcel) -> None:
        """Behind what was sent before. Of no effect on a broken link."""
        if self.broken.is_set():
            return
        if len(self._waiting) >= _MOST_WAITING:
            self.cut("the other end takes nothing")
            return
        self._waiting.append(parcel)
        self._more.set()

    def take(self, piece: Piece) -> None:
        """A message of the other end."""
        if self.broken.is_set():
            return
        self._silent_beats = 0
        if piece.number != self._heard:
            self.cut(f"message {self._heard} is missing, {piece.number} came")
            return
        self._heard += 1
        self._parts.append(piece.data)
        if piece.more:
            return
        data, self._parts = b"".join(self._parts), []
        try:
            if data:
                self._hear(unpack(data))
        except (LookupError, TypeError, ValueError, struct.error) as error:
            self.cut(f"not understood, do all nodes run one version of Flux? {error!r}")

    def cut(self, why: str) -> None:
        if not self.broken.is_set():
            logger.info("groups.link_broken", to=self._subject, why=why)
        self.broken.set()
        self._more.set()

    async def run(self) -> None:
        """Sends what waits and beats, until the link is broken."""
        loop = asyncio.get_running_loop()
        beat_s = loop.time()
        try:
            while not self.broken.is_set():
                left_s = beat_s + BEAT_S - loop.time()
                if left_s <= 0:
                    beat_s = loop.time()
                    self._beat()
                await self._send_all()
                try:
                    async with asyncio.timeout(max(0.001, left_s)):
                        await self._more.wait()
                except TimeoutError:
                    pass
        except AitherError as error:
            self.cut(error.message)
        finally:
            self.cut("ended")

    def _beat(self) -> None:
        self._silent_beats += 1
        if self._silent_beats > SILENT_BEATS:
            self.cut(f"silent for {SILENT_BEATS * BEAT_S:g} s")
        elif self._wire.lost.is_set():
            self.cut("the connection is lost")
        elif not self._waiting:
            self._waiting.append(_NOTHING)

    async def _send_all(self) -> None:
        self._more.clear()
        while self._waiting and not self.broken.is_set():
            parcel = self._waiting.popleft()
            data = b"" if parcel is _NOTHING else pack(parcel)
            for message in pieces(self.session, self._sent, data, self._piece_bytes):
                await self._wire.send(self._subject, message)
                self._sent += 1


_NOTHING = Parcel({})
