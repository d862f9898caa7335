"""The first outage: a heartbeat whose `/health` stands in the queue behind everything it does.

`python -m benchmarks.outages.old_heartbeat PORT NEIGHBOURS_PORT RESULT_FILE`

Its six causes, each as it was: nvidia-smi awaited by nobody and run on the loop; calls to Sense
that are fired and forgotten; 48 publishes at once a tick; reflexes that hear what they say
themselves; a bus polled ten times a second; loops over what came in, without an await in them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from benchmarks.outages.neighbours import TARGETS
from benchmarks.outages.tally import Tally

TICK_S = 1.0
POLL_S = 0.1
NVIDIA_SMI_S = (0.2, 0.8)
SENSE_CALLS = 10
"""A tick; with 6 s an answer that is 60 at once."""
MAX_DEPTH = 3
"""The original had no bound and went on until the queue was full; the model must end."""
_REFLEXES = [
    re.compile(rf"service-(\d+).*{word}", re.DOTALL) for word in ("health", "down", "slow", "well")
]


class Heartbeat:
    def __init__(self, neighbours: str, tally: Tally) -> None:
        self._at = neighbours
        self._tally = tally
        self._after = 0
        self._zombies: set[asyncio.Task[None]] = set()
        self._random = random.Random(7)

    async def tick_for_ever(self, session: aiohttp.ClientSession) -> None:
        while True:
            began_s = time.monotonic()
            self._look_at_gpu()
            healths = await asyncio.gather(*(self._check(session, n) for n in range(TARGETS)))
            await asyncio.gather(*(self._publish(session, event) for event in healths))
            for event in healths[:SENSE_CALLS]:
                zombie = asyncio.create_task(self._sense(session, event))
                self._zombies.add(zombie)
                zombie.add_done_callback(self._zombies.discard)
            self._tally.most("sense_tasks", len(self._zombies))
            self._tally.counts["ticks"] += 1
            self._tally.span("tick", time.monotonic() - began_s)
            await asyncio.sleep(max(0.0, TICK_S - (time.monotonic() - began_s)))

    async def poll_for_ever(self, session: aiohttp.ClientSession) -> None:
        while True:
            self._tally.counts["polls"] += 1
            async with session.get(f"{self._at}/bus/poll?after={self._after}") as answer:
                news = await answer.json()
            answers = []
            for sequence, event in news:  # no await: however many came, the loop waits
                self._after = max(self._after, sequence)
                answers += self._reflexes(event)
            for event in answers:
                await self._publish(session, event)
            await asyncio.sleep(POLL_S)

    def _look_at_gpu(self) -> None:
        began_s = time.monotonic()
        takes_s = self._random.uniform(*NVIDIA_SMI_S)
        subprocess.run(["sleep", f"{takes_s:.3f}"], check=True)  # nvidia-smi, as long as it took
        self._tally.span("gpu", time.monotonic() - began_s)

    async def _check(self, session: aiohttp.ClientSession, n: int) -> dict[str, Any]:
        async with session.get(f"{self._at}/target/{n}") as answer:
            found = await answer.json()
        return {"kind": "SERVICE_HEALTH", "name": f"service-{n}", "health": found, "depth": 0}

    async def _publish(self, session: aiohttp.ClientSession, event: dict[str, Any]) -> None:
        self._tally.counts["publishes"] += 1
        async with session.post(f"{self._at}/bus/publish", json=event) as answer:
            await answer.read()

    async def _sense(self, session: aiohttp.ClientSession, event: dict[str, Any]) -> None:
        with contextlib.suppress(aiohttp.ClientError):
            async with session.post(f"{self._at}/sense/observe", json=event) as answer:
                await answer.read()

    def _reflexes(self, event: dict[str, Any]) -> list[dict[str, Any]]:
        """A reflex on SERVICE_HEALTH says SERVICE_HEALTH: it hears itself."""
        text = json.dumps(event, indent=2, sort_keys=True) * 20
        fired = []
        for reflex in _REFLEXES:
            self._tally.counts["reflexes"] += 1
            if reflex.search(text) and event["depth"] < MAX_DEPTH:
                fired.append({**event, "depth": event["depth"] + 1})
        return fired[:1]


async def main(port: int, neighbours_port: int, result: Path) -> None:
    tally = Tally()
    heartbeat = Heartbeat(f"http://127.0.0.1:{neighbours_port}", tally)

    async def health(request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    app = web.Application()
    app.router.add_get("/health", health)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    async with aiohttp.ClientSession() as session:
        loops = [
            asyncio.create_task(heartbeat.tick_for_ever(session)),
            asyncio.create_task(heartbeat.poll_for_ever(session)),
            asyncio.create_task(tally.watch_loop()),
        ]
        await tally.until_told(result)
        for loop in loops:
            loop.cancel()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])))
