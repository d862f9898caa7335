"""Consumer groups: one port (`base.py`) and what fulfils it. Only this file opens concrete ones."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import import_module
from pathlib import Path

from aither_sdk.clock import Clock
from aither_sdk.settings import FluxSettings
from flux_svc.groups.base import ConsumerGroups
from flux_svc.logs.base import EventLog


@asynccontextmanager
async def open_groups(
    settings: FluxSettings, data_dir: Path, log: EventLog, *, clock: Clock | None = None
) -> AsyncIterator[ConsumerGroups]:
    """The groups over this log, kept where the log is kept, closed on the way out.

    Raises FailedPrecondition (not ours, too new), DataLoss (damaged) or what the disk says.
    """
    groups = await _open(settings, data_dir, log, clock)
    try:
        yield groups
    finally:
        await groups.close()


async def _open(
    settings: FluxSettings, data_dir: Path, log: EventLog, clock: Clock | None
) -> ConsumerGroups:
    # Imported where chosen, so that a backend's libraries load only where it is used; and off the
    # loop, which would stand still meanwhile.
    if settings.log == "jetstream":
        await asyncio.to_thread(import_module, "flux_svc.groups.jetstream.groups")
        from flux_svc.groups.jetstream.groups import JetStreamGroups
        from flux_svc.logs.jetstream.log import JetStreamLog

        assert isinstance(log, JetStreamLog)
        return JetStreamGroups.open(log, clock=clock)
    from flux_svc.groups.local.groups import LocalGroups
    from flux_svc.groups.local.steady import SteadyClock
    from flux_svc.groups.local.store import GroupStore, MemoryStore

    store: GroupStore = MemoryStore()
    if settings.log == "sqlite":
        from flux_svc.groups.local.sqlite_store import SqliteStore

        store = await SqliteStore.open(data_dir)
    try:
        return await LocalGroups.open(log, store, clock=clock or SteadyClock())
    except BaseException:
        await store.close()
        raise
