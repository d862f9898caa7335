"""The whole of Pulse in its own process, over real gRPC, with real targets."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from aither.flux.v1.event_pb2 import Event
from aither.pulse.v1 import pulse_service_pb2 as pb
from aither.pulse.v1.pulse_events_pb2 import FleetChanged, PulseTick, TargetChanged
from aither.pulse.v1.pulse_service_pb2_grpc import PulseServiceStub
from aither.pulse.v1.target_pb2 import Check, HeartbeatCheck, Target, TargetState, TcpCheck
from aither.pulse.v1.vitals_pb2 import HostVitals
from aither_sdk.errors import (
    AitherError,
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unavailable,
)
from aither_sdk.rpc_status import from_rpc_error
from pulse_svc.verdict import DOWN, UNKNOWN, UNREACHABLE, UP
from tests.ports import free_ports
from tests.processes import ServiceProcess
from tests.pulse.peers import Peer, peers
from tests.sdk.flux_stub import FluxStub
from tests.stopwatch import Stopwatch

LIMIT_S = 20.0


class Pulse:
    """A running Pulse, the Flux it publishes to, and a client."""

    def __init__(self, process: ServiceProcess, flux: FluxStub, channel: grpc.aio.Channel) -> None:
        self.process = process
        self.flux = flux
        self.stub: Any = PulseServiceStub(channel)

    async def until(self, holds: Callable[[], bool]) -> float:
        """Seconds until it held, of what Flux was told."""
        watch = Stopwatch()
        async with asyncio.timeout(LIMIT_S):
            while not holds():
                await asyncio.sleep(0.005)
        return watch.calm_s

    def told(self, kind: type[Any]) -> list[Any]:
        """All payloads of this type, in order."""
        payloads = []
        for event in self.flux.log:
            payload = kind()
            if event.payload.Unpack(payload):
                payloads.append(payload)
        return payloads

    def is_told(self, name: str, state: TargetState.ValueType) -> bool:
        """Whether the newest change of the target is to this state."""
        states = [change.to_state for change in self.told(TargetChanged) if change.name == name]
        return bool(states) and states[-1] == state

    async def refusal(self, call: Any) -> AitherError:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        return from_rpc_error(caught.value)


@asynccontextmanager
async def pulse(tmp_path: Path, fleet: str = "targets: []\n") -> AsyncIterator[Pulse]:
    path = tmp_path / "fleet.yaml"
    path.write_text(fleet)
    async with FluxStub() as flux:
        environment = {"AITHER_FLUX__ADDRESS": flux.address, "AITHER_PULSE__FLEET": str(path)}
        process = ServiceProcess("pulse_svc", tmp_path / "data", environment)
        try:
            await asyncio.to_thread(process.start)
            async with grpc.aio.insecure_channel(process.address) as channel:
                yield Pulse(process, flux, channel)
        finally:
            await asyncio.to_thread(process.close)


def fleet_of(*servers: Peer) -> str:
    """Interval 500 ms, fall 2: the promise is 2 s."""
    lines = ["targets:"]
    for peer in servers:
        where = f"http://{peer.address}/" if peer.kind == "http" else peer.address
        key = "url" if peer.kind == "http" else "address"
        lines += [
            f"  - name: {peer.kind}-server",
            f'    check: {{kind: {peer.kind}, {key}: "{where}"}}',
            "    interval: 500ms",
            "    timeout: 400ms",
        ]
    return "\n".join(lines) + "\n"


async def test_killed_and_stopped_targets_are_told_in_time_and_recover(tmp_path: Path) -> None:
    promise_s = 2 * 0.5 + 1
    with peers("http", "tcp", "grpc") as (web, raw, rpc):
        async with pulse(tmp_path, fleet_of(web, raw, rpc)) as it:
            names = ("http-server", "tcp-server", "grpc-server")
            await it.until(lambda: all(it.is_told(name, UP) for name in names))
            raw.kill()
            killed = asyncio.create_task(it.until(lambda: it.is_told("tcp-server", DOWN)))
            web.stop()
            rpc.stop()
            stopped = [
                asyncio.create_task(it.until(lambda name=name: it.is_told(name, DOWN)))  # type: ignore[misc]
                for name in ("http-server", "grpc-server")
            ]
            for took_s in await asyncio.gather(killed, *stopped):
                assert took_s <= promise_s
            web.go_on()
            rpc.go_on()
            raw.start()
            await asyncio.to_thread(raw.wait)
            took_s = await it.until(lambda: all(it.is_told(name, UP) for name in names))
            assert took_s <= promise_s + 1.0, "of which one for the port to be bound again"
            changes = [c for c in it.told(TargetChanged) if c.name == "grpc-server"]
            assert [c.to_state for c in changes] == [UP, DOWN, UP]
            assert changes[1].result.message
            ticks = it.told(PulseTick)
            assert [t.tick for t in ticks] == list(range(1, len(ticks) + 1))
            assert {t.events_dropped for t in ticks} == {0}
            assert it.told(HostVitals)
            # One batch a tick, and at most one more for each burst of changes; on a busy machine
            # Pulse also tells that it stood still.
            stalls = [event for event in it.flux.log if event.subject == "runtime.pulse.stall"]
            bursts = len(it.told(TargetChanged)) + len(stalls)
            assert len(it.flux.batches) <= len(ticks) + bursts + 4
            assert it.process.terminate() == 0


async def test_flux_away_delays_nothing_and_changes_are_told_when_it_is_back(
    tmp_path: Path,
) -> None:
    with peers("tcp") as (raw,):
        async with pulse(tmp_path, fleet_of(raw)) as it:
            await it.until(lambda: it.is_told("tcp-server", UP))
            await it.flux.stop()
            raw.kill()
            async with asyncio.timeout(LIMIT_S):
                while True:
                    watch = Stopwatch()
                    response = await it.stub.ListTargets(pb.ListTargetsRequest(states=[DOWN]))
                    assert watch.calm_s < 1.0
                    if response.targets:
                        break
                    await asyncio.sleep(0.02)
            refused = await it.refusal(
                it.stub.Emit(pb.EmitRequest(events=[Event(id="1", source="x", subject="a.b")]))
            )
            assert isinstance(refused, Unavailable)
            assert refused.retry_after_s == 1.0
            assert "cannot be reached (Connection refused)" in refused.message
            assert await asyncio.to_thread(it.process.health, "liveness") == "SERVING"
            await it.flux.start()
            await it.until(lambda: it.is_told("tcp-server", DOWN))
            last = it.told(PulseTick)[-1].tick
            await it.until(lambda: it.told(PulseTick)[-1].tick > last)
            assert it.told(PulseTick)[-1].events_dropped == 0


async def test_the_fleet_file_is_followed_and_a_bad_change_refused(tmp_path: Path) -> None:
    with peers("tcp") as (raw,):
        async with pulse(tmp_path, fleet_of(raw)) as it:
            path = tmp_path / "fleet.yaml"
            good = path.read_text()
            path.write_text(good.replace("kind: tcp", "kind: tpc"))
            await it.until(lambda: any(change.faults for change in it.told(FleetChanged)))
            (fault,) = it.told(FleetChanged)[-1].faults
            assert fault == (
                f'{path}:3: targets[0].check.kind: "tpc" is not a kind of check; use one of '
                "grpc, http, tcp, process, heartbeat"
            )
            listed = await it.stub.ListTargets(pb.ListTargetsRequest())
            assert [status.target.name for status in listed.targets] == ["tcp-server"]
            path.write_text(good + '  - {name: more, check: {kind: tcp, address: "127.0.0.1:1"}}\n')
            await it.until(lambda: it.is_told("more", DOWN))


def heartbeat(name: str, *depends_on: str) -> Target:
    return Target(
        name=name,
        check=Check(heartbeat=HeartbeatCheck(grace_duration=Duration(seconds=5))),
        interval=Duration(nanos=100_000_000),
        rise=1,
        fall=1,
        depends_on=depends_on,
    )


async def test_targets_register_beat_are_watched_and_go(tmp_path: Path) -> None:
    async with pulse(tmp_path) as it:
        never_read = it.stub.WatchTargets(pb.WatchTargetsRequest())
        watch = it.stub.WatchTargets(pb.WatchTargetsRequest())
        first = await watch.read()
        assert first.snapshot_end.targets == 0
        for target in (heartbeat("worker"), heartbeat("helper", "worker")):
            response = await it.stub.RegisterTarget(pb.RegisterTargetRequest(target=target))
            assert response.status.state == UNKNOWN
            assert response.status.target.timeout.nanos == 80_000_000
            news = await watch.read()
            assert (news.status.target.name, news.status.state) == (target.name, UNKNOWN)

        async def beat(name: str, *, ok: bool) -> None:
            await it.stub.Beat(pb.BeatRequest(name=name, ok=ok, message="says so"))

        async def next_states(count: int) -> dict[str, int]:
            updates = [(await watch.read()).status for _ in range(count)]
            return {status.target.name: status.state for status in updates}

        await beat("worker", ok=True)
        assert await next_states(1) == {"worker": UP}
        await beat("worker", ok=False)
        assert await next_states(1) == {"worker": DOWN}
        await beat("helper", ok=False)
        assert await next_states(1) == {"helper": UNREACHABLE}
        await beat("worker", ok=True)
        assert await next_states(2) == {"worker": UP, "helper": UNKNOWN}
        listed = await it.stub.ListTargets(pb.ListTargetsRequest(names=["worker"]))
        assert listed.targets[0].last_result.message == "says so"
        await it.stub.DeregisterTarget(pb.DeregisterTargetRequest(name="worker"))
        async with asyncio.timeout(LIMIT_S):
            while (news := await watch.read()).removed != "worker":
                assert news.status.target.name == "helper"
        vitals = await it.stub.GetVitals(pb.GetVitalsRequest())
        assert vitals.host.host == socket.gethostname()
        emitted = await it.stub.Emit(
            pb.EmitRequest(events=[Event(id="1", source="x", subject="a.b")])
        )
        assert emitted.results[0].sequence
        assert it.flux.log[emitted.results[0].sequence - 1].subject == "a.b"
        await asyncio.to_thread(it.process.terminate)
        refusal = await it.refusal(read_to_the_end(watch))
        assert isinstance(refusal, Unavailable)
        never_read.cancel()


async def read_to_the_end(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def test_every_wrong_request_gets_its_typed_error(tmp_path: Path) -> None:
    filed = 'targets:\n  - {name: filed, check: {kind: tcp, address: "127.0.0.1:1"}}\n'
    async with pulse(tmp_path, filed) as it:
        bad = Target(name="No", layer=12, depends_on=["nobody"])
        bad.interval.seconds = 7200
        refusal = await it.refusal(it.stub.RegisterTarget(pb.RegisterTargetRequest(target=bad)))
        assert isinstance(refusal, InvalidArgument)
        assert {v.field for v in refusal.violations} == {
            "target.name",
            "target.layer",
            "target.interval",
            "target.check",
            "target.depends_on[0]",
        }
        taken = Target(name="filed", check=Check(tcp=TcpCheck(address="x:1")))
        too_long = pb.BeatRequest(name="filed", message="x" * 513)
        gone = pb.DeregisterTargetRequest(name="x" * 9999)
        for call, expected in (
            (it.stub.RegisterTarget(pb.RegisterTargetRequest()), InvalidArgument),
            (it.stub.RegisterTarget(pb.RegisterTargetRequest(target=taken)), AlreadyExists),
            (
                it.stub.DeregisterTarget(pb.DeregisterTargetRequest(name="filed")),
                FailedPrecondition,
            ),
            (it.stub.DeregisterTarget(gone), NotFound),
            (it.stub.Beat(pb.BeatRequest(name="nobody")), NotFound),
            (it.stub.Beat(pb.BeatRequest(name="filed")), FailedPrecondition),
            (it.stub.Beat(too_long), InvalidArgument),
            (
                it.stub.ListTargets(
                    pb.ListTargetsRequest(states=[TargetState.TARGET_STATE_UNSPECIFIED])
                ),
                InvalidArgument,
            ),
        ):
            refusal = await it.refusal(call)
            assert isinstance(refusal, expected), refusal
            assert len(refusal.message) < 500


def start_and_end(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    process = ServiceProcess("pulse_svc", tmp_path / "data", environment)
    return subprocess.run(
        [sys.executable, "-m", "pulse_svc"],
        env=process.environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def test_a_bad_fleet_file_ends_the_start_with_its_faults(tmp_path: Path) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text("targets:\n  - {name: A, check: {kind: tcp}}\n")
    ended = start_and_end(tmp_path, AITHER_PULSE__FLEET=str(path))
    assert ended.returncode == 2
    assert f'{path}:2: targets[0].name: "A" is not a name' in ended.stderr
    assert f"{path}:2: targets[0].check.address: missing" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_taken_port_ends_the_start_with_one_clear_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (flux,) = free_ports(1)
        ended = start_and_end(
            tmp_path, AITHER_PULSE__PORT=str(port), AITHER_FLUX__ADDRESS=f"127.0.0.1:{flux}"
        )
    assert ended.returncode == 2
    assert f"pulse: cannot listen at 127.0.0.1:{port}" in ended.stderr
    assert "Traceback" not in ended.stderr
