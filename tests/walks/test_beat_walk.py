"""Real HTTP, TCP and gRPC servers are killed and paused; a subscriber hears of it in time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import pytest

from aither.pulse.v1 import pulse_events_pb2, pulse_service_pb2_grpc, target_pb2
from aither.pulse.v1 import pulse_service_pb2 as pb
from aither_sdk.channels import open_channel
from aither_sdk.subscribing.subscriber import Subscriber
from tests.processes import ServiceProcess, running
from tests.pulse.peers import Peer, peers
from tests.stopwatch import Stopwatch

INTERVAL_S = 1.0
FALL = 2
PROMISE_S = FALL * INTERVAL_S + 1.0
SLACK_S = 0.5
"""Between the test's own clock and what it sets off: signals, restarts."""

FLEET = """
targets:
  - name: web
    layer: 3
    check: {{kind: http, url: "http://127.0.0.1:{web}/"}}
    depends_on: [port]
  - {{name: port, layer: 1, check: {{kind: tcp, address: "127.0.0.1:{port}"}}}}
  - {{name: rpc, check: {{kind: grpc, address: "127.0.0.1:{rpc}"}}, interval: 1s, rise: 2, fall: 2}}
"""


class Changes:
    """`pulse.target.*.changed` as a subscriber hears them."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, str, float]] = []
        self.begun = asyncio.Event()
        self._more = asyncio.Condition()

    async def follow(self, flux: ServiceProcess) -> None:
        async with Subscriber(flux.address, ["pulse.target.*.changed"]) as subscriber:
            await subscriber.until_started(timeout_s=20)
            self.begun.set()
            async for event in subscriber:
                change = pulse_events_pb2.TargetChanged()
                assert event.payload.Unpack(change)
                state = target_pb2.TargetState.Name(change.to_state).removeprefix("TARGET_STATE_")
                async with self._more:
                    self.heard.append((change.name, state, time.monotonic()))
                    self._more.notify_all()

    async def wait_for(self, name: str, state: str, since_s: float, limit_s: float) -> float:
        """Seconds from `since_s` until the change was heard."""

        def when() -> float | None:
            found = [t for n, s, t in self.heard if (n, s) == (name, state) and t >= since_s]
            return found[0] if found else None

        async with asyncio.timeout(limit_s), self._more:
            await self._more.wait_for(lambda: when() is not None)
        heard_s = when()
        assert heard_s is not None
        return heard_s - since_s


class Fleet(NamedTuple):
    flux: ServiceProcess
    pulse: ServiceProcess
    web: Peer
    port: Peer
    rpc: Peer


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Shared: each test begins by having its peers brought back to life."""
    folder = tmp_path_factory.mktemp("fleet")
    with peers("http", "tcp", "grpc") as (web, port, rpc):
        file = folder / "fleet.yaml"
        file.write_text(FLEET.format(web=web.port, port=port.port, rpc=rpc.port))
        with running("flux_svc", folder / "flux") as flux:
            address = {"AITHER_FLUX__ADDRESS": flux.address, "AITHER_PULSE__FLEET": str(file)}
            with running("pulse_svc", folder / "pulse", **address) as pulse:
                yield Fleet(flux, pulse, web, port, rpc)


@asynccontextmanager
async def all_well(fleet: Fleet) -> AsyncIterator[Changes]:
    """What changes from a moment on in which every target is UP."""
    for peer in (fleet.web, fleet.port, fleet.rpc):
        if not peer.runs:
            peer.start()
            await asyncio.to_thread(peer.wait)
    async with asyncio.timeout(30):
        while {status.state for status in (await list_targets(fleet.pulse)).values()} != {
            target_pb2.TARGET_STATE_UP
        }:
            await asyncio.sleep(0.1)
    changes = Changes()
    following = asyncio.create_task(changes.follow(fleet.flux))
    try:
        await changes.begun.wait()
        yield changes
    finally:
        following.cancel()
        await asyncio.wait([following])


async def test_a_killed_and_a_paused_server_are_told_within_the_promise(fleet: Fleet) -> None:
    pulse, web, rpc = fleet.pulse, fleet.web, fleet.rpc
    async with all_well(fleet) as changes:
        begin_s, watch = time.monotonic(), Stopwatch()
        web.kill()
        rpc.stop()
        for name in ("web", "rpc"):
            await changes.wait_for(name, "DOWN", begin_s, 30)
        assert watch.calm_s <= PROMISE_S + SLACK_S

        targets = await list_targets(pulse)
        assert targets["web"].last_result.failure == target_pb2.CHECK_FAILURE_REFUSED
        assert targets["rpc"].last_result.failure == target_pb2.CHECK_FAILURE_TIMEOUT
        assert targets["port"].state == target_pb2.TARGET_STATE_UP

        begin_s = time.monotonic()
        web.start()
        web.wait()
        rpc.go_on()
        for name in ("web", "rpc"):
            await changes.wait_for(name, "UP", begin_s, 30)


async def test_what_depends_on_the_dead_is_unreachable_not_down(fleet: Fleet) -> None:
    pulse, web, port = fleet.pulse, fleet.web, fleet.port
    async with all_well(fleet) as changes:
        begin_s = time.monotonic()
        port.kill()
        await changes.wait_for("port", "DOWN", begin_s, 30)
        web.kill()
        await changes.wait_for("web", "UNREACHABLE", begin_s, 30)
        assert (await list_targets(pulse))["web"].root_cause == "port"


async def test_a_watcher_hears_the_state_and_then_each_change(fleet: Fleet) -> None:
    web = fleet.web
    async with all_well(fleet), open_channel(fleet.pulse.address) as channel:
        stub: Any = pulse_service_pb2_grpc.PulseServiceStub(channel)
        watch = stub.WatchTargets(pb.WatchTargetsRequest())
        names = []
        async with asyncio.timeout(30):
            async for update in watch:
                if update.WhichOneof("update") == "snapshot_end":
                    break
                names.append(update.status.target.name)
            assert sorted(names) == ["port", "rpc", "web"]
            web.kill()
            async for update in watch:
                if update.status.state == target_pb2.TARGET_STATE_DOWN:
                    assert update.status.target.name == "web"
                    break
        watch.cancel()


async def test_pulse_goes_on_without_flux_and_tells_afterwards(fleet: Fleet) -> None:
    flux, pulse, web = fleet.flux, fleet.pulse, fleet.web
    async with all_well(fleet) as changes:
        await asyncio.to_thread(flux.kill)
        web.kill()
        async with asyncio.timeout(30):
            while (await list_targets(pulse))["web"].state != target_pb2.TARGET_STATE_DOWN:
                await asyncio.sleep(0.1)
        await asyncio.to_thread(flux.start)
        await changes.wait_for("web", "DOWN", 0, 30)


async def list_targets(pulse: ServiceProcess) -> dict[str, target_pb2.TargetStatus]:
    async with open_channel(pulse.address) as channel:
        stub: Any = pulse_service_pb2_grpc.PulseServiceStub(channel)
        answer = await stub.ListTargets(pb.ListTargetsRequest())
        return {status.target.name: status for status in answer.targets}
