"""The second outage: an orchestrator that serves what it calls itself and waits inside its tick.

`python -m benchmarks.outages.old_orchestrator PORT RESULT_FILE`

Its causes, each as it was: it called its own HTTP endpoints, some of them with a blocking client;
it made a new HTTP client for every neuron's event; its tick awaited all LLM dispatches of 60 to 120
s. Here everything takes a tenth of the time.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import aiohttp
from aiohttp import web

from benchmarks.outages.tally import Tally

AGENTS = 29
NEURONS = 20
SCALE = 0.1
"""Of the original times."""
TICK_S = 5.0 * SCALE
LLM_S = (60.0 * SCALE, 120.0 * SCALE)
NEURON_S = 2.0 * SCALE
SELF_CALL_TIMEOUT_S = 30.0 * SCALE
BLOCKING_EVERY = 40
"""One self-call in so many went through the blocking client."""


class Orchestrator:
    def __init__(self, port: int, tally: Tally) -> None:
        self._own = f"http://127.0.0.1:{port}"
        self._tally = tally
        self._random = random.Random(7)
        self._calls = 0

    async def tick_for_ever(self) -> None:
        while True:
            began_s = time.monotonic()
            await asyncio.gather(*(self._dispatch(agent) for agent in range(AGENTS)))
            self._tally.span("tick", time.monotonic() - began_s)
            await asyncio.sleep(TICK_S)

    async def fire_for_ever(self) -> None:
        while True:
            await asyncio.gather(*(self._fire(neuron) for neuron in range(NEURONS)))
            await asyncio.sleep(NEURON_S)

    async def _dispatch(self, agent: int) -> None:
        self._tally.counts["dispatches"] += 1
        await self._call_self(f"/agent/{agent}")
        await asyncio.sleep(self._random.uniform(*LLM_S))  # the LLM, as long as it took

    async def _fire(self, neuron: int) -> None:
        await self._call_self(f"/neuron/{neuron}")

    async def _call_self(self, path: str) -> None:
        self._calls += 1
        self._tally.counts["self_calls"] += 1
        if self._calls % BLOCKING_EVERY == 0:
            self._call_self_blocking(path)
            return
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with aiohttp.ClientSession() as session:  # a new one for every event
                self._tally.counts["clients_made"] += 1
                async with session.get(self._own + path) as answer:
                    await answer.read()

    def _call_self_blocking(self, path: str) -> None:
        """Waits for an answer that only this loop could give."""
        with contextlib.suppress(urllib.error.URLError, TimeoutError):
            urllib.request.urlopen(self._own + path, timeout=SELF_CALL_TIMEOUT_S).read()


async def main(port: int, result: Path) -> None:
    tally = Tally()
    orchestrator = Orchestrator(port, tally)

    async def answer(request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    app = web.Application()
    app.router.add_get("/{tail:.*}", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    loops = [
        asyncio.create_task(orchestrator.tick_for_ever()),
        asyncio.create_task(orchestrator.fire_for_ever()),
        asyncio.create_task(tally.watch_loop()),
    ]
    await tally.until_told(result)
    for loop in loops:
        loop.cancel()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), Path(sys.argv[2])))
