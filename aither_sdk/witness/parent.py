"""The service's side of its witness: start it, hear where it serves, start it anew if it dies or
falls silent.

In a thread of its own, so that a witness that dies during a stall comes back during the stall.
"""

from __future__ import annotations

import asyncio
import json
import os
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from aither.runtime.v1 import runtime_events_pb2 as runtime_pb
from aither_sdk.beat import BeatCell
from aither_sdk.errors import Unavailable
from aither_sdk.stalls.evidence import EvidenceLine
from aither_sdk.stalls.words import say
from aither_sdk.witness import FAREWELL
from aither_sdk.witness.hearing import LOOK_S, Hearing

_START_TIMEOUT_S = 20.0
_FIRST_DELAY_S, _MOST_DELAY_S = 0.05, 5.0
"""Before a restart: health is missed at once; one that cannot live is not started over and over."""
_PROVEN_S = 60.0
"""A witness that lived for so long can."""
_END_TIMEOUT_S = 2.0


class Witness:
    """A running witness. `address` is where health is answered; it stays when the child changes."""

    def __init__(
        self,
        cell: BeatCell,
        bind: str,
        port: int,
        services: Sequence[str],
        *,
        evidence: EvidenceLine | None = None,
        resource: Mapping[str, str] | None = None,
        user_code: Sequence[str] = (),
        heard: Callable[[dict[str, Any]], None] = lambda _said: None,
    ) -> None:
        """`resource`: what the witness's own spans say of the service, as OpenTelemetry names it:
        service.name, service.instance.id. `heard` is given what the witness says of stalls, in
        the keeper's thread.
        """
        self.address = ""
        self.restarts = 0
        self._cell = cell
        self._bind = bind
        self._port = port
        self._services = services
        self._evidence = evidence
        self._resource = dict(resource or {})
        self._user_code = user_code
        self._heard = heard
        self._child: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()
        self._starting = threading.Lock()
        """Held by `start`, so that `stop` never leaves a child behind that was about to come."""
        self._keeper = threading.Thread(target=self._keep, name="witness-keeper", daemon=True)

    @property
    def pid(self) -> int:
        """Of the child that runs now; 0 while none does."""
        child = self._child
        return child.pid if child is not None else 0

    def start(self) -> None:
        """Blocks until it serves. Raises Unavailable when it cannot, with its reason (a taken
        port, say)."""
        with self._starting:
            if self._stopping.is_set():
                raise Unavailable("the service ends", reason="WITNESS_FAILED")
            self._child = self._serve()
            self._keeper.start()

    @property
    def stopping(self) -> bool:
        return self._stopping.is_set()

    def stop(self) -> None:
        """Ends the child by closing its stdin, by SIGKILL where that is not heard. Blocks."""
        self._stopping.set()
        with self._starting:
            child = self._child
        if child is not None:
            _end(child)
        if self._keeper.is_alive():
            self._keeper.join(_END_TIMEOUT_S)
        if child is not None:
            _close_pipes(child)

    def _serve(self) -> subprocess.Popen[bytes]:
        try:
            child = subprocess.Popen(
                self._command(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=self._descriptors(),
                env=_environment(),
            )
        except OSError as error:  # no process, no memory, no descriptor: perhaps in a moment
            raise Unavailable(
                f"the health witness cannot be started: {error.strerror or error}",
                reason="WITNESS_FAILED",
            ) from error
        said = _first_line(child, self._stopping)
        if "error" in said:
            _end(child)
            _close_pipes(child)
            raise Unavailable(
                f"the health witness cannot serve: {said['error']}", reason="WITNESS_FAILED"
            )
        self.address = said["address"]
        # A restart must come back where probes look for it.
        self._port = int(self.address.rpartition(":")[2])
        return child

    def _command(self) -> list[str]:
        command = [
            sys.executable,
            # Its path comes from this process: looking through site-packages again costs memory,
            # and in the working directory may lie files named like Python's own.
            *("-P", "-S", "-m", "aither_sdk.witness"),
            f"--cell={self._cell.fd}",
            f"--bind={self._bind}",
            f"--port={self._port}",
            f"--parent={os.getpid()}",
            f"--resource={json.dumps(self._resource)}",
            *(f"--service={name}" for name in self._services),
            *(f"--user-code={path}" for path in self._user_code),
        ]
        if self._evidence is not None:
            command += [
                f"--evidence={self._evidence.read_fd}",
                f"--signal={int(self._evidence.number)}",
            ]
        return command

    def _descriptors(self) -> tuple[int, ...]:
        evidence = () if self._evidence is None else (self._evidence.read_fd,)
        return (self._cell.fd, *evidence)

    def _keep(self) -> None:
        """Waits for the child's death and starts it again, until stopped."""
        delay_s, begun_s = _FIRST_DELAY_S, time.monotonic()
        while not self._stopping.is_set():
            child, code = self._child, None
            if child is not None:
                self._listen(child)
                code = child.wait()
                _close_pipes(child)
                if self._stopping.is_set():
                    return
                say("error", "witness.died", exit_code=code, restarts=self.restarts)
            self._child = None
            if time.monotonic() - begun_s >= _PROVEN_S:
                delay_s = _FIRST_DELAY_S
            if self._stopping.wait(delay_s):
                return
            delay_s, begun_s = min(2 * delay_s, _MOST_DELAY_S), time.monotonic()
            try:
                self._child = self._serve()
            except Unavailable as error:
                say("error", "witness.restart_failed", reason=error.message)
                continue
            self.restarts += 1
            say("warning", "witness.restarted", address=self.address, restarts=self.restarts)
        if self._child is not None:  # it came up while the end was asked for
            _end(self._child)
            _close_pipes(self._child)

    def _listen(self, child: subprocess.Popen[bytes]) -> None:
        """To the end of its output, which is its own end; brought about where it is silent."""
        hearing = Hearing(time.monotonic_ns(), self._cell.witness_ns)
        rest = b""
        with suppress(OSError, ValueError), selectors.DefaultSelector() as selector:  # closed
            assert child.stdout is not None
            selector.register(child.stdout, selectors.EVENT_READ)
            while True:
                if selector.select(LOOK_S):
                    chunk = os.read(child.stdout.fileno(), 65_536)
                    if not chunk:
                        return
                    *lines, rest = (rest + chunk).split(b"\n")
                    for line in lines:
                        self._hear(line)
                elif hearing.looks(time.monotonic_ns(), self._cell.witness_ns):
                    say("error", "witness.silent", pid=child.pid, then="it is killed")
                    child.kill()
                    return

    def _hear(self, line: bytes) -> None:
        try:
            self._heard(json.loads(line))
        except (ValueError, LookupError, TypeError):
            # Cut off by its death, or a library's own words. The next line may be evidence, and
            # who stops to read would block the child in the end.
            say("warning", "witness.not_understood", line=line[:200].decode(errors="replace"))


@asynccontextmanager
async def open_witness(
    cell: BeatCell, bind: str, port: int, services: Sequence[str], **options: Any
) -> AsyncIterator[Witness]:
    """A witness for as long as the block lasts. Raises Unavailable when it cannot serve."""
    witness = Witness(cell, bind, port, services, **options)
    try:
        await asyncio.to_thread(witness.start)
        yield witness
    finally:
        await asyncio.shield(asyncio.to_thread(witness.stop))


def _environment() -> dict[str, str]:
    # The sources first: an editable install finds them by a hook that -S leaves out.
    sources = (Path(__file__).parents[2], Path(runtime_pb.__file__).parents[3])
    path = [*map(str, sources), *(entry or os.getcwd() for entry in sys.path)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "MALLOC_ARENA_MAX": "1"}


def _first_line(child: subprocess.Popen[bytes], stopping: threading.Event) -> dict[str, str]:
    """What the child says first, `{"error": ...}` where it says nothing in time."""
    assert child.stdout is not None
    line = b""
    slices = int(_START_TIMEOUT_S / 0.1)
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        while slices and not line.endswith(b"\n") and not stopping.is_set():
            if not selector.select(0.1):
                slices -= 1
            elif chunk := os.read(child.stdout.fileno(), 65_536):
                line += chunk
            else:
                return {"error": "it ended without a word"}
    if stopping.is_set():
        return {"error": "the service ends"}
    if not line.endswith(b"\n"):
        return {
            "error": f"no word within {_START_TIMEOUT_S:.0f} s; is the machine out of CPU or "
            "memory?"
        }
    first = line.splitlines()[0]
    with suppress(ValueError):
        said = json.loads(first)
        if isinstance(said, dict) and said.keys() & {"address", "error"}:
            return said
    return {"error": f"its first word is not understood: {first[:200].decode(errors='replace')}"}


def _end(child: subprocess.Popen[bytes]) -> None:
    with suppress(OSError, ValueError):  # it is gone, or was told before
        if child.stdin is not None:
            child.stdin.write(FAREWELL)
            child.stdin.close()
    try:
        child.wait(_END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _close_pipes(child: subprocess.Popen[bytes]) -> None:
    for pipe in (child.stdin, child.stdout):
        with suppress(OSError):
            if pipe is not None:
                pipe.close()
