"""Several logs over one stream are one log: what each node shows, refuses and notices."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from aither.flux.v1.flux_service_pb2 import DURABILITY_FSYNC, GAP_REASON_COMPACTED
from aither_sdk.errors import (
    AitherError,
    FailedPrecondition,
    ResourceExhausted,
    Unavailable,
)
from aither_sdk.settings import FluxSettings
from flux_svc.logs import open_log
from flux_svc.logs.base import Ability, Appended, Expected, Missing
from flux_svc.logs.jetstream.follower import survey
from flux_svc.logs.jetstream.log import JetStreamLog
from flux_svc.logs.jetstream.messages import place_of
from flux_svc.logs.jetstream.stream import Stream, StreamPlan
from flux_svc.logs.jetstream.wire import Message, Wire
from tests.conformance.log_house import event, events, last, read_all
from tests.cut_off import Proxy
from tests.nats_server import NatsServer, nats_server

PATIENCE_S = 20.0


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    with nats_server(tmp_path_factory.mktemp("nats")) as server:
        yield server


@pytest.fixture
def plan(request: pytest.FixtureRequest) -> StreamPlan:
    return StreamPlan(f"T{abs(hash(request.node.nodeid)) % 10**9}")


@asynccontextmanager
async def node(
    server: NatsServer, plan: StreamPlan, ended: Callable[[AitherError], None] = lambda _: None
) -> AsyncIterator[JetStreamLog]:
    log = await JetStreamLog.open([server.url], plan, ended=ended)
    try:
        yield log
    finally:
        await log.close()


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not holds():
            await asyncio.sleep(0.005)


def connected(log: JetStreamLog) -> bool:
    return log._connection._wire is not None and not log._connection._wire.lost.is_set()


async def test_nodes_show_the_same_events_at_the_same_places(
    shared: NatsServer, plan: StreamPlan
) -> None:
    async with node(shared, plan) as a, node(shared, plan) as b:
        assert a.epoch == b.epoch
        heard: list[int] = []
        b.on_commit(lambda records: heard.extend(one.sequence for one in records))
        await asyncio.gather(
            *(log.append(events(3, f"x.{n % 5}")) for n in range(20) for log in (a, b))
        )
        await until(lambda: a.info().last_sequence == b.info().last_sequence == 120)
        assert heard == list(range(1, 121))
        assert (await a.read(0)).payload == (await b.read(0)).payload
        assert await last(a, bool) == await last(b, bool)
        assert a.info() == b.info()


async def test_a_node_that_comes_later_knows_what_the_others_know(
    shared: NatsServer, plan: StreamPlan
) -> None:
    async with node(shared, plan) as a:
        batch = [*events(5, "x.a"), *events(5, "x.b")]
        await a.append(batch)
        async with node(shared, plan) as b:
            assert b.info() == a.info()
            assert await last(b, bool) == await last(a, bool)
            assert (await b.append([*batch, event()]))[-2:] == [
                Appended(10, True),
                Appended(11, False),
            ]


async def test_an_event_sent_to_two_nodes_at_once_is_stored_once(
    shared: NatsServer, plan: StreamPlan
) -> None:
    async with node(shared, plan) as a, node(shared, plan) as b:
        for _ in range(10):
            single, batch = [event()], events(5)
            for sent in (single, batch, [*batch[2:], *events(2)]):
                first, second = await asyncio.gather(a.append(sent), b.append(sent))
                assert [one.sequence for one in first] == [one.sequence for one in second]
                pairs = zip(first, second, strict=True)
                assert all(one.duplicate or two.duplicate for one, two in pairs)
        stored = await read_all(a)
        assert len({one.id for one in stored}) == len(stored)


async def test_of_many_expectations_on_two_nodes_one_comes_true(
    shared: NatsServer, plan: StreamPlan
) -> None:
    async with node(shared, plan) as a, node(shared, plan) as b:
        for expected in (
            Expected(last_sequence=0),
            Expected(subjects={"test.a": 1}),
            Expected(subjects={"test.a": 2, "other": 0}),
        ):
            tries = [log.append(events(1), expected=expected) for log in (a, b) for _ in range(5)]
            answers = await asyncio.gather(*tries, return_exceptions=True)
            assert sum(isinstance(answer, list) for answer in answers) == 1, answers
            refused = [one for one in answers if isinstance(one, FailedPrecondition)]
            assert len(refused) == 9
            assert {one.reason for one in refused} == {"WRONG_LAST_SEQUENCE"}
        with pytest.raises(FailedPrecondition) as wrong:
            await b.append(events(1), expected=Expected(subjects={"test.a": 2}))
        assert wrong.value.metadata == {"subject": "test.a", "actual": "3", "expected": "2"}


async def test_an_expectation_of_two_subjects_holds_though_others_append(
    shared: NatsServer, plan: StreamPlan
) -> None:
    async with node(shared, plan) as a, node(shared, plan) as b:
        noise = [b.append([event("noise")]) for _ in range(30)]
        state = Expected(subjects={"x.a": 0, "x.b": 0})
        batch = [event("x.a"), event("x.b")]
        *_, results = await asyncio.gather(*noise, a.append(batch, expected=state))
        assert [one.duplicate for one in results] == [False, False]


async def test_what_one_node_trims_is_a_gap_on_the_others(
    shared: NatsServer, plan: StreamPlan
) -> None:
    async with node(shared, plan) as a, node(shared, plan) as b:
        await a.append(events(20))
        await until(lambda: b.info().last_sequence == 20)
        await a.trim(11)
        result = await b.read(0)
        assert (result.first_sequence, list(result.sequences)) == (11, list(range(11, 21)))
        assert b.info().first_sequence == 11
        assert not result.missing


async def test_a_message_that_somebody_deleted_is_told_as_missing(
    shared: NatsServer, plan: StreamPlan
) -> None:
    async with node(shared, plan) as log:
        await log.append(events(10))
        for sequence in (4, 5, 10):
            shared.ask(f"$JS.API.STREAM.MSG.DELETE.{plan.name}", {"seq": sequence})
        result = await log.read(0)
        assert list(result.sequences) == [1, 2, 3, 6, 7, 8, 9]
        assert result.missing == (Missing(4, 10, 3, GAP_REASON_COMPACTED),)
        assert (result.position, result.end_reached) == (10, True)
        assert (await log.fetch([3, 4, 5, 6, 10])).sequences == [3, 6]
        back = await log.read(11, backward=True)
        assert list(back.sequences) == [9, 8, 7, 6, 3, 2, 1]
    async with node(shared, plan) as log:
        assert (await log.append([event()]))[0].sequence == 11


async def test_a_consumer_that_is_gone_is_replaced_without_a_hole(
    shared: NatsServer, plan: StreamPlan
) -> None:
    async with node(shared, plan) as log:
        heard: list[int] = []
        log.on_commit(lambda records: heard.extend(one.sequence for one in records))
        await log.append(events(5))
        names = shared.ask(f"$JS.API.CONSUMER.NAMES.{plan.name}")["consumers"]
        assert len(names) == 1
        shared.ask(f"$JS.API.CONSUMER.DELETE.{plan.name}.{names[0]}")
        results = await asyncio.gather(*(log.append(events(2)) for _ in range(5)))
        assert sum(map(len, results)) == 10
        assert heard == list(range(1, 16))


async def test_a_stream_that_was_replaced_ends_the_node(
    shared: NatsServer, plan: StreamPlan
) -> None:
    ends: list[AitherError] = []
    async with node(shared, plan, ends.append) as log:
        await log.append(events(3))
        shared.ask(f"$JS.API.STREAM.DELETE.{plan.name}")
        async with node(shared, plan) as other:
            assert other.epoch != log.epoch
            await until(lambda: bool(ends))
            assert ends[0].reason == "LOG_REPLACED"
            with pytest.raises(Unavailable) as refused:
                await log.append([event()])
            assert refused.value.reason == "LOG_REPLACED"
            assert other.info().last_sequence == 0


async def test_without_nats_appends_are_refused_and_then_go_on(
    tmp_path: Path, plan: StreamPlan
) -> None:
    with nats_server(tmp_path) as server:
        async with node(server, plan) as log:
            heard: list[int] = []
            log.on_commit(lambda records: heard.extend(one.sequence for one in records))
            batch = events(3)
            await log.append(batch)
            await asyncio.to_thread(server.kill)
            for call in (log.append([event()]), log.read(0)):
                with pytest.raises(Unavailable) as refused:
                    await call
                assert refused.value.reason == "LOG_UNREACHABLE"
                assert refused.value.retry_after_s
            assert log.info().last_sequence == 3
            await asyncio.to_thread(server.start)
            await until(lambda: connected(log))
            results = await log.append([*batch, event()])
            assert results == [*(Appended(n, True) for n in (1, 2, 3)), Appended(4, False)]
            assert heard == [1, 2, 3, 4]


async def test_a_stream_that_lost_events_gets_another_epoch(
    tmp_path: Path, plan: StreamPlan
) -> None:
    ends: list[AitherError] = []
    with nats_server(tmp_path / "nats") as server:
        async with node(server, plan, ends.append) as log:
            await log.append(events(3))
            await asyncio.to_thread(server.kill)
            await asyncio.to_thread(shutil.copytree, server.folder / "store", tmp_path / "old")
            await asyncio.to_thread(server.start)
            await until(lambda: connected(log))
            await log.append(events(3))
            await asyncio.to_thread(server.kill)
            await asyncio.to_thread(shutil.rmtree, server.folder / "store")
            await asyncio.to_thread(shutil.move, tmp_path / "old", server.folder / "store")
            await asyncio.to_thread(server.start)
            await until(lambda: bool(ends))
            assert ends[0].reason == "LOG_REWOUND"
            assert ends[0].metadata == {"lost_from": "4", "lost_to": "6"}
            async with node(server, plan) as other:
                assert other.epoch != log.epoch
                assert other.info().last_sequence == 3


async def test_fsync_needs_the_word_of_the_operator(shared: NatsServer, plan: StreamPlan) -> None:
    async with node(shared, plan) as log:
        assert Ability.FSYNC not in log.abilities
        with pytest.raises(FailedPrecondition) as refused:
            await log.append([event()], durability=DURABILITY_FSYNC)
        assert refused.value.reason == "DURABILITY_UNSUPPORTED"


async def test_an_event_that_nats_does_not_take_is_refused_with_what_to_do(
    shared: NatsServer, plan: StreamPlan
) -> None:
    async with node(shared, plan) as log:
        large = event()
        large.payload.value = bytes(2**21)
        for batch in ([large], [event(), large]):
            with pytest.raises(ResourceExhausted) as refused:
                await log.append(batch)
            assert refused.value.reason == "EVENT_TOO_LARGE"
            assert "max_payload" in refused.value.message
        assert (await log.append([event()]))[0].sequence == 1


async def test_a_stream_of_others_is_not_taken(shared: NatsServer, plan: StreamPlan) -> None:
    config = {"name": plan.name, "subjects": ["orders.>"], "storage": "file"}
    shared.ask(f"$JS.API.STREAM.CREATE.{plan.name}", config)
    with pytest.raises(FailedPrecondition) as refused:
        await JetStreamLog.open([shared.url], plan)
    assert refused.value.reason == "STREAM_NOT_OURS"
    assert "flux.nats_stream" in refused.value.message


@pytest.mark.parametrize("version", [(2, 11, 11), (2, 12, 0)])
async def test_a_nats_server_that_cannot_keep_a_batch_whole_is_refused_at_once(
    shared: NatsServer,
    plan: StreamPlan,
    version: tuple[int, int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Wire, "server_version", version)
    with pytest.raises(FailedPrecondition) as refused:
        await JetStreamLog.open([shared.url], plan)
    assert refused.value.reason == "NATS_TOO_OLD"
    assert "2.12.1" in refused.value.message
    assert "error" in shared.ask(f"$JS.API.STREAM.INFO.{plan.name}")  # nothing was made


async def test_a_leader_that_leaves_out_what_it_does_not_know_is_refused(
    shared: NatsServer, plan: StreamPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another server of a cluster than the one that answers, as 2.11 does it."""
    ask = Wire.ask

    async def old(wire: Wire, verb: str, request: Mapping[str, Any]) -> dict[str, Any]:
        known = {key: value for key, value in request.items() if key != "allow_atomic"}
        return await ask(wire, verb, known)

    monkeypatch.setattr(Wire, "ask", old)
    with pytest.raises(FailedPrecondition) as refused:
        await JetStreamLog.open([shared.url], plan)
    assert refused.value.reason == "NATS_TOO_OLD"


async def test_a_survey_ends_though_what_it_was_to_tell_is_removed_meanwhile(
    shared: NatsServer, plan: StreamPlan
) -> None:
    wire = await Wire.dial(shared.url, name="test")
    try:
        stream = Stream(plan)
        await stream.make(wire)
        # More than nats-server sends before it hears that the first of it was taken.
        large = {"X": "x" * 60_000}
        for _ in range(99):
            await wire.send(f"{plan.name}.s", b"", large)
        await wire.post(f"{plan.name}.s", b"", large)
        state = await stream.state(wire)
        taken: list[int] = []

        def take(message: Message) -> None:
            taken.append(place_of(message.reply).sequence)
            if len(taken) == 1:
                shared.ask(f"$JS.API.STREAM.PURGE.{plan.name}")

        which = {"deliver_policy": "all"}
        async with asyncio.timeout(PATIENCE_S):
            await survey(wire, plan.name, which, state.last_sequence, take)
        assert 0 < len(taken) < state.last_sequence == 100
    finally:
        await wire.close()


async def test_settings_choose_the_stream(
    shared: NatsServer, plan: StreamPlan, tmp_path: Path
) -> None:
    settings = FluxSettings(
        log="jetstream",
        nats_url=f"nats://127.0.0.1:1, {shared.url}",
        nats_stream=plan.name,
        nats_duplicate_window_s=7,
        nats_synced=True,
    )
    async with open_log(settings, tmp_path) as log:
        assert (log.info().kind, Ability.FSYNC in log.abilities) == ("jetstream", True)
        config = shared.ask(f"$JS.API.STREAM.INFO.{plan.name}")["config"]
        assert config["duplicate_window"] == 7_000_000_000
        assert config["subjects"] == [f"{plan.name}.>"]


async def test_replicas_without_a_cluster_are_refused_at_once(
    shared: NatsServer, plan: StreamPlan
) -> None:
    with pytest.raises(FailedPrecondition) as refused:
        await JetStreamLog.open([shared.url], StreamPlan(plan.name, replicas=3))
    assert "flux.nats_replicas" in refused.value.message


async def test_a_node_that_is_cut_off_refuses_within_its_bounds_and_comes_back(
    shared: NatsServer, plan: StreamPlan
) -> None:
    async with Proxy(shared.port) as proxy, AsyncExitStack() as stack:
        url = f"nats://127.0.0.1:{proxy.port}"
        log = await JetStreamLog.open([url], plan, queue_events=2000)
        stack.push_async_callback(log.close)
        heard: list[int] = []
        log.on_commit(lambda records: heard.extend(one.sequence for one in records))
        await log.append(events(10))
        proxy.part()
        large = [events(100) for _ in range(30)]
        for batch in large:
            for one in batch:
                one.payload.value = bytes(10_000)
        tries = [asyncio.create_task(log.append(batch)) for batch in large]
        async with asyncio.timeout(PATIENCE_S):
            answers = await asyncio.gather(*tries, return_exceptions=True)
        assert {one.reason for one in answers if isinstance(one, AitherError)} == {
            "LOG_UNREACHABLE",
            "WRITE_QUEUE_FULL",
        }
        assert sum(isinstance(one, ResourceExhausted) for one in answers) == 10
        proxy.heal()
        await until(lambda: connected(log))
        for batch in large:
            await log.append(batch)
        stored = await read_all(log)
        assert sorted(heard) == heard == [one.sequence for one in stored]
        assert len({one.id for one in stored}) == len(stored) == 3010


async def test_nobody_there_is_told_with_the_address(
    plan: StreamPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flux_svc.logs.jetstream.opening.OPEN_S", 0.3)
    with pytest.raises(Unavailable) as refused:
        await JetStreamLog.open(["nats://127.0.0.1:1"], plan)
    assert refused.value.reason == "LOG_UNREACHABLE"
    assert "nats://127.0.0.1:1" in refused.value.message
