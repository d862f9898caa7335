"""The vitals of the host, read once a second, off the loop."""

from __future__ import annotations

import asyncio
import socket
import time
from pathlib import Path

import psutil
import structlog

from aither.pulse.v1.vitals_pb2 import HostVitals
from pulse_svc.spans import duration_of_s
from pulse_svc.threads import Threads

_log = structlog.get_logger()
_INTERVAL_S = 1.0
_TIMEOUT_S = 5.0
"""A reading takes milliseconds; one that takes longer hangs on a sick disk."""
_LOOPBACK = ("lo", "lo0")


class VitalsReader:
    """Holds the newest reading; one that hangs leaves the one before in place."""

    def __init__(self, data_dir: Path) -> None:
        self.newest: HostVitals | None = None
        self._data_dir = data_dir
        self._threads = Threads("vitals", 1)
        self._well = True

    async def run(self) -> None:
        """Until cancelled: a reading a second."""
        while True:
            await self.refresh(_TIMEOUT_S)
            await asyncio.sleep(_INTERVAL_S)

    async def refresh(self, timeout_s: float) -> None:
        """Takes a reading. Never raises: a host that cannot be read is logged once."""
        why = None
        try:
            async with asyncio.timeout(timeout_s):
                self.newest = await self._threads.run(lambda: read_host(self._data_dir))
        except TimeoutError:
            why = f"not read within {timeout_s:g} s"
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
        if why is not None and self._well:
            _log.warning("vitals.unread", why=why)
        self._well = why is None


def read_host(data_dir: Path) -> HostVitals:
    """One reading. Blocking, a few milliseconds; `cpu_ratio` is since the call before."""
    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    disk = psutil.disk_usage(str(_existing(data_dir)))
    network = [
        counters
        for name, counters in psutil.net_io_counters(pernic=True).items()
        if name not in _LOOPBACK
    ]
    now_ns = time.time_ns()
    vitals = HostVitals(
        host=socket.gethostname(),
        cpu_ratio=min(1.0, psutil.cpu_percent(interval=None) / 100),
        cpu_cores=psutil.cpu_count() or 0,
        load_averages=psutil.getloadavg(),
        memory_total_bytes=memory.total,
        memory_available_bytes=memory.available,
        swap_used_bytes=swap.used,
        disk_total_bytes=disk.total,
        disk_free_bytes=disk.free,
        network_receive_bytes=sum(counters.bytes_recv for counters in network),
        network_transmit_bytes=sum(counters.bytes_sent for counters in network),
        uptime_duration=duration_of_s(now_ns / 1e9 - psutil.boot_time()),
    )
    vitals.time.FromNanoseconds(now_ns)
    return vitals


def _existing(path: Path) -> Path:
    """The folder itself, or the nearest parent that is there: the same disk."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path
