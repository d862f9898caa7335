"""The watch in a real container: read-only, no capabilities, no new privileges, as PID 1."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.interop, pytest.mark.timeout(180)]
ROOT = Path(__file__).parents[2]
LIMIT_S = 80.0
WAYS = ((), ("--runtime", "runc", "--cgroup-manager", "cgroupfs"))
"""How Podman is asked: as it is set up, then as it works in a machine that is small itself."""
CONTAINED = """
import asyncio, json, os, re, time
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
import aither_sdk

def field(name):
    with open("/proc/self/status") as status:
        return next(line.split()[1] for line in status if line.startswith(name))

async def main():
    async with aither_sdk.watch("contained", health_port=0) as watch:
        await asyncio.sleep(0.2)
        time.sleep(0.6)
        await asyncio.sleep(0.2)
        re.match(r"(a+)+$", "a" * 25 + "b")
        await asyncio.sleep(0.2)
        os.kill(watch.witness.pid, 9)
        while not watch.witness.restarts:
            await asyncio.sleep(0.05)
        async with grpc.aio.insecure_channel(watch.witness.address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            told = await health.List(health_pb2.HealthListRequest(), wait_for_ready=True)
    try:
        open("/tmp/may-not-write", "w")
        writable = True
    except OSError:
        writable = False
    with open("/proc/thread-self/children") as children:
        left = children.read().split()
    print(json.dumps({
        "pid": os.getpid(), "capabilities": int(field("CapEff"), 16), "writable": writable,
        "stalls": watch.stalls, "asks threads": watch.evidence is not None, "left": left,
        "health": {name: one.status for name, one in told.statuses.items()},
    }))

asyncio.run(main())
"""


def run_in_container(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """As the program of a container whose file system is this machine's programs alone. Skips
    where no container can be had."""
    podman = shutil.which("podman")
    if podman is None:
        pytest.skip("podman is not on PATH")
    parts = {Path(part).resolve() for part in (ROOT, sys.prefix, sys.base_prefix)}
    parts |= {Path(part) for part in ("/usr", "/lib", "/lib64", "/bin") if Path(part).exists()}
    volumes = [f"--volume={part}:{part}:ro" for part in sorted(parts)]
    why = ""
    for number, way in enumerate(WAYS):
        root = folder / f"root{number}"
        root.mkdir()
        run = [
            *(podman, *way, "run", "--rm", "--network", "host", "--read-only"),
            *("--read-only-tmpfs=false", "--cap-drop=all", "--security-opt=no-new-privileges"),
            *("--ulimit=nofile=1024:1024", "--ulimit=nproc=1000:1000", "--pids-limit=0"),
            *(*volumes, f"--env=PYTHONPATH={ROOT}:{ROOT / 'generated'}", "--workdir=/"),
            *("--rootfs", str(root)),
        ]
        tried = _ran([*run, "/bin/true"])
        if tried.returncode == 0:
            return _ran([*run, *command])
        why = tried.stderr.strip()[-200:]
    pytest.skip(f"podman runs no container here: {why}")


def _ran(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)


def test_a_container_without_privileges_is_watched(tmp_path: Path) -> None:
    ended = run_in_container(tmp_path, sys.executable, "-B", "-c", CONTAINED)
    assert ended.returncode == 0, ended.stderr
    told: dict[str, Any] = json.loads(ended.stdout)
    assert (told["pid"], told["capabilities"], told["writable"]) == (1, 0, False)
    assert told["stalls"] >= 2
    assert told["asks threads"] is True
    assert {"", "liveness", "readiness", "startup"} <= set(told["health"])
    assert set(told["health"].values()) == {1}
    assert told["left"] == []
    assert "in __main__.main (<string>:" in ended.stderr
    assert "witness.died exit_code=-9" in ended.stderr
    assert "witness.restarted" in ended.stderr
