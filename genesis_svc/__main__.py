"""Genesis as a process: settings, parts, run. It listens on no port; its witness answers health."""

from __future__ import annotations

import asyncio

from aither_sdk.clock import SystemClock
from aither_sdk.lifecycle import Life, run
from genesis_svc.config import load_config
from genesis_svc.engine import Engine

WORKERS = 8
"""Tasks that the embedded worker carries out at once."""


async def body(life: Life) -> None:
    config = await asyncio.to_thread(load_config, life.settings.genesis)
    async with (
        life.publisher(close_timeout_s=1.5) as publisher,
        life.bounded_tasks("worker", WORKERS, close_timeout_s=1.0) as work,
    ):
        await Engine(life, config, publisher, work, SystemClock()).run()


def main() -> None:
    run(
        "genesis",
        body,
        bind=lambda settings: settings.genesis.bind,
        health_port=lambda settings: settings.genesis.health_port,
    )


if __name__ == "__main__":
    main()
