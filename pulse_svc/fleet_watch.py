"""Follows the fleet file: read again when it changes, refused when it is bad.

Looks once a second instead of waiting for the kernel's word, for that works on every file system
and for every way to replace a file: written in place, renamed over, or a link that is turned
(Kubernetes ConfigMaps).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from aither.pulse.v1.target_pb2 import Target
from aither_sdk.errors import AitherError, ConfigError
from pulse_svc.fleet_file import load_fleet
from pulse_svc.news import News
from pulse_svc.roster import Roster
from pulse_svc.threads import Threads

_log = structlog.get_logger()
INTERVAL_S = 1.0
_SETTLE_S = 0.1
"""A file that changed is read after this, so that whoever writes it in place is done."""
_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class _Stamp:
    """What tells one version of a file from another without reading it."""

    device: int
    inode: int
    size_bytes: int
    mtime_ns: int
    ctime_ns: int


class FleetWatch:
    """Keeps a roster in step with a file."""

    def __init__(self, path: Path, roster: Roster, news: News) -> None:
        self._path = path
        self._roster = roster
        self._news = news
        self._threads = Threads("fleet", 1)
        self._seen: _Stamp | None = None
        self._stuck = False

    async def load(self) -> None:
        """The first reading. Raises ConfigError with every fault of the file."""
        self._seen, targets = await self._threads.run(lambda: _read(self._path))
        if isinstance(targets, ConfigError):
            raise targets
        self._roster.apply(targets)

    async def run(self) -> None:
        """Until cancelled: looks, and reads again what changed."""
        while True:
            await asyncio.sleep(INTERVAL_S)
            try:
                async with asyncio.timeout(_TIMEOUT_S):
                    await self.look()
            except TimeoutError:
                if not self._stuck:
                    _log.warning("fleet.file_hangs", path=str(self._path), after_s=_TIMEOUT_S)
                self._stuck = True
            else:
                self._stuck = False

    async def look(self) -> None:
        """One look at the file; reads it when it is not the one that was read last."""
        if await self._threads.run(lambda: _stamp(self._path)) == self._seen:
            return
        await asyncio.sleep(_SETTLE_S)
        stamp, targets = await self._threads.run(lambda: _read(self._path))
        if await self._threads.run(lambda: _stamp(self._path)) != stamp:
            return  # still being written; the next look reads it
        self._seen = stamp
        if isinstance(targets, ConfigError):
            self._refuse([str(fault) for fault in targets.faults])
            return
        try:
            self._roster.apply(targets)
        except AitherError as error:
            self._refuse([f"{self._path}: {error.message}"])

    def _refuse(self, faults: Sequence[str]) -> None:
        """The old fleet goes on, and everybody is told why."""
        _log.warning("fleet.refused", path=str(self._path), faults=list(faults))
        self._news.fleet_refused(faults)


def _stamp(path: Path) -> _Stamp | None:
    """None: it cannot be looked at, which its reader will say better."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return _Stamp(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def _read(path: Path) -> tuple[_Stamp | None, Sequence[Target] | ConfigError]:
    """The stamp from before the reading: what is written meanwhile is seen at the next look."""
    stamp = _stamp(path)
    try:
        return stamp, load_fleet(path)
    except ConfigError as error:
        return stamp, error
