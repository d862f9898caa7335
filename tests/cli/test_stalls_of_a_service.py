"""`aither stalls` tells of real stalls: a real service stands still, a real Flux keeps them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.processes import ServiceProcess, running

SERVICE = """
import asyncio, re, subprocess

from opentelemetry import trace

from aither_sdk import Life, run


def wait_for_a_child():
    subprocess.run(["sleep", "0.6"], check=True)  # blame of child


def match():
    re.match(r"(a+)+$", "a" * 24 + "b")  # blame of regex


async def body(life: Life) -> None:
    async with life.publisher():
        life.serving("")
        for stall in (wait_for_a_child, match):
            await asyncio.sleep(0.5)
            task = asyncio.create_task(call(stall), name=f"task of {stall.__name__}")
            await task
        await life.until_stop()


async def call(stall):
    with trace.get_tracer("gateway").start_as_current_span("a request"):
        stall()


run("gateway", body)
"""


def aither(flux: ServiceProcess, *arguments: str) -> str:
    command = [sys.executable, "-P", "-m", "aither_cli", "stalls", *arguments]
    done = subprocess.run(
        [*command, "--flux", flux.address], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def stalls_in(flux: ServiceProcess, script: Path, marks: list[str]) -> dict[str, Any]:
    """Those at the marked lines, by mark, once Flux has them all."""
    lines = script.read_text().splitlines()
    wanted = {n: mark for n, text in enumerate(lines, 1) for mark in marks if text.endswith(mark)}
    found: dict[str, Any] = {}
    end_s = time.monotonic() + 40
    while time.monotonic() < end_s and len(found) < len(marks):
        for line in aither(flux, "--service", "gateway", "--json").splitlines():
            told = json.loads(line)
            mark = wanted.get(told.get("culprit", {}).get("line_number", 0))
            if mark is not None and told["ended"]:
                found[mark] = told
        time.sleep(0.2)
    assert set(found) == set(marks), aither(flux)
    return found


def test_real_stalls_are_told_with_their_line_and_the_way_out(tmp_path: Path) -> None:
    script = tmp_path / "gateway.py"
    script.write_text(SERVICE)
    settings = {"AITHER_PORT_BASE": "0"}
    with running("flux_svc", tmp_path / "flux") as flux:
        environment = {
            **flux.environment,
            **settings,
            "AITHER_FLUX__ADDRESS": flux.address,
            "AITHER_DATA_DIR": str(tmp_path / "gateway"),
        }
        with (tmp_path / "log").open("wb") as log:
            service = subprocess.Popen(
                [sys.executable, str(script)], env=environment, stdout=log, stderr=log
            )
        try:
            found = stalls_in(flux, script, ["# blame of child", "# blame of regex"])
            child, regex = found["# blame of child"], found["# blame of regex"]
            told = aither(flux, "show", child["stall_id"])
            print(told)
            assert f"wait_for_a_child ({script}:" in told
            assert 'subprocess.run(["sleep", "0.6"], check=True)' in told
            assert "blocking_syscall" in told
            assert "Seen at:" in told
            assert "task of wait_for_a_child" in told
            assert "asyncio.create_subprocess_exec" in told
            told = aither(flux, "show", regex["stall_id"])
            print(told)
            assert "cpu_on_loop" in told
            assert "google-re2" in told
            assert f'File "{script}"' in told
            assert "asyncio/runners.py" not in told, "the loop's own frames tell nothing"
            table = aither(flux, "--service", "gateway")
            print(table)
            assert child["stall_id"][:8] in table
        finally:
            service.kill()
            service.wait()
