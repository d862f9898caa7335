"""`aither up --log jetstream` with the real Flux and the real nats-server."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

from aither_sdk.publishing.publisher import Publisher
from aither_sdk.subscribing.subscriber import EARLIEST, Subscriber
from tests.cli.aither_process import PATIENCE_S, aither
from tests.ports import free_port_base
from tests.stopwatch import Stopwatch


def arguments(tmp_path: Path) -> list[str]:
    base, data = str(free_port_base()), str(tmp_path / "data")
    return [
        *("up", "--port-base", base, "--data-dir", data, "--no-follow"),
        *("--only", "flux", "--log", "jetstream"),
    ]


async def _published(flux: str, number: int) -> int:
    async with asyncio.timeout(PATIENCE_S):
        async with Publisher(flux, source="tester", ack_timeout_s=PATIENCE_S) as publisher:
            return (await publisher.publish("demo.a", {"n": number})).sequence


async def test_nats_is_started_minded_and_drained_and_keeps_the_events(tmp_path: Path) -> None:
    async with aither(*arguments(tmp_path)) as up:
        await up.until("^nats .* ready$")
        flux = (await up.until("^flux .* ready$")).split()[1]
        assert "sync_interval: always" in (tmp_path / "data/nats/nats.conf").read_text()
        assert await _published(flux, 1) >= 1

        os.kill(await up.pid_of("nats"), signal.SIGKILL)
        await up.until(r"nats +died: killed by SIGKILL; restarting in 1 s")
        again = await up.until(r"nats +runs again \(pid \d+\)")
        last = await _published(flux, 2)

        nats = int(again.partition("(pid ")[2].partition(")")[0])
        watch = Stopwatch()
        up.signal(signal.SIGINT)
        code, said = await up.end()
        assert code == 0, said
        assert watch.calm_s < 5
        assert "SIGKILL" not in said
        assert not Path(f"/proc/{nats}").exists()

    async with aither(*arguments(tmp_path)) as up:
        flux = (await up.until("^flux .* ready$")).split()[1]
        seen: list[int] = []
        async with asyncio.timeout(PATIENCE_S):
            async with Subscriber(flux, ["demo.>"], start=EARLIEST) as subscriber:
                async for event in subscriber:
                    seen.append(event.sequence)
                    if event.sequence == last:
                        break
        assert len(seen) == 2


async def test_nats_ends_with_an_aither_up_that_was_killed(tmp_path: Path) -> None:
    async with aither(*arguments(tmp_path)) as up:
        nats = await up.pid_of("nats")
        up.signal(signal.SIGKILL)
        async with asyncio.timeout(PATIENCE_S):
            while Path(f"/proc/{nats}").exists():
                await asyncio.sleep(0.02)
