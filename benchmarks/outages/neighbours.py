"""What the old services talked to, as one HTTP server: 48 targets, a bus that is polled, a slow
Sense. `python -m benchmarks.outages.neighbours PORT`."""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from typing import Any

from aiohttp import web

TARGETS = 48
SENSE_ANSWERS_AFTER_S = 6.0
"""Sense was slow when it mattered; that is why its callers piled up."""
_KEPT_EVENTS = 5_000
_POLLED_EVENTS = 200


class Neighbours:
    """State of the bus and counts of who asked for what."""

    def __init__(self) -> None:
        self._events: deque[tuple[int, Any]] = deque(maxlen=_KEPT_EVENTS)
        self._sequence = 0
        self._sensing = 0

    async def health(self, request: web.Request) -> web.Response:
        return web.json_response({"target": request.match_info["target"], "ok": True})

    async def publish(self, request: web.Request) -> web.Response:
        self._sequence += 1
        self._events.append((self._sequence, await request.json()))
        return web.json_response({"sequence": self._sequence})

    async def poll(self, request: web.Request) -> web.Response:
        after = int(request.query["after"])
        news = [[n, event] for n, event in self._events if n > after][:_POLLED_EVENTS]
        return web.json_response(news)

    async def observe(self, request: web.Request) -> web.Response:
        await request.read()
        await asyncio.sleep(SENSE_ANSWERS_AFTER_S)
        return web.json_response({"pain": 0.1})


def main(port: int) -> None:
    neighbours = Neighbours()
    app = web.Application()
    app.router.add_get("/target/{target}", neighbours.health)
    app.router.add_post("/bus/publish", neighbours.publish)
    app.router.add_get("/bus/poll", neighbours.poll)
    app.router.add_post("/sense/observe", neighbours.observe)
    web.run_app(app, host="127.0.0.1", port=port, print=None, access_log=None)


if __name__ == "__main__":
    main(int(sys.argv[1]))
