"""What `aither status` finds: every service asked at the same time, each within its deadline."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from aither.flux.v1.flux_service_pb2 import (
    GetLastRequest,
    GetStreamInfoRequest,
    GetStreamInfoResponse,
)
from aither.flux.v1.flux_service_pb2_grpc import FluxServiceStub
from aither.pulse.v1.pulse_service_pb2 import ListTargetsRequest
from aither.pulse.v1.pulse_service_pb2_grpc import PulseServiceStub
from aither.pulse.v1.target_pb2 import (
    TARGET_STATE_UNKNOWN,
    TARGET_STATE_UP,
    TargetState,
    TargetStatus,
)
from aither.runtime.v1.runtime_events_pb2 import ServiceStarted
from aither_cli.dialing import health
from aither_cli.payloads import as_json, printable
from aither_cli.rendering import plain_name
from aither_cli.services import Place
from aither_sdk.channels import open_channel

_TIMEOUT_S = 2.0
SERVING = health_pb2.HealthCheckResponse.SERVING
READY, NOT_READY, STALLED, NOT_REACHED = "ready", "not ready", "stalled", "not reached"


@dataclass(frozen=True, slots=True)
class ServiceFinding:
    """One service."""

    name: str
    state: str
    """READY; NOT_READY: alive, but starting, draining or without what it needs; STALLED: its event
    loop does not move; NOT_REACHED: nobody answers at its health address."""
    address: str
    health_address: str
    pid: int | None = None
    """As the service told when it started. None: it did not, or its words cannot be had."""
    version: str = ""

    @property
    def reached(self) -> bool:
        return self.state != NOT_REACHED


@dataclass(frozen=True, slots=True)
class Survey:
    """All findings; what could not be had is None."""

    services: Sequence[ServiceFinding]
    stream: GetStreamInfoResponse | None
    targets: Sequence[TargetStatus] | None

    @property
    def reached(self) -> bool:
        return any(service.reached for service in self.services)

    @property
    def well(self) -> bool:
        ready = all(service.state == READY for service in self.services)
        log_known = self.stream is not None or all(one.name != "flux" for one in self.services)
        return ready and log_known and not self.unwell() and not self.log_trouble

    @property
    def log_trouble(self) -> str:
        """Why the log takes no events; "" where it does, or where that is not known."""
        return "" if self.stream is None else printable(self.stream.append_error.message)

    def unwell(self) -> list[TargetStatus]:
        """Targets that are neither up nor undecided."""
        good = (TARGET_STATE_UP, TARGET_STATE_UNKNOWN)
        return [status for status in self.targets or () if status.state not in good]

    def table(self) -> tuple[Sequence[str], list[Sequence[str]]]:
        rows: list[Sequence[str]] = [
            (
                service.name,
                service.state,
                service.address or "-",
                service.health_address,
                str(service.pid or "-"),
                service.version or "-",
            )
            for service in self.services
        ]
        return ("service", "state", "address", "health", "pid", "version"), rows

    def lines(self) -> list[str]:
        """The log and the fleet, in words."""
        lines = []
        if self.stream is not None:
            info = self.stream
            lines.append(
                f"log      {info.log}: {info.events} events ({info.bytes} bytes), sequences "
                f"{info.first_sequence} to {info.last_sequence}, {info.subjects} subjects, "
                f"{info.subscription_count} subscribers"
            )
            if self.log_trouble:
                lines.append(f"  it takes no events: {self.log_trouble}")
        elif any(service.name == "flux" and service.reached for service in self.services):
            lines.append(f"log      not known: Flux did not answer within {_TIMEOUT_S:g} s")
        if self.targets is not None:
            counts = Counter(plain_name(TargetState, status.state) for status in self.targets)
            told = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
            lines.append(f"targets  {told or 'none'}")
            lines += [f"  {s.target.name} is {_reason(s)}" for s in self.unwell()]
        return lines

    def as_json(self) -> dict[str, Any]:
        unwell = [status.target.name for status in self.unwell()]
        targets = None
        if self.targets is not None:
            targets = {"down": unwell, "all": [as_json(status) for status in self.targets]}
        return {
            "well": self.reached and self.well,
            "services": [asdict(service) for service in self.services],
            "stream": None if self.stream is None else as_json(self.stream),
            "targets": targets,
        }


async def take_survey(places: Sequence[Place], flux_address: str) -> Survey:
    """Never raises for what does not answer: that is a finding. Takes about 2 s at the most."""
    pulse = next((place.address for place in places if place.name == "pulse"), "")
    async with asyncio.TaskGroup() as group:
        healths = [group.create_task(_state(place)) for place in places]
        flux = group.create_task(_ask_flux(flux_address))
        targets = group.create_task(_ask_pulse(pulse)) if pulse else None
    stream, started = flux.result()
    findings = []
    for place, task in zip(places, healths, strict=True):
        said = started.get(place.name)
        # Words of a run that is over say nothing about the one that should be there.
        current = said is not None and task.result() != NOT_REACHED
        pid = said.pid if said is not None and current else None
        version = printable(said.version) if said is not None and current else ""
        findings.append(
            ServiceFinding(
                place.name, task.result(), place.address, place.health_address, pid, version
            )
        )
    return Survey(findings, stream, None if targets is None else targets.result())


async def _state(place: Place) -> str:
    channel = open_channel(place.health_address)
    try:
        readiness = await health(channel, "readiness", _TIMEOUT_S)
        if readiness == SERVING:
            return READY
        if readiness is None:
            return NOT_REACHED
        alive = await health(channel, "liveness", _TIMEOUT_S)
        return NOT_READY if alive in (SERVING, None) else STALLED
    finally:
        await channel.close()


async def _ask_flux(
    address: str,
) -> tuple[GetStreamInfoResponse | None, dict[str, ServiceStarted]]:
    channel = open_channel(address)
    flux = FluxServiceStub(channel)
    info: GetStreamInfoResponse | None = None
    started: dict[str, ServiceStarted] = {}
    try:
        info = await flux.GetStreamInfo(GetStreamInfoRequest(), timeout=_TIMEOUT_S)
        request = GetLastRequest(filters=["runtime.*.started"])
        for event in (await flux.GetLast(request, timeout=_TIMEOUT_S)).events:
            news = ServiceStarted()
            if event.payload.Unpack(news):
                started[news.service] = news
    except grpc.aio.AioRpcError:
        pass  # what is missing is shown as missing
    finally:
        await channel.close()
    return info, started


async def _ask_pulse(address: str) -> Sequence[TargetStatus] | None:
    channel = open_channel(address)
    try:
        request = ListTargetsRequest()
        response = await PulseServiceStub(channel).ListTargets(request, timeout=_TIMEOUT_S)
        return list(response.targets)
    except grpc.aio.AioRpcError:
        return None
    finally:
        await channel.close()


def _reason(status: TargetStatus) -> str:
    told = plain_name(TargetState, status.state)
    if status.root_cause:
        told += f" because of {status.root_cause}"
    if status.HasField("last_result") and status.last_result.message:
        told += f": {status.last_result.message}"
    return printable(told)
