"""One member of a local group: its seat, and what waits to be received."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from aither.flux.v1 import flux_service_pb2 as pb
from aither_sdk.errors import AitherError
from flux_svc.groups.base import Delivery, News, Opened
from flux_svc.groups.local.table import UNRECEIVED_BYTES, Seat

if TYPE_CHECKING:
    from flux_svc.groups.local.group import LocalGroup


class LocalMember:
    """Made by `LocalGroup.join`."""

    def __init__(self, group: LocalGroup, seat: Seat, opened: Opened) -> None:
        self.opened = opened
        self._group = group
        self._core = group.core
        self._seat = seat
        self._deliveries: deque[Delivery] = deque()
        """Bounded by the core: `Seat.hungry`."""
        self._told: deque[tuple[int, News]] = deque()
        """Other news, each with the number of deliveries that came before it. Few: leases lost are
        those of deliveries that went out, and who does not read is not sent more; leadership
        changes only with a message of the member."""
        self._posted = 0
        self._received = 0
        self._failure: AitherError | None = None
        self._arrived = asyncio.Event()

    @property
    def checkpoint(self) -> int:
        return self._core.checkpoint

    def credit(self, events: int, bytes: int) -> None:
        self._core.credit(self._seat, events, bytes)
        self.heartbeat()

    async def ack(self, ack_ids: Sequence[str]) -> pb.ActionRefused | None:
        return self._act(lambda _: self._core.ack(self._seat, ack_ids))

    async def nack(
        self,
        ack_ids: Sequence[str],
        action: pb.NackAction.ValueType = pb.NACK_ACTION_RETRY,
        *,
        retry_delay_s: float | None = None,
        reason: str = "",
    ) -> pb.ActionRefused | None:
        return self._act(
            lambda now_s: self._core.nack(
                self._seat,
                ack_ids,
                now_s,
                park=action == pb.NACK_ACTION_PARK,
                delay_s=retry_delay_s,
                reason=reason,
            )
        )

    async def extend(
        self, ack_ids: Sequence[str], extension_s: float | None = None
    ) -> pb.ActionRefused | None:
        more_s = self._core.rules.ack_deadline_s if extension_s is None else extension_s
        return self._act(lambda now_s: self._core.extend(self._seat, ack_ids, now_s, more_s))

    def heartbeat(self) -> None:
        self._core.heard(self._seat, self._group.clock.monotonic())
        self._group.wake()

    def drain(self) -> None:
        self._seat.draining = True

    async def receive(self) -> News:
        while True:
            if self._told and self._told[0][0] <= self._received:
                return self._told.popleft()[1]
            if self._deliveries:
                return self._take()
            if self._failure is not None:
                raise self._failure
            self._arrived.clear()
            await self._arrived.wait()

    async def leave(self, *, broken: bool = False) -> None:
        self._group.leave(self._seat, broken=broken)

    # For the group

    def deliver(self, delivery: Delivery) -> None:
        self._deliveries.append(delivery)
        self._posted += 1
        self._arrived.set()

    def tell(self, news: News) -> None:
        self._told.append((self._posted, news))
        self._arrived.set()

    def fail(self, error: AitherError) -> None:
        """The last that is received."""
        self._failure = error
        self._arrived.set()

    def _act(self, action: Callable[[float], list[str]]) -> pb.ActionRefused | None:
        # First the lateness, then the message: an action that comes too late is refused.
        now_s = self._group.clock.monotonic()
        self._core.tick(now_s)
        self._core.heard(self._seat, now_s)
        refused = action(now_s)
        self._group.wake()
        if not refused:
            return None
        return pb.ActionRefused(
            ack_ids=refused,
            message="not the newest delivery of an event that is out with this member: unknown, "
            "done, expired, or replaced by a newer delivery. What is not done is delivered again; "
            "let go of it here",
        )

    def _take(self) -> News:
        limit = self._told[0][0] - self._received if self._told else len(self._deliveries)
        taken: list[Delivery] = []
        size = 0
        while self._deliveries and len(taken) < limit:
            frame_size = len(self._deliveries[0].frame)
            if taken and size + frame_size > UNRECEIVED_BYTES:
                break
            taken.append(self._deliveries.popleft())
            size += frame_size
        self._received += len(taken)
        self._core.received(self._seat, len(taken), size)
        self._group.wake()
        return tuple(taken)
