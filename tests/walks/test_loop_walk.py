"""The cascade that once brought a fleet down, and how it stops at its source.

A reflex listens to the health of 48 targets. Each time it evaluates one, it reports that target's
health again, and so hears itself.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from aither.flux.v1.event_pb2 import Event
from aither.runtime.v1.runtime_events_pb2 import FeedbackLoopRefused
from aither_sdk.errors import FailedPrecondition
from aither_sdk.events import handling
from aither_sdk.publishing.publisher import Publisher
from aither_sdk.subscribing.subscriber import EARLIEST, Subscriber
from flux_svc.logs.memory import MemoryLog
from flux_svc.loop_guard import SUBJECT
from tests.flux.flux_server import FluxServer, serving

TARGETS = 48
MAX_HOPS = 8
NO_LIMIT = 10**6


class Reflex:
    """Hears of a target's health, evaluates it, and reports it again."""

    def __init__(self, flux: FluxServer, *, deaf_to_itself: bool = False) -> None:
        self.evaluations = 0
        self.refusals: list[FailedPrecondition] = []
        own = ["reflex"] if deaf_to_itself else []
        self._publisher = Publisher(flux.address, source="reflex")
        self.subscriber = Subscriber(
            flux.address, ["pulse.target.*.health"], start=EARLIEST, exclude_sources=own
        )

    async def run(self) -> None:
        async with self._publisher, self.subscriber:
            async for events in self.subscriber.batches():
                await asyncio.gather(*map(self._evaluate, events))

    async def _evaluate(self, event: Event) -> None:
        self.evaluations += 1
        try:
            with handling(event):
                await self._publisher.publish(event.subject, {"well": True})
        except FailedPrecondition as refused:
            self.refusals.append(refused)


@asynccontextmanager
async def living(reflex: Reflex) -> AsyncIterator[None]:
    task = asyncio.create_task(reflex.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def report_once(flux: FluxServer) -> None:
    """Pulse tells each target's health one time: the only thing that happens from outside."""
    async with Publisher(flux.address, source="pulse") as pulse:
        for n in range(TARGETS):
            await pulse.publish(f"pulse.target.t{n}.health", {"well": True}, id=f"tick-1-t{n}")


async def heard(flux: FluxServer, subject: str, count: int) -> Sequence[Event]:
    found: list[Event] = []
    async with asyncio.timeout(20), Subscriber(flux.address, [subject], start=EARLIEST) as follow:
        async for event in follow:
            found.append(event)
            if len(found) == count:
                break
    return found


async def test_without_a_limit_one_report_a_target_never_ends() -> None:
    async with serving(MemoryLog(), max_hops=NO_LIMIT) as flux:
        reflex = Reflex(flux)
        async with living(reflex):
            await report_once(flux)
            for generation in (10, 20, 30):
                async with asyncio.timeout(20):
                    while reflex.evaluations < TARGETS * generation:
                        await asyncio.sleep(0.005)
        assert flux.log.info().events > TARGETS * 30
        assert not reflex.refusals


async def test_the_limit_stops_it_at_its_source_and_names_the_chain() -> None:
    async with serving(MemoryLog(), max_hops=MAX_HOPS) as flux:
        reflex = Reflex(flux)
        async with living(reflex):
            await report_once(flux)
            told = await heard(flux, SUBJECT, TARGETS)
            async with asyncio.timeout(20):
                while not reflex.subscriber.state.caught_up or len(reflex.refusals) < TARGETS:
                    await asyncio.sleep(0.005)

        # All that ever happened: each target's report, MAX_HOPS echoes of it, and one telling.
        assert flux.log.info().events == TARGETS * (MAX_HOPS + 1) + TARGETS
        assert reflex.evaluations == TARGETS * (MAX_HOPS + 1)
        assert {refused.reason for refused in reflex.refusals} == {"HOPS_EXCEEDED"}
        assert flux.publishing.statistics.refused_by_reason == {"HOPS_EXCEEDED": TARGETS}

        news = [FeedbackLoopRefused.FromString(event.payload.value) for event in told]
        subjects = {f"pulse.target.t{n}.health" for n in range(TARGETS)}
        assert {one.subject for one in news} == subjects
        for event, one in zip(told, news, strict=True):
            assert (event.source, event.hops, event.causation_id) == ("flux", 0, "")
            assert (one.source, one.hops, one.max_hops) == ("reflex", MAX_HOPS + 1, MAX_HOPS)
            sources = [link.partition("/")[0] for link in one.chain]
            assert sources == ["reflex"] * MAX_HOPS + ["pulse"]
            assert {link.partition(" ")[2] for link in one.chain} == {one.subject}
            name = one.subject.split(".")[2]
            assert one.chain[-1] == f"pulse/tick-1-{name} {one.subject}"


async def test_who_is_deaf_to_itself_never_begins_to_turn() -> None:
    async with serving(MemoryLog(), max_hops=MAX_HOPS) as flux:
        reflex = Reflex(flux, deaf_to_itself=True)
        async with living(reflex):
            await report_once(flux)
            events = await heard(flux, "pulse.target.*.health", 2 * TARGETS)
            async with asyncio.timeout(20):
                while not reflex.subscriber.state.caught_up:
                    await asyncio.sleep(0.005)
        assert Counter(event.hops for event in events) == {0: TARGETS, 1: TARGETS}
        assert (reflex.evaluations, flux.log.info().events) == (TARGETS, 2 * TARGETS)
        assert flux.guard.refused_loops == 0
