"""From the newest snapshot in the log to a world, before anything is decided."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime

import structlog
from google.protobuf.message import DecodeError

from aither.genesis.v1 import genesis_events_pb2
from aither_sdk.clock import Clock
from aither_sdk.lifecycle import Life
from aither_sdk.subscribing.subscriber import (
    EARLIEST,
    LAST_PER_SUBJECT,
    Start,
    SubscriberState,
    after,
)
from genesis_svc.config import Config
from genesis_svc.routines import Routines
from genesis_svc.snapshot import planned, restore
from genesis_svc.world import World

SNAPSHOT = "genesis.snapshot"

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Beginning:
    """Where this run of Genesis begins."""

    world: World
    routines: Routines
    epoch: int
    """One more than that of the snapshot, so that what an older run ordered can be told apart."""
    start: Start
    """What the world's stream must begin with, to make the world whole."""


async def newest_snapshot(life: Life) -> tuple[genesis_events_pb2.GenesisSnapshot | None, str]:
    """The newest snapshot in the log, and the log's epoch. Waits for Flux as long as it takes.

    A stream of its own that ends here, before the one that is followed begins.
    """
    found: list[genesis_events_pb2.GenesisSnapshot] = []
    complete = asyncio.Event()

    def looked(state: SubscriberState) -> None:
        if state.snapshot_complete:
            complete.set()

    async with life.subscriber(
        [SNAPSHOT],
        start=LAST_PER_SUBJECT,
        client_name="genesis recovery",
        on_state=looked,
        fact=None,  # a look at the log, not the stream that Genesis lives on
    ) as events:

        async def read() -> None:
            async for event in events:
                told = genesis_events_pb2.GenesisSnapshot()
                try:
                    understood = event.payload.Unpack(told)
                except DecodeError:
                    understood = False
                if understood:
                    found[:] = [told]
                else:
                    _log.error("genesis.snapshot_unreadable", sequence=event.sequence)

        reading = asyncio.create_task(read(), name="genesis:recovery:read")
        waiting = asyncio.create_task(complete.wait(), name="genesis:recovery:complete")
        try:
            await asyncio.wait((reading, waiting), return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                reading.result()
        finally:
            reading.cancel()
            waiting.cancel()
            await asyncio.wait((reading, waiting))
        return (found[0] if found else None), events.state.epoch


def begin(
    config: Config,
    snapshot: genesis_events_pb2.GenesisSnapshot | None,
    log_epoch: str,
    clock: Clock,
) -> Beginning:
    """The world as of the snapshot, and how to go on. Without a snapshot Genesis never ran on this
    log: then all of it is read, once, for every command in it waits for its answer."""
    world = World({spec.id: spec.enabled for spec in config.agents})
    now = datetime.fromtimestamp(clock.time_ns() / 1e9, UTC)
    if snapshot is None:
        return Beginning(world, Routines(config.routines, {}, now), 1, EARLIEST)
    restore(snapshot, world)
    routines = Routines(config.routines, planned(snapshot), now)
    start = after(snapshot.world_sequence, log_epoch)
    return Beginning(world, routines, snapshot.epoch + 1, start)
