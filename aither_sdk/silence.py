"""A stream on which nothing comes any more is left: its connection may be half open, and nobody
would ever say so."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from aither_sdk.errors import Unavailable

SILENT = "SILENT"
"""Reason of the error: the connection is to be given up with the stream."""
MISSED_HEARTBEATS = 2
SLACK_S = 1.0
"""What a heartbeat may be late, on its way and at both ends."""
MOST_PATIENCE = 8
_LOOKS = 4

AnyCall = grpc.aio.UnaryStreamCall[Any, Any] | grpc.aio.StreamStreamCall[Any, Any]


def silence_s(heartbeat_s: float) -> float:
    """How long nothing may come from a server that promised a message every so often."""
    return MISSED_HEARTBEATS * heartbeat_s + SLACK_S


class Silence:
    """Cancels the call of one stream after another when a read waits for longer than `limit_s`, or
    up to a quarter more.

    Time in which this loop itself stood still does not count: what came meanwhile lies unread. With
    each silence in a row patience doubles, up to eight times: where a message takes longer on its
    way than the limit, dialling again for ever would never bring it. Owned by one loop.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self.heard_s: float | None = None
        """Loop time of the last message, of any kind; None before the first."""
        self._waiting_since_s: float | None = None
        self._patience = 1
        self._broke = False
        self._call: AnyCall | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._messages = 0
        """On the present stream."""

    @contextmanager
    def over(self, call: AnyCall) -> Iterator[None]:
        """Watches the reads of `call` while the block lasts."""
        self._call, self._broke, self._messages = call, False, 0
        self._waiting_since_s = None
        # At a moment of its own: a thousand clients of a server that stands still for a while must
        # not leave it, and come again, all at once.
        self._look_again(random.random())
        try:
            yield
        finally:
            if self._timer is not None:
                self._timer.cancel()
            self._call = self._timer = None

    def listen(self) -> None:
        """A read begins."""
        self._waiting_since_s = asyncio.get_running_loop().time()

    def heard(self) -> None:
        """It brought something."""
        self.heard_s = asyncio.get_running_loop().time()
        self._waiting_since_s = None
        self._messages += 1
        if self._messages == 2:  # the first one only opens the stream
            self._patience = 1

    def error(self, address: str) -> Unavailable | None:
        """Why the call was cancelled; None where that was somebody else."""
        if not self._broke:
            return None
        told = f"Flux at {address} was silent for {self._limit_s():g} s"
        self._patience = min(2 * self._patience, MOST_PATIENCE)
        return Unavailable(told, reason=SILENT)

    def _limit_s(self) -> float:
        return self.limit_s * self._patience

    def _look_again(self, part: float = 1.0) -> None:
        loop = asyncio.get_running_loop()
        due_s = loop.time() + part * self._limit_s() / _LOOKS
        self._timer = loop.call_at(due_s, self._look, due_s)

    def _look(self, due_s: float) -> None:
        now_s = asyncio.get_running_loop().time()
        if self._waiting_since_s is not None:
            self._waiting_since_s += now_s - due_s
            if now_s - self._waiting_since_s >= self._limit_s():
                self._broke = True
                if self._call is not None:
                    self._call.cancel()
                return
        self._look_again()
