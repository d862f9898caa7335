"""Genesis subscribes. It never serves."""

from __future__ import annotations

from pathlib import Path

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from aither.flux.v1.flux_service_pb2 import GetStreamInfoRequest
from aither.flux.v1.flux_service_pb2_grpc import FluxServiceStub
from aither.genesis.v1 import genesis_events_pb2
from tests.genesis.processes import flux, genesis


async def test_genesis_listens_nowhere_and_follows_one_stream(folder: Path) -> None:
    async with flux(folder) as (bus, _), genesis(bus, folder) as service:
        await bus.until("genesis.tick", times=2)

        process = psutil.Process(service.pid)
        connections = process.net_connections(kind="inet")
        assert connections, "it should at least be connected to Flux"
        assert [c for c in connections if c.status == psutil.CONN_LISTEN] == []
        port = int(bus.address.rpartition(":")[2])
        assert {c.raddr.port for c in connections} == {port}
        assert _listening_unix(service.pid) == []

        async with grpc.aio.insecure_channel(bus.address) as channel:
            info = await FluxServiceStub(channel).GetStreamInfo(GetStreamInfoRequest())
        assert [s.client_name for s in info.subscriptions] == ["genesis"]

        health = (await service.said("service.serving"))["health"]
        async with grpc.aio.insecure_channel(health) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            answer = await stub.Check(health_pb2.HealthCheckRequest(), wait_for_ready=True)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        children = {child.pid for child in process.children(recursive=True)}
        port = int(health.rpartition(":")[2])
        holders = {
            c.pid
            for c in psutil.net_connections("tcp")
            if c.status == psutil.CONN_LISTEN and c.laddr and c.laddr.port == port
        }
        assert holders
        assert holders <= children

        last = (await bus.until("genesis.snapshot"))[-1]
        snapshot = genesis_events_pb2.GenesisSnapshot()
        assert last.payload.Unpack(snapshot)
        assert [agent.agent for agent in snapshot.agents] == ["herald"]


def _listening_unix(pid: int) -> list[str]:
    """Unix sockets of the process that accept connections (flag __SO_ACCEPTCON)."""
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        target = str(entry.readlink()) if entry.is_symlink() else ""
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    lines = Path(f"/proc/{pid}/net/unix").read_text().splitlines()[1:]
    rows = [line.split() for line in lines]
    return [row[6] for row in rows if row[6] in inodes and int(row[3], 16) & 0x10000]
