"""nats-server as a child of `aither up`: found, configured, asked whether it is ready.

Run as a module it becomes nats-server, with the promise of the kernel that it ends with its parent:
nats-server has no lifeline to read, and one that outlives `aither up` would hold its files.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from aither_cli.failures import Failure
from aither_cli.services import Place

NAME = "nats"
PORT, MONITOR_PORT = 22, 122
"""What its ports add to the port base."""
FOLDER = "nats"
"""Below the data dir."""
_PROBE_S = 1.0
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class NatsPlace(Place):
    """Where nats-server listens, on loopback alone; `health_port` is that of its monitor (HTTP)."""

    executable: str = ""
    config: Path = Path()

    @property
    def url(self) -> str:
        return f"nats://{self.address}"

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", "aither_cli.nats_server", self.executable, str(self.config)]


def nats_place(port_base: int, data_dir: Path) -> NatsPlace:
    """Raises Failure when there is no nats-server on this machine."""
    executable = _executable()
    if executable is None:
        raise Failure(
            "--log jetstream needs nats-server, which is not installed: pip install "
            "'aither[jetstream]', or set flux.nats_url to a NATS that runs already"
        )
    config = data_dir / FOLDER / "nats.conf"
    bind, port, monitor = "127.0.0.1", port_base + PORT, port_base + MONITOR_PORT
    return NatsPlace(NAME, bind, port, monitor, executable=executable, config=config)


def write_config(place: NatsPlace) -> None:
    """Raises Failure when it cannot be written."""
    folder = place.config.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        place.config.write_text(_config(place, folder / "jetstream"))
    except OSError as error:
        raise Failure(f"{place.config} cannot be written: {error.strerror}") from error


def _config(place: NatsPlace, store: Path) -> str:
    return f"""\
# Written by `aither up` at every start; changes here are lost.
server_name: "aither"
listen: "{place.address}"
http: "{place.health_address}"
# An event has 1 MiB at most, and headers besides.
max_payload: 2MB
jetstream {{
  store_dir: "{store}"
  # fsync before every acknowledgement: what Flux acknowledges survives the machine.
  sync_interval: always
  # A batch of Flux has so many events at most.
  limits {{ batch {{ max_msgs: 4096 }} }}
}}
"""


async def is_healthy(address: str) -> bool:
    """Whether its monitor says that JetStream is ready."""
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(_PROBE_S):
            reader, writer = await asyncio.open_connection(host, int(port))
            try:
                writer.write(b"GET /healthz HTTP/1.0\r\n\r\n")
                status = await reader.readline()
            finally:
                writer.close()
    except OSError:  # TimeoutError is among them
        return False
    return b" 200 " in status


def _executable() -> str | None:
    """Beside this Python, where pip puts it, before anywhere else."""
    beside = str(Path(sys.executable).parent)
    return shutil.which("nats-server", path=beside) or shutil.which("nats-server")


def main(argv: Sequence[str]) -> None:
    """Becomes `argv[0] -c argv[1]`."""
    executable, config = argv
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit("the parent is gone")
    os.execv(executable, [executable, "-c", config])


if __name__ == "__main__":
    main(sys.argv[1:])
