"""The logs: one port (`base.py`) and what fulfils it. Only this file opens concrete ones."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from aither_sdk.errors import ConfigError, Fault
from aither_sdk.settings import FluxSettings
from flux_svc.logs.base import EventLog


@asynccontextmanager
async def open_log(settings: FluxSettings, data_dir: Path) -> AsyncIterator[EventLog]:
    """The log that the settings ask for, closed on the way out.

    Raises ConfigError (the folder cannot be used), FailedPrecondition (in use, not ours, too new)
    or DataLoss (damaged); each says what to do.
    """
    log = await _open(settings, data_dir)
    try:
        yield log
    finally:
        await log.close()


async def _open(settings: FluxSettings, data_dir: Path) -> EventLog:
    # Imported where chosen, so that a log's libraries load only where it is used.
    if settings.log == "memory":
        from flux_svc.logs.memory import MemoryLog

        return MemoryLog(max_events=settings.memory_log_events, max_bytes=settings.memory_log_bytes)
    if settings.log == "sqlite":
        from flux_svc.logs.sqlite import SqliteLog

        return await SqliteLog.open(data_dir)
    told = f'"{settings.log}" is not in this version; use sqlite (on disk) or memory'
    raise ConfigError([Fault("settings", None, "flux.log", told)])
