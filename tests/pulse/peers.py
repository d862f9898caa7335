"""Peers for tests: started, killed, stopped and continued by pid."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.ports import free_ports
from tests.processes import suspend

_SCRIPT = Path(__file__).with_name("peer.py")
_START_LIMIT_S = 30.0


class Peer:
    """One server process, which may be started again at its port."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        (self.port,) = free_ports(1)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Begins to start it; it listens when `wait` returns."""
        self._process = subprocess.Popen(
            [sys.executable, str(_SCRIPT), self.kind, str(self.port)], stdout=subprocess.PIPE
        )

    def wait(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        assert select.select([self._process.stdout], [], [], _START_LIMIT_S)[0], "does not start"
        self.port = int(self._process.stdout.readline())

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def stop(self) -> None:
        """It answers nothing from here on."""
        suspend(self.pid)

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)


@contextmanager
def peers(*kinds: str) -> Iterator[list[Peer]]:
    """Started together, ended with the block."""
    started = [Peer(kind) for kind in kinds]
    try:
        for peer in started:
            peer.start()
        for peer in started:
            peer.wait()
        yield started
    finally:
        for peer in started:
            peer.kill()


def eventually(holds: Callable[[], bool], limit_s: float = 20.0) -> float:
    """Seconds until it held; for what another process does in its own time."""
    began_s = time.monotonic()
    while not holds():
        assert time.monotonic() - began_s < limit_s, "did not happen"
        time.sleep(0.01)
    return time.monotonic() - began_s
