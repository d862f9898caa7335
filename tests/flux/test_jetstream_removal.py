"""Retention over one stream and several nodes: one of them removes, all of them show the same."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from aither.flux.v1.event_pb2 import Event
from aither.flux.v1.flux_service_pb2 import GAP_REASON_COMPACTED
from aither_sdk.errors import FailedPrecondition, Unavailable
from aither_sdk.settings import RetentionSettings
from aither_sdk.subjects import FilterSet
from flux_svc.logs.base import Appended, EventLog, Expected
from flux_svc.logs.jetstream import notices as jetstream_notices
from flux_svc.logs.jetstream.log import JetStreamLog
from flux_svc.logs.jetstream.stream import StreamPlan
from flux_svc.logs.memory import MemoryLog
from flux_svc.retention import Retention
from tests.conformance.log_house import event, events, holes_of, last, read_all, sequences
from tests.cut_off import Proxy
from tests.nats_server import NatsServer, nats_server

PATIENCE_S = 20.0
SECOND_NS = 1_000_000_000


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    with nats_server(tmp_path_factory.mktemp("nats")) as server:
        yield server


@pytest.fixture
def plan(request: pytest.FixtureRequest) -> StreamPlan:
    return StreamPlan(f"T{abs(hash(request.node.nodeid)) % 10**9}")


@asynccontextmanager
async def node(server: NatsServer, plan: StreamPlan, port: int = 0) -> AsyncIterator[JetStreamLog]:
    url = f"nats://127.0.0.1:{port or server.port}"
    log = await JetStreamLog.open([url], plan)
    try:
        yield log
    finally:
        await log.close()


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not holds():
            await asyncio.sleep(0.005)


async def states(log: EventLog) -> list[int]:
    return list((await last(log, bool)).sequences)


def subjects(*logs: EventLog) -> set[int]:
    return {log.info().subjects for log in logs}


async def test_all_nodes_agree_on_whose_state_ended_also_those_that_start_later(
    shared: NatsServer, plan: StreamPlan
) -> None:
    async with node(shared, plan) as a, node(shared, plan) as b:
        # x has an older event that stays; y has none; z had its state superseded.
        await a.append([event(one) for one in ("x", "x", "y", "z", "z", "w")])
        await until(lambda: b.info().last_sequence == 6)
        assert await a.remove([2, 3, 4]) == 3
        await until(lambda: subjects(a, b) == {2})
        async with node(shared, plan) as later:
            for log in (a, b, later):
                assert await states(log) == [5, 6]
                assert list((await log.newest(bool)).sequences) == [5, 6]
                assert log.info().subjects == 2
                with pytest.raises(FailedPrecondition) as refused:
                    await log.append([event("x")], expected=Expected(subjects={"x": 2}))
                assert refused.value.metadata["actual"] == "0"
            wanted = Expected(subjects={"x": 0})
            assert await later.append([event("x")], expected=wanted) == [Appended(7, False)]
            await until(lambda: subjects(a, b, later) == {3})
            for log in (a, b, later):
                assert await states(log) == [5, 6, 7]
        async with node(shared, plan) as newest:
            assert await states(newest) == [5, 6, 7]


async def test_a_node_that_did_not_hear_of_a_removal_answers_right_all_the_same(
    shared: NatsServer, plan: StreamPlan
) -> None:
    async with (
        Proxy(shared.port) as proxy,
        node(shared, plan) as a,
        node(shared, plan, proxy.port) as b,
    ):
        await a.append([event("x"), event("x"), event("y")])
        await until(lambda: b.info().last_sequence == 3)
        b._notices._hear = lambda subject, ended: None  # as if it were on its way
        await a.remove([2, 3])
        assert await states(b) == []
        with pytest.raises(FailedPrecondition) as refused:
            await b.append([event("y")], expected=Expected(subjects={"y": 3}))
        assert refused.value.metadata["actual"] == "0"
        batch = [event("y"), event("z")]
        assert await b.append(batch, expected=Expected(subjects={"y": 0})) == [
            Appended(4, False),
            Appended(5, False),
        ]


async def test_what_ended_while_a_node_was_cut_off_it_hears_afterwards(
    shared: NatsServer, plan: StreamPlan
) -> None:
    async with (
        Proxy(shared.port) as proxy,
        node(shared, plan) as a,
        node(shared, plan, proxy.port) as b,
    ):
        await a.append([event(f"s.{n % 5}") for n in range(10)])
        await until(lambda: b.info().last_sequence == 10)
        proxy.part()
        await a.remove([7, 8])
        await a.append([event("s.1")])
        proxy.heal()
        await until(lambda: b.info().last_sequence == 11 and b.info().subjects == 4)
        assert await states(b) == await states(a) == [6, 9, 10, 11]


async def test_an_event_that_ends_is_removed_by_one_node_and_gone_on_all(
    shared: NatsServer, plan: StreamPlan
) -> None:
    async with node(shared, plan) as a, node(shared, plan) as b:
        settings = RetentionSettings(sweep_interval_s=0.1)
        keepers = [Retention(log, settings) for log in (a, b)]
        await a.append([event("x"), event("y")])
        end_ns = time.time_ns() + SECOND_NS // 5
        await b.append([event("x", expire_ns=end_ns), event("z", expire_ns=end_ns)])
        async with keepers[0].running(), keepers[1].running():
            await until(lambda: subjects(a, b) == {1})
            assert time.time_ns() >= end_ns
            await until(lambda: sum(one.statistics.expired_events for one in keepers) == 2)
        assert not min(one.statistics.sweeps for one in keepers), "one node at a time"
        assert not max(one.statistics.failed_sweeps for one in keepers)
        async with node(shared, plan) as later:
            for log in (a, b, later):
                assert await states(log) == [2]
                assert sequences(await read_all(log)) == [1, 2]


async def test_events_that_end_are_found_by_a_node_that_never_heard_them(
    shared: NatsServer, plan: StreamPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flux_svc.logs.jetstream.opening.WINDOW_EVENTS", 10)
    monkeypatch.setattr("flux_svc.logs.jetstream.remover._DEALT_EVENTS", 5)
    async with node(shared, plan) as a:
        await a.append([event(expire_ns=7), *events(30), event(expire_ns=8), *events(30)])
    async with node(shared, plan) as b:
        assert await b.tends()
        assert await b.expired(9) == [1, 32]
        assert await b.remove([1, 32]) == 2
        assert await b.expired(9) == []
        assert await b._notices.dealt_to(b.wire()) == 62
    async with node(shared, plan) as c:
        await c.append([event(expire_ns=7)])
        assert await c.expired(9) == [63]


@pytest.mark.parametrize(
    "settings",
    [
        {"max_events": 100},
        {"max_events": 100, "keep_last_per_subject": True},
        {"rules": [{"filter": "a.>", "max_events_per_subject": 3}]},
        {"max_events": 200, "rules": [{"filter": "*.1", "max_events_per_subject": 1}]},
    ],
)
async def test_rules_leave_the_same_as_in_a_log_of_one_node(
    shared: NatsServer, plan: StreamPlan, settings: dict[str, object]
) -> None:
    batches = [
        [Event(id=f"{n}.{m}", source="s", subject=f"{'ab'[m % 2]}.{m * n % 7}") for m in range(30)]
        for n in range(12)
    ]
    chosen = RetentionSettings.model_validate(settings)
    model = MemoryLog()
    async with node(shared, plan) as a, node(shared, plan) as b:
        keepers = [Retention(log, chosen) for log in (a, b)]
        alone = Retention(model, chosen)
        for n, batch in enumerate(batches):
            await model.append(batch)
            await (a, b)[n % 2].append(batch)
            if n % 4 == 3:
                await alone.sweep()
                pairs = list(zip((a, b), keepers, strict=True))
                if n == 7:
                    await a._remover.release()
                for log, keeper in pairs if n < 7 else reversed(pairs):
                    if await log.tends():
                        await keeper.sweep()
        held = sequences(await read_all(model))
        assert held != list(range(1, 361))
        await until(lambda: subjects(a, b) == {model.info().subjects})
        for log in (a, b):
            assert sequences(await read_all(log)) == held
            assert await states(log) == await states(model)
            assert sum(hole.events for hole in await holes_of(log)) == sum(
                hole.events for hole in await holes_of(model)
            )
        assert {one.statistics.sweeps > 0 for one in keepers} == {True}
        assert sum(one.statistics.retired_events for one in keepers) == (
            alone.statistics.retired_events
        )


async def test_a_node_that_leaves_lets_another_sweep_at_once(
    shared: NatsServer, plan: StreamPlan
) -> None:
    async with node(shared, plan) as b:
        async with node(shared, plan) as a:
            assert await a.tends()
            assert not await b.tends()
            assert await a.tends()
        assert await b.tends()


async def test_a_node_that_stood_still_is_replaced_and_removes_nothing_more(
    shared: NatsServer, plan: StreamPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jetstream_notices, "LEASE_S", 1)
    monkeypatch.setattr(jetstream_notices, "_RENEW_S", 0.0)
    async with node(shared, plan) as a, node(shared, plan) as b:
        await a.append(events(20))
        assert await a.tends()
        async with asyncio.timeout(PATIENCE_S):
            while not await b.tends():  # a does not renew
                await asyncio.sleep(0.05)
        for call in (a.remove([3]), a.trim(5)):
            with pytest.raises(Unavailable) as refused:
                await call
            assert refused.value.reason == "RETENTION_MOVED"
            assert await b.tends()  # the lease is short here
            a._remover._tends = True
        assert not await a.tends()
        assert (await read_all(b))[0].sequence == 1


async def test_a_node_that_stood_still_hides_no_notice_of_the_one_that_replaced_it(
    shared: NatsServer, plan: StreamPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with node(shared, plan) as a, node(shared, plan) as b:
        await a.append([event("s"), event("t"), event("s")])
        assert await a.tends()
        notices, judge = a._notices, a._remover._plan

        async def judged_and_stopped(*given: Any) -> Any:
            planned = await judge(*given)
            monkeypatch.setattr(a._remover, "_plan", judge)
            # Meanwhile its lease ends, and another node removes what came since.
            await notices.release(a.wire())
            notices._lease, notices._asked_s = 10**6, float("-inf")
            assert await b.tends()
            await b.append([event("s"), event("s")])
            assert await b.remove([5]) == 1
            return planned

        monkeypatch.setattr(a._remover, "_plan", judged_and_stopped)
        with pytest.raises(Unavailable) as refused:
            await a.remove([3])
        assert refused.value.reason == "RETENTION_MOVED"
        assert await states(b) == [2]
    async with node(shared, plan) as later:
        assert await states(later) == [2]


async def test_notices_made_anew_by_another_node_are_heard(
    shared: NatsServer, plan: StreamPlan
) -> None:
    async with node(shared, plan) as a, node(shared, plan) as b:
        await a.append([event(f"s.{n}") for n in range(6)])
        assert await a.remove([2, 3, 4]) == 3
        await until(lambda: subjects(a, b) == {3})
        shared.ask(f"$JS.API.STREAM.DELETE.{a._notices.stream}")
        await a._notices.begin(a.wire())  # before b has noticed
        assert await a.remove([5]) == 1
        await until(lambda: subjects(a, b) == {2})


async def test_many_removals_of_few_subjects_do_not_hold_up_publishers(
    shared: NatsServer, plan: StreamPlan
) -> None:
    async with node(shared, plan) as a, node(shared, plan) as b:
        await a.append([event("first")])
        for _ in range(2):
            await a.append([event(f"s.{n % 10}") for n in range(1000)])
        await until(lambda: b.info().last_sequence == 2001)
        meanwhile = 0

        async def publish(removing: asyncio.Task[int]) -> None:
            nonlocal meanwhile
            while not removing.done():
                await b.append([event("p")])
                meanwhile += not removing.done()

        removing = asyncio.create_task(a.remove(range(2, 1992)))
        await publish(removing)
        assert await removing == 1990
        assert meanwhile > 2
        held = [1, *range(1992, 2002)]
        for position in (0, 1, 500):
            result = await b.read(position, until=2001)
            (hole,) = result.missing
            gone = 1991 - max(position, 1)
            assert (hole.events, hole.reason) == (gone, GAP_REASON_COMPACTED)
            assert list(result.sequences) == [one for one in held if one > position]
        assert await states(b) == [*held, b.info().last_sequence]


async def test_notices_that_tell_nothing_any_more_are_let_go(
    shared: NatsServer, plan: StreamPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with node(shared, plan) as log:
        await log.append([event(f"s.{n % 4}") for n in range(8)])
        await log.remove([5, 6, 7])
        await log.append([event("s.1")])
        stream = log._notices.stream

        def kept() -> int:
            return int(shared.ask(f"$JS.API.STREAM.INFO.{stream}")["state"]["messages"])

        assert kept() == 3
        assert await log.tends()
        assert kept() == 2 + 1  # and the lease
        await log.trim(8)
        log._remover._cleaned_s = float("-inf")
        assert await log.tends()
        assert kept() == 1
    async with node(shared, plan) as log:
        assert list((await log.newest(FilterSet(["s.>"]).matches)).sequences) == [8, 9]
