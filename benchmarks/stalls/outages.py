"""The two outages, before and after: the old designs' models, and Aither's services in their place.

Before and after run for the same time, one after the other, and are asked for their health at the
same rate.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import grpc
from google.protobuf.message import Message

from aither.flux.v1.event_pb2 import Event
from aither.flux.v1.flux_service_pb2 import READ_DIRECTION_FORWARD, ReadRequest
from aither.flux.v1.flux_service_pb2_grpc import FluxServiceStub
from aither.genesis.v1.genesis_events_pb2 import GenesisTick
from aither.pulse.v1.pulse_events_pb2 import PulseTick
from aither.runtime.v1.runtime_events_pb2 import LoopStalled, StallCause
from aither_sdk import Publisher, Worker, new_consumer
from aither_sdk.spans import seconds_of
from aither_sdk.stalls.causes import EXCUSED
from benchmarks.outages.neighbours import TARGETS
from benchmarks.outages.old_orchestrator import AGENTS, LLM_S, TICK_S
from benchmarks.peers.base import free_port
from benchmarks.stalls.prober import Answers, probing
from tests.processes import ServiceProcess, running

ASK_EVERY_S = 0.1
_WARM_UP_S = 3.0
"""Not measured: what a start brings."""
_QUESTION = "bench.llm.ask"
_ROOT = Path(__file__).parents[2]


@dataclass
class Found:
    """What one run showed; None: it has no such thing, or it is not counted there."""

    seconds: float
    answers: dict[str, Answers]
    stalls: Mapping[str, int]
    """By service: 100 ms and more, told or suppressed; those of a machine without a CPU to spare
    apart."""
    longest_stall_s: float = 0.0
    counts: dict[str, float] = field(default_factory=dict)
    spans_s: dict[str, list[float]] = field(default_factory=dict)


async def old_heartbeat(seconds: float, folder: Path) -> Found:
    port, neighbours_port = free_port(), free_port()
    async with _python("benchmarks.outages.neighbours", neighbours_port):
        return await _old(
            "benchmarks.outages.old_heartbeat", port, (neighbours_port,), seconds, folder
        )


async def old_orchestrator(seconds: float, folder: Path) -> Found:
    return await _old("benchmarks.outages.old_orchestrator", free_port(), (), seconds, folder)


async def new_heartbeat(seconds: float, folder: Path) -> Found:
    """Flux and Pulse, who looks at the same 48 HTTP targets every second."""
    neighbours_port = free_port()
    async with _python("benchmarks.outages.neighbours", neighbours_port):
        await _until_open(neighbours_port)
        fleet = folder / "fleet.json"
        url = f"http://127.0.0.1:{neighbours_port}/target"
        targets = [
            {
                "name": f"service-{number}",
                "interval": "1s",
                "check": {"kind": "http", "url": f"{url}/{number}"},
            }
            for number in range(TARGETS)
        ]
        fleet.write_text(json.dumps({"targets": targets}))  # JSON is YAML
        async with _service("flux_svc", folder / "flux") as flux:
            settings = {"AITHER_FLUX__ADDRESS": flux.address, "AITHER_PULSE__FLEET": str(fleet)}
            async with _service("pulse_svc", folder / "pulse", **settings) as pulse:
                found, events = await _watched(flux, {"pulse": pulse, "flux": flux}, seconds)
    ticks = [tick for _, tick in _of(events, "pulse.tick", PulseTick)]
    said = sum(event.source == "pulse" for event in events)
    found.counts["publishes a tick"] = said / max(1, len(ticks))
    found.counts["checks a tick"] = statistics.mean(tick.checks_completed for tick in ticks)
    found.spans_s["tick late"] = [seconds_of(tick.lag_duration) for tick in ticks]
    return found


async def new_orchestrator(seconds: float, folder: Path) -> Found:
    """Genesis with as many agents; each asks a question on Flux that a worker of a consumer group,
    a process of its own, takes as long to answer as the old one's LLM."""
    agents = folder / "agents"
    agents.mkdir(parents=True)
    for number in range(AGENTS):
        action = {
            **{"id": "ask", "kind": "publish", "weight": 1, "effort": 5, "when": "always"},
            "input": {"subject": _QUESTION, "payload": {"agent": "${agent}"}},
        }
        agent = {
            **{"id": f"agent-{number}", "enabled": True},
            **{"at_most": {"count": 1, "per": "1s"}, "actions": [action]},
        }
        (agents / f"agent-{number}.yaml").write_text(json.dumps(agent))
    (folder / "neurons.yaml").write_text("neurons: []\n")
    async with _service("flux_svc", folder / "flux") as flux:
        settings = {
            "AITHER_FLUX__ADDRESS": flux.address,
            "AITHER_GENESIS__AGENTS": str(agents),
            "AITHER_GENESIS__NEURONS": str(folder / "neurons.yaml"),
            "AITHER_GENESIS__TICK_S": str(TICK_S),
        }
        async with (
            _python("benchmarks.stalls.outages", flux.address),
            _service("genesis_svc", folder / "genesis", **settings) as genesis,
        ):
            found, events = await _watched(flux, {"genesis": genesis}, seconds)
    ticks = [tick for _, tick in _of(events, "genesis.tick", GenesisTick)]
    found.spans_s["tick"] = [seconds_of(tick.tick_duration) for tick in ticks]
    found.spans_s["tick late"] = [seconds_of(tick.lag_duration) for tick in ticks]
    found.counts["dispatches"] = sum(event.subject == _QUESTION for event in events)
    found.counts["answers"] = sum(event.subject == "bench.llm.answer" for event in events)
    return found


async def _old(
    module: str, port: int, arguments: tuple[int, ...], seconds: float, folder: Path
) -> Found:
    result = folder / "result.json"
    async with _python(module, port, *arguments, result) as process:
        await _until_open(port)
        await asyncio.sleep(_WARM_UP_S)
        begin_s = time.monotonic()
        async with probing(ASK_EVERY_S, {"old": f"http://127.0.0.1:{port}"}) as asked:
            await asyncio.sleep(seconds)
            end_s = time.monotonic()
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(30):
            await process.wait()
    told = json.loads(result.read_text())
    stalls = told["spans"].pop("stall", [])
    return Found(
        told["seconds"],
        {"old": asked.between("old", begin_s, end_s)},
        {"old": len(stalls)},
        max(stalls, default=0.0),
        {**told["counts"], **{f"most {key}": value for key, value in told["most"].items()}},
        told["spans"],
    )


async def _watched(
    flux: ServiceProcess, services: Mapping[str, ServiceProcess], seconds: float
) -> tuple[Found, list[Event]]:
    """Health of the services over the time, and the events that were recorded in it."""
    await asyncio.sleep(_WARM_UP_S)
    begin_s, begin_unix_s = time.monotonic(), time.time()
    urls = {name: f"grpc://{service.health_address}" for name, service in services.items()}
    # As often for each as the old one was asked.
    async with probing(ASK_EVERY_S, urls) as asked:
        await asyncio.sleep(seconds)
        end_s, end_unix_s = time.monotonic(), time.time()
    await asyncio.sleep(1)  # an open stall's end
    events = [
        event
        for event in await _events(flux.address)
        if begin_unix_s <= event.recorded_time.ToNanoseconds() / 1e9 < end_unix_s
    ]
    answers = {name: asked.between(name, begin_s, end_s) for name in urls}
    found = Found(end_s - begin_s, answers, {}, 0.0)
    found.stalls, found.longest_stall_s = _stalls_in(events)
    return found, events


def _stalls_in(events: list[Event]) -> tuple[dict[str, int], float]:
    counts: dict[str, int] = {}
    longest_s = 0.0
    excused = {f"STALL_CAUSE_{cause.upper()}" for cause in EXCUSED}
    for event in events:
        told = LoopStalled()
        if not event.subject.endswith(".stall") or not event.payload.Unpack(told):
            continue
        stall = told.stall
        machine = StallCause.Name(stall.cause) in excused
        whose = f"{stall.service}, by the machine" if machine else stall.service
        counts[whose] = counts.get(whose, 0) + 1 + stall.suppressed_stalls
        if not machine:
            longest_s = max(longest_s, seconds_of(stall.stall_duration))
    return counts, longest_s


async def _events(address: str) -> list[Event]:
    """All that is in the log now."""
    found: list[Event] = []
    async with grpc.aio.insecure_channel(address) as channel:
        stub, begin = FluxServiceStub(channel), 1
        while True:
            page = await stub.Read(
                ReadRequest(filters=[">"], direction=READ_DIRECTION_FORWARD, from_sequence=begin)
            )
            found.extend(page.events)
            if page.end_reached:
                return found
            begin = page.next_sequence


def _of(events: list[Event], subject: str, kind: type[Message]) -> list[tuple[Event, Any]]:
    found = []
    for event in events:
        payload = kind()
        if event.subject == subject and event.payload.Unpack(payload):
            found.append((event, payload))
    return found


@asynccontextmanager
async def _service(module: str, folder: Path, **settings: str) -> AsyncIterator[ServiceProcess]:
    """A service process; its start and its end block, so they have a thread."""
    manager = running(module, folder, **settings)
    service = await asyncio.to_thread(manager.__enter__)
    try:
        yield service
    finally:
        await asyncio.to_thread(manager.__exit__, None, None, None)


@asynccontextmanager
async def _python(module: str, *arguments: object) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, *map(str, arguments)),
        cwd=_ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(_ROOT), str(_ROOT / "generated")))},
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _until_open(port: int) -> None:
    async with asyncio.timeout(20):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.05)
                continue
            writer.close()
            return


async def answer_questions(address: str) -> None:
    """The worker: a member of a group, as many questions at once as there are agents."""
    random = Random(7)
    async with Publisher(address, source="bench") as publisher:

        async def answer(event: Event) -> None:
            await asyncio.sleep(random.uniform(*LLM_S))  # the LLM, as long as it took
            await publisher.publish("bench.llm.answer", {})

        group = new_consumer("llm", [_QUESTION])
        await Worker(address, group, answer, concurrency=AGENTS).run()


if __name__ == "__main__":
    asyncio.run(answer_questions(sys.argv[1]))
