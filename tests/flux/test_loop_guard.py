"""Who is told of a feedback loop, how often, and what of its chain."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from aither.flux.v1.event_pb2 import Event
from aither.runtime.v1.runtime_events_pb2 import FeedbackLoopRefused
from aither_sdk.errors import ResourceExhausted
from flux_svc.frames import event_of
from flux_svc.logs.memory import MemoryLog
from flux_svc.loop_guard import (
    PAIRS,
    SCANNED_EVENTS,
    SUBJECT,
    TELLINGS,
    WINDOW_S,
    LoopGuard,
    Ration,
    chain_of,
)
from tests.clock import FakeClock
from tests.conformance.log_house import event, events


def caused(id: str, cause: str, *, source: str = "s", subject: str = "loop.a") -> Event:
    one = event(subject, source=source, id=id)
    one.causation_id = cause
    return one


async def told(log: MemoryLog) -> list[FeedbackLoopRefused]:
    found = [event_of(frame) for frame in (await log.read(0, max_events=4096)).frames]
    return [
        FeedbackLoopRefused.FromString(one.payload.value) for one in found if one.subject == SUBJECT
    ]


async def idle(guard: LoopGuard) -> None:
    async with asyncio.timeout(10):
        while guard._tasks.statistics().running:
            await asyncio.sleep(0)


# -- the chain


async def test_a_chain_is_followed_over_sources_with_slashes_and_many_other_events() -> None:
    log = MemoryLog()
    await log.append([event(source="gateway/eu-1", id="x/1", subject="demo.root")])
    await log.append(events(3000, "demo.noise"))
    await log.append([caused("2", "gateway/eu-1/x/1", source="a/b"), *events(2000)])
    await log.append([caused("2", "unrelated/1", source="c")])  # the same id, another source
    await log.append([caused("3", "a/b/2")])
    chain = await chain_of(log, "s/3")
    assert chain == ["s/3 loop.a", "a/b/2 loop.a", "gateway/eu-1/x/1 demo.root"]


async def test_a_cause_that_the_log_does_not_hold_is_named_without_its_subject() -> None:
    log = MemoryLog()
    await log.append([caused("2", "s/1")])
    assert await chain_of(log, "s/2") == ["s/2 loop.a", "s/1"]
    assert await chain_of(log, "gone/7") == ["gone/7"]
    assert await chain_of(log, "") == []
    assert await chain_of(MemoryLog(), "s/1") == ["s/1"]


async def test_a_cause_far_back_is_not_looked_for_for_ever() -> None:
    log = MemoryLog()
    await log.append([event(id="root", source="s")])
    for _ in range(SCANNED_EVENTS // 4096):
        await log.append(events(4096))
    assert await chain_of(log, "s/root") == ["s/root"]


async def test_a_chain_that_names_itself_ends() -> None:
    log = MemoryLog()
    await log.append([caused("1", "s/2"), caused("2", "s/1")])
    assert await chain_of(log, "s/2") == ["s/2 loop.a", "s/1 loop.a", "s/2"]


# -- how often


async def test_one_telling_a_window_and_the_next_says_how_many_were_not_told() -> None:
    log, clock = MemoryLog(), FakeClock()
    async with LoopGuard(log, max_hops=8, monotonic=clock.monotonic) as guard:
        for _ in range(5):
            guard.refused([caused("9", "s/8"), caused("9", "s/8", subject="loop.b")])
            await idle(guard)
        assert [(one.subject, one.suppressed_refusals) for one in await told(log)] == [
            ("loop.a", 0),
            ("loop.b", 0),
        ]
        clock.advance(WINDOW_S)
        guard.refused([caused("10", "s/8")])
        await idle(guard)
        last = (await told(log))[-1]
        assert (last.subject, last.id, last.suppressed_refusals) == ("loop.a", "10", 4)
        assert guard.refused_loops == 11


async def test_all_that_are_refused_at_once_are_told() -> None:
    log = MemoryLog()
    subjects = {f"pulse.target.t{n}.health" for n in range(48)}
    async with LoopGuard(log, max_hops=8) as guard:
        guard.refused([caused(one, "s/8", subject=one) for one in sorted(subjects)])
        await idle(guard)
    assert {one.subject for one in await told(log)} == subjects


async def test_what_the_log_cannot_take_is_told_when_it_can() -> None:
    class Full(MemoryLog):
        full = True

        async def append(self, *arguments, **options):  # type: ignore[no-untyped-def]
            if self.full:
                raise ResourceExhausted("no space", reason="DISK_FULL")
            return await super().append(*arguments, **options)

    log, clock = Full(), FakeClock()
    async with LoopGuard(log, max_hops=8, monotonic=clock.monotonic) as guard:
        guard.refused([caused("9", "s/8")])
        await idle(guard)
        log.full = False
        clock.advance(WINDOW_S)
        guard.refused([caused("10", "s/8")])
        await idle(guard)
        (one,) = await told(log)
        assert (one.id, one.suppressed_refusals) == ("10", 1)


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0, 40)), max_size=80))
def test_every_refusal_is_told_or_counted_in_the_next_telling(
    steps: list[tuple[int, float]],
) -> None:
    ration, now_s = Ration(), 1000.0
    accounted, open_, last_s = 0, [0] * 4, [float("-inf")] * 4
    for which, pause_s in steps:
        now_s += pause_s
        suppressed = ration.take("s", f"x.{which}", now_s)
        if suppressed is None:
            open_[which] += 1
            continue
        assert suppressed == open_[which]
        assert now_s - last_s[which] >= WINDOW_S
        accounted += suppressed + 1
        open_[which], last_s[which] = 0, now_s
    assert accounted + sum(open_) == len(steps)


def test_a_loop_with_a_subject_of_its_own_each_time_is_bounded_too() -> None:
    ration = Ration()
    allowed = sum(ration.take("s", f"x.{n}", 5.0) is not None for n in range(10 * PAIRS))
    assert allowed == TELLINGS.capacity
    assert len(ration._told) == PAIRS
