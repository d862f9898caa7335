"""A log, a hub that hears of its commits, and subscribers whose messages are decoded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import aclosing, asynccontextmanager

from aither.flux.v1 import flux_service_pb2 as pb
from aither_sdk.subjects import FilterSet
from flux_svc.fanout.hub import Hub
from flux_svc.fanout.subscription import Request, Subscription
from tests.flux.holed_log import HoledLog

Messages = AsyncIterator[pb.SubscribeResponse]


class House:
    """What a subscription stands on."""

    def __init__(self, *, log_events: int = 10_000, ring_events: int = 10_000) -> None:
        self.log = HoledLog(max_events=log_events)
        self.hub = Hub(0, max_events=ring_events, max_bytes=2**30)
        self.log.on_commit(self.hub.commit)

    @asynccontextmanager
    async def following(
        self,
        *filters: str,
        position: int = 0,
        snapshot: bool = False,
        stop_sequence: int | None = None,
        heartbeat_s: float = 30.0,
        batch_events: int = 4096,
        excluded: Iterable[str] = (),
        policy: pb.SlowPolicy.ValueType = pb.SLOW_POLICY_CATCH_UP,
    ) -> AsyncIterator[Messages]:
        request = Request(
            filters=FilterSet(filters),
            excluded_sources=frozenset(excluded),
            position=position,
            snapshot=snapshot,
            stop_sequence=stop_sequence,
            heartbeat_s=heartbeat_s,
            batch_events=batch_events,
            client_name="test",
            slow_policy=policy,
        )
        subscription = Subscription(request, self.hub, self.log)
        async with asyncio.timeout(20), aclosing(subscription.messages()) as messages:
            yield (pb.SubscribeResponse.FromString(message) async for message in messages)


async def until(messages: Messages, control: str) -> list[str]:
    """The messages up to the first with this control, in short."""
    told: list[str] = []
    async for message in messages:
        told += in_short(message)
        if message.WhichOneof("control") == control:
            return told
    raise AssertionError(f"it ended without {control}: {told}")


def in_short(message: pb.SubscribeResponse) -> list[str]:
    """Sequences, and the names of controls; of a gap all that it says."""
    told = [str(event.sequence) for event in message.events]
    kind = message.WhichOneof("control")
    if kind == "gap":
        gap = message.gap
        name = pb.GapReason.Name(gap.reason).removeprefix("GAP_REASON_")
        told.append(f"{name} {gap.from_sequence}..{gap.to_sequence}: {gap.missing_events}")
    elif kind is not None:
        told.append(kind)
    return told
