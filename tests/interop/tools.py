"""Third-party tools for interop tests: found on PATH, or built where a Go toolchain is.

`python -m tests.interop.tools` builds what is missing and says how long that takes; what it cannot
build is said, too, and no error: the tests that need it are skipped for that reason.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest

BUILT = Path(__file__).parents[2] / ".build" / "bin"
MODULES = Path(__file__).parent / "go"
"""One for each tool: its version and those of all it is built from, with their checksums. So Go
asks for what it compiles and nothing else; without them it reads the requirements of hundreds of
modules first, one after the other, which took longer than all building. Another version:
`go get PACKAGE@VERSION` in its folder, then `go build -mod=mod`, which writes the checksums."""
GO_PACKAGES = {
    "grpc-health-probe": "github.com/grpc-ecosystem/grpc-health-probe",
    "grpcurl": "github.com/fullstorydev/grpcurl/cmd/grpcurl",
    # Later ones take a machine this small too long.
    "jaeger-all-in-one": "github.com/jaegertracing/jaeger/cmd/all-in-one",
}
BUILD_LIMIT_S = 900
"""For all of them, once: together they take two cores some 3 minutes. What was built of one that
did not get ready lies in Go's cache, and the next run goes on from there."""


def tool(name: str) -> str:
    """Path of the tool; skips the test, saying why, where it cannot be had."""
    if why := _why_missing(name):
        pytest.skip(why)
    path = _find(name)
    assert path is not None
    return path


def _find(name: str) -> str | None:
    beside = Path(sys.executable).parent / name
    for path in (shutil.which(name), str(BUILT / name), str(beside)):
        if path and Path(path).exists():
            return path
    return None


@cache
def _why_missing(name: str) -> str:
    """Empty when it is there, if need be after it was built; what failed once fails again."""
    if _find(name) is not None:
        return ""
    go = shutil.which("go")
    if go is None or name not in GO_PACKAGES:
        return f"{name} is not on PATH and there is no Go toolchain to build it with"
    return _build(go, name, _end_of_building_s() - time.monotonic())


@cache
def _end_of_building_s() -> float:
    return time.monotonic() + BUILD_LIMIT_S


def _build(go: str, name: str, limit_s: float) -> str:
    BUILT.mkdir(parents=True, exist_ok=True)
    try:
        built = subprocess.run(
            [go, "build", "-mod=readonly", "-o", str(BUILT / name), GO_PACKAGES[name]],
            cwd=MODULES / name,
            env={**os.environ, "CGO_ENABLED": "0"},
            capture_output=True,
            text=True,
            timeout=max(1.0, limit_s),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"{name} was not built within {BUILD_LIMIT_S} s; the next run goes on"
    if built.returncode != 0:
        return f"{name} could not be built: {built.stderr.strip()[-300:]}"
    return ""


def said(name: str, *arguments: str, limit_s: float = 30) -> subprocess.CompletedProcess[str]:
    """Runs the tool to its end."""
    return subprocess.run(
        [tool(name), *arguments], capture_output=True, text=True, timeout=limit_s, check=False
    )


def main() -> None:
    for name in GO_PACKAGES:
        if _find(name) is None and shutil.which("go") is not None:
            print(f"-- building {name}, once", flush=True)
            begin_s = time.monotonic()
            print(f"   {_why_missing(name) or f'{time.monotonic() - begin_s:.0f} s'}", flush=True)


if __name__ == "__main__":
    main()
