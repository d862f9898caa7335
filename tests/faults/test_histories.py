"""Real processes under load, killed and stopped at any moment; what they recorded is judged.

Everybody's history is kept and named when it breaks a promise (`history.py`).
"""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.faults.history import standing, verify
from tests.faults.recording_clients import ClientProcess, clients, read_stored, stream_info
from tests.processes import ServiceProcess, running

SEED = 20_260_611


async def judge(
    name: str,
    flux: ServiceProcess,
    publishers: Sequence[ClientProcess],
    followers: Sequence[ClientProcess],
) -> None:
    """Ends the load, waits until the followers have all of it, and checks everything recorded."""
    for publisher in publishers:
        publisher.kill()
    last = (await stream_info(flux.address)).last_sequence
    async with asyncio.timeout(30):
        for follower in followers:
            while (standing(follower.entries) or 0) < last:
                await asyncio.sleep(0.1)
    entries = [entry for client in (*publishers, *followers) for entry in client.entries]
    acked = [entry for entry in entries if entry["say"] == "acked"]
    assert len(acked) > 100, "too little load to show anything"
    verify(entries, name=name, stored=await read_stored(flux.address))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kills", [4, pytest.param(100, marks=pytest.mark.slow)])
async def test_the_promises_hold_over_sigkill_of_server_publishers_and_subscribers(
    tmp_path: Path, kills: int
) -> None:
    chance = random.Random(SEED + kills)
    with (
        running("flux_svc", tmp_path) as flux,
        clients(flux.address, tmp_path, SEED, publishers=2, followers=2) as (senders, followers),
    ):
        victims: list[ServiceProcess | ClientProcess] = [flux, senders[0], *followers]
        for number in range(kills):
            await asyncio.sleep(chance.uniform(0.05, 0.5))
            victim = victims[number % 4] if number < 4 else chance.choice(victims)
            await asyncio.to_thread(victim.kill)
            await asyncio.to_thread(victim.start)
        await asyncio.sleep(0.5)
        await judge(f"sigkill-{SEED}-{kills}", flux, senders, followers)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("stopped_s", [5, pytest.param(30, marks=pytest.mark.slow)])
async def test_the_promises_hold_over_sigstop_of_server_and_clients(
    tmp_path: Path, stopped_s: int
) -> None:
    """The server and a subscriber stop together; a publisher a moment later, and wakes first."""
    with (
        running("flux_svc", tmp_path) as flux,
        clients(flux.address, tmp_path, SEED, publishers=2, followers=2) as (senders, followers),
    ):
        await asyncio.sleep(0.5)
        before = (await stream_info(flux.address)).last_sequence
        stopped = (flux, followers[0], senders[0])
        try:
            for process in stopped:
                process.signal(signal.SIGSTOP)
            await asyncio.sleep(stopped_s)
        finally:
            for process in reversed(stopped):
                process.signal(signal.SIGCONT)
        async with asyncio.timeout(20):
            while (await stream_info(flux.address)).last_sequence < before + 200:
                await asyncio.sleep(0.1)
        await judge(f"sigstop-{SEED}-{stopped_s}", flux, senders, followers)
