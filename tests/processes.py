"""Real service processes for tests: started on free ports, watched, killed and paused by pid."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.ports import free_ports

START_LIMIT_S = 60.0
END_LIMIT_S = 15.0


def suspend(pid: int) -> None:
    """SIGSTOP, and all its threads stand still when this returns. The signal alone says only that
    they will: until then a thread may still answer."""
    os.kill(pid, signal.SIGSTOP)
    end_s = time.monotonic() + END_LIMIT_S
    while not _stands_still(pid):
        assert time.monotonic() < end_s, f"process {pid} runs on after SIGSTOP"
        time.sleep(0.001)


def _stands_still(pid: int) -> bool:
    try:
        stats = [(task / "stat").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    except FileNotFoundError:
        if Path("/proc/self/task").exists():
            return False  # a thread ended as we looked
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    return all(stat.rpartition(") ")[2][0] in "TtZX" for stat in stats)


def send(pid: int, number: signal.Signals) -> None:
    """A signal; a SIGSTOP has taken hold when this returns."""
    if number == signal.SIGSTOP:
        suspend(pid)
    else:
        os.kill(pid, number)


class ServiceProcess:
    """`python -m <module>` with settings from the environment; may be started again and again at
    the same address."""

    def __init__(self, module: str, data_dir: Path, environment: Mapping[str, str]) -> None:
        self.module = module
        self.data_dir = data_dir
        self.port, self.health_port = free_ports(2)
        section = module.removesuffix("_svc").upper()
        self.environment = {
            **os.environ,
            "AITHER_DATA_DIR": str(data_dir),
            f"AITHER_{section}__HEALTH_PORT": str(self.health_port),
            **({} if section == "GENESIS" else {f"AITHER_{section}__PORT": str(self.port)}),
            **environment,
        }
        self.log_path = data_dir / f"{module}-{self.health_port}.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def health_address(self) -> str:
        return f"127.0.0.1:{self.health_port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Starts it and waits until its witness calls it ready."""
        self.data_dir.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", self.module], env=self.environment, stdout=log, stderr=log
            )
        end_s = time.monotonic() + START_LIMIT_S
        while time.monotonic() < end_s:
            if self._process.poll() is not None:
                raise AssertionError(
                    f"{self.module} ended with {self._process.returncode}:\n{self.log}"
                )
            if self.health("readiness") == "SERVING":
                return
            time.sleep(0.02)
        raise AssertionError(f"{self.module} is not ready after {START_LIMIT_S} s:\n{self.log}")

    def health(self, service: str) -> str:
        """The status's name, or the error code's when nobody answers."""
        options = (("grpc.enable_retries", 0),)
        with grpc.insecure_channel(self.health_address, options=options) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            try:
                answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=2)
            except grpc.RpcError as error:
                return str(getattr(error, "code")().name)  # noqa: B009
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")[-8000:]

    def signal(self, number: signal.Signals) -> None:
        send(self.pid, number)

    def kill(self) -> None:
        """SIGKILL: nothing is flushed, nobody is told."""
        self.signal(signal.SIGKILL)
        assert self._process is not None
        self._process.wait(END_LIMIT_S)

    def terminate(self) -> int:
        """SIGTERM; answers the exit status."""
        assert self._process is not None
        self._process.terminate()
        return self._process.wait(END_LIMIT_S)

    def close(self) -> None:
        if self._process is None or self._process.poll() is not None:
            return
        self.signal(signal.SIGCONT)
        try:
            self.terminate()
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(END_LIMIT_S)


@contextmanager
def running(module: str, data_dir: Path, **environment: str) -> Iterator[ServiceProcess]:
    """A started service, ended with the block."""
    process = ServiceProcess(module, data_dir, environment)
    try:
        process.start()
        yield process
    finally:
        process.close()
