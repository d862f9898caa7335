"""Third-party tools for interop tests: found on PATH, or built where a Go toolchain is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest

BUILT = Path(__file__).parents[2] / ".build" / "bin"
GO_PACKAGES = {
    "grpcurl": ("github.com/fullstorydev/grpcurl", "v1.9.4", "/cmd/grpcurl"),
    # Later ones need more of the module proxy than it has, or take a machine this small too long.
    "jaeger-all-in-one": ("github.com/jaegertracing/jaeger", "v1.42.0", "/cmd/all-in-one"),
    "grpc-health-probe": ("github.com/grpc-ecosystem/grpc-health-probe", "v0.4.40", ""),
}
"""Module, version, and the package's path within it."""
BUILD_LIMIT_S = 1500
"""The largest of them takes two cores 6 minutes, from nothing."""


@cache
def tool(name: str) -> str:
    """Path of the tool; skips the test, saying why, where it cannot be had."""
    beside = Path(sys.executable).parent / name
    for path in (shutil.which(name), str(BUILT / name), str(beside)):
        if path and Path(path).exists():
            return path
    go = shutil.which("go")
    if go is None or name not in GO_PACKAGES:
        pytest.skip(f"{name} is not on PATH and there is no Go toolchain to build it with")
    module, version, package = GO_PACKAGES[name]
    BUILT.mkdir(parents=True, exist_ok=True)
    # A module of our own that requires it, rather than `go install`: that one asks the proxy for
    # the list of versions, too, which not every proxy has.
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "go.mod").write_text(f"module tools\n\nrequire {module} {version}\n")
        try:
            built = subprocess.run(
                [go, "build", "-mod=mod", "-o", str(BUILT / name), module + package],
                cwd=folder,
                env={**os.environ, "CGO_ENABLED": "0"},
                capture_output=True,
                text=True,
                timeout=BUILD_LIMIT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            pytest.skip(f"{name} was not built within {BUILD_LIMIT_S} s")
    if built.returncode != 0:
        pytest.skip(f"{name} could not be built: {built.stderr.strip()[-300:]}")
    return str(BUILT / name)


def said(name: str, *arguments: str, limit_s: float = 30) -> subprocess.CompletedProcess[str]:
    """Runs the tool to its end."""
    return subprocess.run(
        [tool(name), *arguments], capture_output=True, text=True, timeout=limit_s, check=False
    )
