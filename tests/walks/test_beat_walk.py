"""Real HTTP, TCP and gRPC servers are killed and paused; a subscriber hears of it in time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aither.pulse.v1 import pulse_events_pb2, pulse_service_pb2_grpc, target_pb2
from aither.pulse.v1 import pulse_service_pb2 as pb
from aither_sdk.channels import open_channel
from aither_sdk.subscriber import Subscriber
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
        self._more = asyncio.Condition()

    async def follow(self, flux: ServiceProcess) -> None:
        async with Subscriber(flux.address, ["pulse.target.*.changed"]) as subscriber:
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


@asynccontextmanager
async def watched_fleet(
    folder: Path,
) -> AsyncIterator[tuple[ServiceProcess, ServiceProcess, list[Peer], Changes]]:
    with peers("http", "tcp", "grpc") as (web, port, rpc):
        fleet = folder / "fleet.yaml"
        fleet.write_text(FLEET.format(web=web.port, port=port.port, rpc=rpc.port))
        with running("flux_svc", folder / "flux") as flux:
            changes = Changes()
            following = asyncio.create_task(changes.follow(flux))
            address = {"AITHER_FLUX__ADDRESS": flux.address, "AITHER_PULSE__FLEET": str(fleet)}
            with running("pulse_svc", folder / "pulse", **address) as pulse:
                for name in ("web", "port", "rpc"):
                    await changes.wait_for(name, "UP", 0, 30)
                yield flux, pulse, [web, port, rpc], changes
            following.cancel()
            await asyncio.wait([following])


async def test_a_killed_and_a_paused_server_are_told_within_the_promise(tmp_path: Path) -> None:
    async with watched_fleet(tmp_path) as (_, pulse, (web, _port, rpc), changes):
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


async def test_what_depends_on_the_dead_is_unreachable_not_down(tmp_path: Path) -> None:
    async with watched_fleet(tmp_path) as (_, pulse, (web, port, _rpc), changes):
        begin_s = time.monotonic()
        port.kill()
        await changes.wait_for("port", "DOWN", begin_s, 30)
        web.kill()
        await changes.wait_for("web", "UNREACHABLE", begin_s, 30)
        assert (await list_targets(pulse))["web"].root_cause == "port"


async def test_a_watcher_hears_the_state_and_then_each_change(tmp_path: Path) -> None:
    async with (
        watched_fleet(tmp_path) as (_, pulse, (web, _port, _rpc), _changes),
        open_channel(pulse.address) as channel,
    ):
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


async def test_pulse_goes_on_without_flux_and_tells_afterwards(tmp_path: Path) -> None:
    async with watched_fleet(tmp_path) as (flux, pulse, (web, _port, _rpc), changes):
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
