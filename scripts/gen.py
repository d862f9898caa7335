"""Writes generated/ from proto/: messages, gRPC code and their types.

`--check` writes nothing: it compares what would be written with what is there. The tools come from
requirements.lock, so the same protos give the same bytes on every machine.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import grpc_tools
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2

ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "proto"
THIRD_PARTY = ROOT / "third_party" / "proto"
GENERATED = ROOT / "generated"
WELL_KNOWN = Path(grpc_tools.__file__).parent / "_proto"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder)
        generate(fresh)
        changes = differences(fresh, GENERATED)
        if check:
            return report(changes)
        replace(fresh, GENERATED, changes)
    return 0


def generate(into: Path) -> None:
    """Fills `into`, an existing empty folder. Raises CalledProcessError when a tool refuses."""
    protos = sorted(path.relative_to(PROTO).as_posix() for path in PROTO.rglob("*.proto"))
    services = [name for name in protos if "\nservice " in (PROTO / name).read_text("utf-8")]
    includes = [f"-I{folder}" for folder in (PROTO, THIRD_PARTY, WELL_KNOWN)]
    protoc(protos, *includes, f"--python_out={into}", f"--mypy_out=quiet:{into}")
    # only_async: Aither speaks gRPC over asyncio alone, and the types say so. Without it every
    # servicer method may be sync or async, and mypy catches neither a forgotten `async`
    # nor a sync channel.
    only_async = f"--mypy_grpc_out=quiet,only_async:{into}"
    protoc(services, *includes, f"--grpc_python_out={into}", only_async)
    (into / "aither" / "py.typed").touch()
    health_types(into)


def health_types(into: Path) -> None:
    """Types for grpc_health, whose package has none: sync and async, as it serves both."""
    proto = descriptor_pb2.FileDescriptorProto()
    health_pb2.DESCRIPTOR.CopyToProto(proto)
    # Types are looked up by the name of the Python module, not by that of the proto.
    proto.name = "grpc_health/v1/health.proto"
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "health.binpb"
        image.write_bytes(descriptor_pb2.FileDescriptorSet(file=[proto]).SerializeToString())
        types = (f"--mypy_out=quiet:{into}", f"--mypy_grpc_out=quiet:{into}")
        protoc([proto.name], f"--descriptor_set_in={image}", *types)
    for package in ("grpc_health", "grpc_health/v1"):
        (into / package / "__init__.pyi").touch()


def protoc(protos: list[str], *options: str) -> None:
    """Compiles `protos`, given by their import paths."""
    command = [sys.executable, "-m", "grpc_tools.protoc", *options, *protos]
    plugins = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "PATH": plugins})


def differences(fresh: Path, present: Path) -> dict[str, str]:
    """What is missing, outdated or left over in `present`, by path."""
    new, old = files(fresh), files(present)
    changes = dict.fromkeys(new - old, "missing") | dict.fromkeys(old - new, "left over")
    for name in new & old:
        if not filecmp.cmp(fresh / name, present / name, shallow=False):
            changes[name] = "outdated"
    return dict(sorted(changes.items()))


def files(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def report(changes: dict[str, str]) -> int:
    for name, change in changes.items():
        print(f"generated/{name}: {change}", file=sys.stderr)
    if changes:
        print("generated/ is not what proto/ says; run: make gen", file=sys.stderr)
    return bool(changes)


def replace(fresh: Path, present: Path, changes: dict[str, str]) -> None:
    """Touches only what differs: nobody sees a file change that did not."""
    for name, change in changes.items():
        target = present / name
        if change == "left over":
            target.unlink()
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(fresh / name, target)
    print(f"generated/: {len(changes)} files changed")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
