"""`aither consumers` against a real Flux."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from aither.flux.v1 import consumer_service_pb2 as cs
from aither.flux.v1 import consumer_service_pb2_grpc, flux_service_pb2_grpc
from aither.flux.v1 import flux_service_pb2 as pb
from aither_cli.main import run
from aither_sdk.events import new_event
from tests.processes import ServiceProcess, running

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    with running("flux_svc", tmp_path_factory.mktemp("flux"), AITHER_FLUX__LOG="memory") as process:
        yield process


def parking(flux: ServiceProcess, name: str, events: int) -> list[int]:
    """A group with so many events, all of them parked; answers their sequences."""

    async def work() -> list[int]:
        async with grpc.aio.insecure_channel(flux.address) as channel:
            bus: Any = flux_service_pb2_grpc.FluxServiceStub(channel)
            groups: Any = consumer_service_pb2_grpc.ConsumerServiceStub(channel)
            consumer = cs.Consumer(name=name, filters=[f"{name}.>"])
            await groups.CreateConsumer(cs.CreateConsumerRequest(consumer=consumer))
            batch = [new_event(f"{name}.a", {"n": n}, source="t") for n in range(events)]
            published = await bus.Publish(pb.PublishRequest(events=batch))
            call = bus.Consume()
            opening = pb.OpenConsume(consumer=name, credit=pb.Credit(events=events, bytes=2**20))
            await call.write(pb.ConsumeRequest(open=opening))
            ids: list[str] = []
            while len(ids) < events:
                ids += [one.ack_id for one in (await call.read()).deliveries]
            park = pb.Nack(ack_ids=ids, action=pb.NACK_ACTION_PARK, reason="no such customer")
            await call.write(pb.ConsumeRequest(nack=park))
            async with asyncio.timeout(20):
                while True:
                    asked = await groups.GetConsumer(cs.GetConsumerRequest(name=name))
                    if asked.state.parked_events == events:
                        break
                    await asyncio.sleep(0.01)
            call.cancel()
            return [one.sequence for one in published.results]

    return asyncio.run(work())


def test_groups_are_listed_and_shown(flux: ServiceProcess, capsys: Captured) -> None:
    parking(flux, "seen", 2)
    assert run(["consumers", "list", "--flux", flux.address]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["group", "checkpoint", "lag", "out", "retrying", "parked", "members"]
    (row,) = [one.split() for one in rows if one.startswith("seen")]
    assert row[3:6] == ["0", "0", "2"]
    assert run(["consumers", "show", "seen", "--flux", flux.address]) == 0
    out = capsys.readouterr().out
    assert "0 out, 0 retrying, 2 parked, 0 missed" in out
    assert "30 s to acknowledge" in out
    assert run(["consumers", "show", "seen", "--json", "--flux", flux.address]) == 0
    assert json.loads(capsys.readouterr().out)["state"]["parkedEvents"] == 2


def test_parked_events_are_listed_replayed_and_deleted(
    flux: ServiceProcess, capsys: Captured
) -> None:
    first, second, third = parking(flux, "aside", 3)
    assert run(["consumers", "parked", "aside", "--flux", flux.address]) == 0
    out = capsys.readouterr().out
    assert out.count("1 delivery: no such customer") == 3
    assert f"#{first} aside.a t" in out
    assert run(["consumers", "replay", "aside", str(first), "9999", "--flux", flux.address]) == 0
    assert capsys.readouterr().out == "replayed 1; 1 of those you named is not parked\n"
    assert run(["consumers", "delete-parked", "aside", "--flux", flux.address]) == 2
    assert "say which" in capsys.readouterr().err
    arguments = ["consumers", "delete-parked", "aside", "--flux", flux.address]
    assert run([*arguments, str(second)]) == 0
    assert capsys.readouterr().out == "deleted 1\n"
    assert run(["consumers", "parked", "aside", "--json", "--flux", flux.address]) == 0
    assert json.loads(capsys.readouterr().out)["event"]["sequence"] == str(third)
    assert run([*arguments, "--all"]) == 2
    told = capsys.readouterr().err
    assert "aside has 1" in told
    assert "say --yes" in told
    assert run([*arguments, "--all", "--yes"]) == 0
    assert capsys.readouterr().out == "deleted 1\n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_group_is_moved_and_deleted(
    flux: ServiceProcess, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    parking(flux, "moved", 1)
    seek = ["consumers", "seek", "moved", "--flux", flux.address]
    assert run([*seek, "--after", "0"]) == 0
    assert capsys.readouterr().out == "moved goes on behind 0\n"
    assert run([*seek, "--at", "2020-01-01T00:00:00Z"]) == 0
    assert capsys.readouterr().out == "moved goes on behind 0\n"
    for wrong in ([], ["--after", "1", "--at", "2020-01-01"], ["--at", "noon"]):
        assert run([*seek, *wrong]) == 2
        assert capsys.readouterr().err.startswith("aither: ")
    delete = ["consumers", "delete", "moved", "--flux", flux.address]
    assert run(delete) == 2, "nobody can be asked"
    told = capsys.readouterr().err
    assert "its checkpoint 0 (" in told
    assert "1 parked event" in told
    assert "say --yes" in told
    for answer, code in (("n\n", 1), ("", 1), ("y\n", 0)):
        monkeypatch.setattr("sys.stdin", Terminal(answer))
        assert run(delete) == code
        err = capsys.readouterr().err
        assert "Go on? [y/N]" in err
        assert ("nothing was changed" in err) is bool(code)
    monkeypatch.undo()
    parking(flux, "scripted", 1)
    assert run(["consumers", "delete", "scripted", "--yes", "--flux", flux.address]) == 0
    capsys.readouterr()
    assert run(["consumers", "show", "moved", "--flux", flux.address]) == 1
    assert 'no group "moved"' in capsys.readouterr().err
