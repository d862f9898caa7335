"""The logs: one port (`base.py`) and what fulfils it. Only this file opens concrete ones."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib import import_module
from pathlib import Path

from aither_sdk.errors import AitherError
from aither_sdk.settings import FluxSettings
from flux_svc.logs.base import EventLog

_HOMES = {
    "memory": "flux_svc.logs.memory",
    "sqlite": "flux_svc.logs.sqlite.log",
    "jetstream": "flux_svc.logs.jetstream.log",
}


@asynccontextmanager
async def open_log(
    settings: FluxSettings,
    data_dir: Path,
    ended: Callable[[AitherError], None] = lambda error: None,
) -> AsyncIterator[EventLog]:
    """The log that the settings ask for, closed on the way out.

    `ended` is called when the log cannot go on and must be opened anew. Raises ConfigError (the
    folder cannot be used), FailedPrecondition (in use, not ours, too new), DataLoss (damaged) or
    Unavailable (NATS is not there); each says what to do.
    """
    log = await _open(settings, data_dir, ended)
    try:
        yield log
    finally:
        await log.close()


async def _open(
    settings: FluxSettings, data_dir: Path, ended: Callable[[AitherError], None]
) -> EventLog:
    # Imported where chosen, so that a log's libraries load only where it is used; and off the loop,
    # which nats-py alone would hold up for a third of a second.
    await asyncio.to_thread(import_module, _HOMES[settings.log])
    if settings.log == "memory":
        from flux_svc.logs.memory import MemoryLog

        return MemoryLog(max_events=settings.memory_log_events, max_bytes=settings.memory_log_bytes)
    if settings.log == "sqlite":
        from flux_svc.logs.sqlite.log import SqliteLog

        return await SqliteLog.open(data_dir)
    from flux_svc.logs.jetstream.log import JetStreamLog
    from flux_svc.logs.jetstream.stream import StreamPlan

    return await JetStreamLog.open(
        [url.strip() for url in settings.nats_url.split(",")],
        StreamPlan(settings.nats_stream, settings.nats_replicas, settings.nats_duplicate_window_s),
        credentials=settings.nats_credentials,
        synced=settings.nats_synced,
        ended=ended,
    )
