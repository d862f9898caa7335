"""What operators, disks and kills do to the stream behind Flux, and what must hold all the same."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from itertools import groupby
from pathlib import Path

import pytest
import structlog

from aither.flux.v1.event_pb2 import Event
from aither_sdk.errors import AitherError, Unavailable
from flux_svc.logs.base import EventLog
from flux_svc.logs.jetstream.log import JetStreamLog
from flux_svc.logs.jetstream.stream import StreamPlan
from flux_svc.logs.jetstream.wire import without_secrets
from tests.conformance.log_house import event, events, last, read_all, sequences
from tests.cut_off import Proxy
from tests.nats_server import NatsServer, nats_cluster, nats_server

PATIENCE_S = 20.0
SEED = 20_261_121
PLAN = StreamPlan("ATTACKED")


@asynccontextmanager
async def node(
    url: str, ended: Callable[[AitherError], None] = lambda _: None, plan: StreamPlan = PLAN
) -> AsyncIterator[JetStreamLog]:
    log = await JetStreamLog.open(url.split(","), plan, ended=ended)
    try:
        yield log
    finally:
        await log.close()


async def until(holds: Callable[[], bool], limit_s: float = PATIENCE_S) -> None:
    async with asyncio.timeout(limit_s):
        while not holds():
            await asyncio.sleep(0.005)


async def append(log: EventLog, batch: list[Event]) -> list[int]:
    """Repeats with the same ids until it is answered."""
    while True:
        try:
            return [one.sequence for one in await log.append(batch)]
        except Unavailable:
            await asyncio.sleep(0.02)


# Batches


async def kills_between_batches(folder: Path, kills: int) -> None:
    """Every batch is in the log whole, adjacent and once, or not at all."""
    chance = random.Random(SEED)
    acknowledged: dict[str, list[int]] = {}
    with nats_server(folder / "nats") as server:
        async with node(server.url) as log:
            over = asyncio.Event()

            async def publish(name: str) -> None:
                number = 0
                while not over.is_set():
                    # No repeats: what was not answered must be whole as well, or away.
                    batch = f"{name}.{number}"
                    number += 1
                    made = [event(f"b.{n % 3}", source=batch, id=str(n)) for n in range(200)]
                    try:
                        acknowledged[batch] = [one.sequence for one in await log.append(made)]
                    except Unavailable:
                        await asyncio.sleep(0.01)

            publishers = [asyncio.create_task(publish(f"p{n}")) for n in range(3)]
            for _ in range(kills):
                before = len(acknowledged)
                await until(lambda: len(acknowledged) > before)  # noqa: B023  # awaited here
                await asyncio.sleep(chance.uniform(0.0, 0.1))
                await asyncio.to_thread(server.kill)
                await asyncio.to_thread(server.start)
            over.set()
            await asyncio.gather(*publishers)
            await append(log, [event()])
            stored = [one for one in await read_all(log, max_events=4096) if one.source[0] == "p"]
    batches = [(source, list(some)) for source, some in groupby(stored, lambda one: one.source)]
    assert len(batches) == len({source for source, _ in batches}), "a batch is in two places"
    for source, some in batches:
        assert [one.id for one in some] == [str(n) for n in range(200)], source
        places = sequences(some)
        assert acknowledged.pop(source, places) == places
    assert not acknowledged, f"acknowledged and lost: {list(acknowledged)}"


async def test_a_killed_nats_leaves_batches_whole(tmp_path: Path) -> None:
    await kills_between_batches(tmp_path, 3)


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_a_nats_killed_again_and_again_leaves_batches_whole(tmp_path: Path) -> None:
    await kills_between_batches(tmp_path, 60)


# Operators


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    with nats_server(tmp_path_factory.mktemp("nats")) as server:
        yield server


@pytest.fixture
def server(shared: NatsServer) -> Iterator[NatsServer]:
    yield shared
    for stream in (PLAN.name, f"{PLAN.name}_REMOVALS"):
        shared.ask(f"$JS.API.STREAM.DELETE.{stream}")


def edit(server: NatsServer, **changes: object) -> None:
    config = server.ask(f"$JS.API.STREAM.INFO.{PLAN.name}")["config"]
    answer = server.ask(f"$JS.API.STREAM.UPDATE.{PLAN.name}", {**config, **changes})
    assert "error" not in answer, answer


async def test_a_stream_made_anew_under_a_publisher_is_never_taken_for_the_old_one(
    server: NatsServer,
) -> None:
    ends: list[AitherError] = []
    async with node(server.url, ends.append) as log:
        await log.append(events(50))
        config = server.ask(f"$JS.API.STREAM.INFO.{PLAN.name}")["config"]
        told: list[int] = []

        async def publish() -> None:
            while not ends:
                try:
                    told.extend(one.sequence for one in await log.append([event()]))
                except Unavailable:
                    await asyncio.sleep(0)

        publishing = asyncio.create_task(publish())
        await until(lambda: len(told) > 3)
        server.ask(f"$JS.API.STREAM.DELETE.{PLAN.name}")
        config["metadata"]["aither-epoch"] = "another"
        server.ask(f"$JS.API.STREAM.CREATE.{PLAN.name}", config)
        await until(lambda: bool(ends))
        await publishing
        assert ends[0].reason == "LOG_REPLACED"
        assert told == list(range(51, 51 + len(told))), "told sequences of another stream"
        async with node(server.url) as other:
            assert other.epoch == "another" != log.epoch


async def test_limits_that_an_operator_lowers_are_trims_on_every_node(server: NatsServer) -> None:
    async with node(server.url) as a, node(server.url) as b:
        await a.append([event(f"x.{n % 4}") for n in range(40)])
        await until(lambda: b.info().last_sequence == 40)
        edit(server, max_msgs=10)
        for log in (a, b):
            result = await log.read(0)
            assert (result.first_sequence, result.missing) == (31, ())
            assert list(result.sequences) == list(range(31, 41))
        edit(server, max_msgs_per_subject=1)
        for log in (a, b):
            assert sequences(await read_all(log)) == [37, 38, 39, 40]
            assert list((await last(log, bool)).sequences) == [37, 38, 39, 40]
        edit(server, max_msgs=4, discard="new")
        with pytest.raises(AitherError) as refused:
            await b.append(events(2))
        assert refused.value.reason == "DISK_FULL"
        assert sequences(await read_all(b)) == [37, 38, 39, 40]


async def test_settings_that_the_log_needs_are_set_again(
    server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flux_svc.logs.jetstream.connection.LOOK_S", 0.05)
    async with node(server.url) as log:
        edit(server, allow_direct=False)
        batch = events(3)
        assert await append(log, batch) == [1, 2, 3]
        async with asyncio.timeout(PATIENCE_S):
            while True:
                try:
                    assert (await log.read(0)).events == 3
                    break
                except Unavailable:
                    await asyncio.sleep(0.02)


# Disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs root")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


@pytest.mark.parametrize("limit", ["1GB", "2MB"], ids=["disk", "max_file_store"])
async def test_a_nats_without_room_refuses_loses_nothing_and_goes_on_after_a_restart(
    small_disk: Path, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flux_svc.logs.jetstream.wire.ANSWER_S", 0.7)
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * 2**20)
    server = NatsServer(small_disk / "nats")
    server.jetstream = f"max_file_store: {limit}"
    try:
        await asyncio.to_thread(server.start)
        async with node(server.url) as log:
            acknowledged: list[int] = []
            told: AitherError | None = None
            sent: list[list[Event]] = []
            while told is None:
                batch = events(10)
                for one in batch:
                    one.payload.value = bytes(10_000)
                sent.append(batch)
                try:
                    acknowledged += [one.sequence for one in await log.append(batch)]
                except AitherError as error:
                    told = error
            assert told.reason in ("LOG_IO_ERROR", "DISK_FULL")
            assert "room" in told.message
            with pytest.raises(AitherError) as again:
                await log.append([event()])
            assert again.value.reason == ("LOG_IO_ERROR" if limit == "1GB" else "DISK_FULL")
            assert set(sequences(await read_all(log))) >= set(acknowledged), "reading goes on"
            ballast.unlink()
            await asyncio.to_thread(server.kill)
            server.jetstream = "max_file_store: 1GB"
            await asyncio.to_thread(server.start)
            await until(
                lambda: (
                    log._connection._wire is not None and not log._connection._wire.lost.is_set()
                )
            )
            answers = await append(log, sent[-1])
            assert answers == list(range(answers[0], answers[0] + 10)), "a batch in two pieces"
            stored = await read_all(log)
            assert [one.id for one in stored[: 10 * len(sent)]] == [
                one.id for batch in sent for one in batch
            ]
            assert sequences(stored)[: len(acknowledged)] == acknowledged
    finally:
        server.close()


# NATS itself


@pytest.mark.parametrize("secret", ["", "flux:right@", "flux:r://g@ht@", "token@"])
@pytest.mark.parametrize("scheme", ["", "nats://", "tls://"])
def test_an_address_is_told_without_its_secrets(scheme: str, secret: str) -> None:
    if scheme or "://" not in secret:
        assert without_secrets(f"{scheme}{secret}a.b:4222") == f"{scheme}a.b:4222"


async def test_a_password_that_is_refused_is_told(tmp_path: Path) -> None:
    server = NatsServer(tmp_path / "nats")
    try:
        await asyncio.to_thread(server.start)
        async with node(server.url) as log:
            await log.append(events(3))
            await asyncio.to_thread(server.kill)
            server.more = 'authorization { user: flux, password: "right" }'
            await asyncio.to_thread(server.start, wait=False)
            async with asyncio.timeout(PATIENCE_S):
                while True:
                    with pytest.raises(Unavailable) as refused:
                        await log.append([event()])
                    if "uthorization" in refused.value.message:
                        break
                    await asyncio.sleep(0.02)
            assert refused.value.message.count("cannot be reached") == 1, "told once"
        url = f"nats://flux:right@127.0.0.1:{server.port}"
        async with node(url) as log:
            assert (await log.append([event()]))[0].sequence == 4
            with structlog.testing.capture_logs() as logged:
                await asyncio.to_thread(server.kill)
                for _ in range(2):  # while the connection breaks, and when it is dialled again
                    with pytest.raises(Unavailable) as lost:
                        await log.append([event()])
                    assert f"nats://127.0.0.1:{server.port}" in lost.value.message
                    assert "flux:right" not in str((lost.value.message, lost.value.metadata))
                async with asyncio.timeout(PATIENCE_S):
                    while not any(line["event"] == "nats.not_there" for line in logged):
                        await asyncio.sleep(0.02)
            assert "flux:right" not in str(logged)
    finally:
        server.close()


@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_a_node_leaves_a_server_that_is_about_to_stop(tmp_path: Path) -> None:
    with nats_cluster(tmp_path) as servers:
        urls = ",".join(server.url for server in servers)
        async with node(urls, plan=StreamPlan(PLAN.name, replicas=3)) as log:
            await log.append(events(3))
            wire = log.wire()
            leaving = next(one for one in servers if one.url == wire.url)
            leaving.signal(signal.SIGUSR2)
            await until(
                lambda: log._connection._wire is not None and log._connection._wire.url != wire.url
            )


@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_a_stopped_nats_and_a_cut_off_node_lose_and_double_nothing(tmp_path: Path) -> None:
    with nats_server(tmp_path) as server:
        async with (
            Proxy(server.port) as proxy,
            node(server.url) as near,
            node(f"nats://127.0.0.1:{proxy.port}") as far,
        ):
            heard: dict[int, list[int]] = {0: [], 1: []}
            near.on_commit(lambda records: heard[0].extend(one.sequence for one in records))
            far.on_commit(lambda records: heard[1].extend(one.sequence for one in records))
            over = asyncio.Event()
            acknowledged: dict[str, int] = {}

            async def publish(log: EventLog, name: str) -> None:
                number = 0
                while not over.is_set():
                    batch = [event(f"s.{name}", source=name, id=str(number + n)) for n in range(5)]
                    number += 5
                    for one, at in zip(batch, await append(log, batch), strict=True):
                        acknowledged[f"{name}/{one.id}"] = at

            publishers = [
                asyncio.create_task(publish(log, f"{n}.{m}"))
                for n, log in enumerate((near, far))
                for m in range(2)
            ]
            for step in range(3):
                await asyncio.sleep(0.5)
                if step % 2:
                    proxy.part()
                    await asyncio.sleep(4.0)
                    proxy.heal()
                else:
                    server.signal(signal.SIGSTOP)
                    await asyncio.sleep(7.0)
                    server.signal(signal.SIGCONT)
            over.set()
            await asyncio.gather(*publishers)
            last_at = max(await append(near, [event()]))
            await until(lambda: heard[0][-1:] == heard[1][-1:] == [last_at])
            stored = await read_all(far, max_events=4096)
            places = {f"{one.source}/{one.id}": one.sequence for one in stored}
            assert len(places) == len(stored), "an event is stored twice"
            assert acknowledged.items() <= places.items()
            assert heard[0] == heard[1] == sequences(stored)
            assert near.epoch == far.epoch
            assert await last(near, bool) == await last(far, bool)
