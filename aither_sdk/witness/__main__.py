"""Serves `grpc.health.v1` and reflection for another process, from its beat cell alone.

`python -m aither_sdk.witness --cell FD --bind HOST --port N ...`, as `parent.py` calls it; says one
line of JSON on stdout once it serves (`{"address": ...}`) or cannot (`{"error": ...}`), and ends
when its service does: it never outlives it by more than a moment.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress

from aither_sdk.beat import BeatCell, Phase
from aither_sdk.errors import AitherError
from aither_sdk.health import HealthBoard
from aither_sdk.stalls.otlp import Exporter, open_exporter, resource_of
from aither_sdk.stalls.stacks import survey
from aither_sdk.witness import FAREWELL
from aither_sdk.witness.exits import how_it_ended, watch_exit
from aither_sdk.witness.inquiry import Inquiry, Line
from aither_sdk.witness.serving import open_health
from aither_sdk.witness.verdict import judge
from aither_sdk.witness.voice import Voice, say

_POLL_S, _POLL_IN_SILENCE_S = 0.2, 0.05
"""Between two looks at the cell, for silences and for those who watch; who checks has it fresh
anyway. Each wake finds cold caches, so that they are the price of the witness."""
_DYING_S, _DYING_STEPS = 1.0, 100
_SWITCH_S = 0.0005
"""Health is answered in one thread and spans are made in another, which it would wait for 5 ms."""


async def _serve(arguments: argparse.Namespace) -> int:
    try:
        cell = BeatCell(arguments.cell)
    except (OSError, ValueError) as error:
        say(error=f"the beat cell cannot be read: {error}")
        return 1
    resource = json.loads(arguments.resource)
    voice = Voice(_exporter(resource), resource)
    line = Line(arguments.evidence, arguments.signal) if arguments.evidence is not None else None
    inquiry = Inquiry(
        cell,
        arguments.parent,
        line,
        resource.get("service.name", ""),
        resource.get("service.instance.id", ""),
        survey(arguments.user_code),
        voice.tell_stall,
    )
    exit_descriptor = watch_exit(arguments.parent)

    def refresh(board: HealthBoard) -> None:
        verdict = judge(cell.read(), time.monotonic_ns(), inquiry.excused_ns)
        board.set(
            live=verdict.live,
            started=verdict.started,
            ready=verdict.ready,
            facts=cell.read_facts(),
        )

    board = HealthBoard(arguments.service, refresh)
    parent = _Parent(arguments.parent, exit_descriptor)
    try:
        async with open_health(arguments.bind, arguments.port, board) as address:
            gc.collect()
            gc.freeze()  # what was loaded stays; collections need not walk it while somebody asks
            say(address=address)
            while not parent.is_gone:
                cell.witness_alive(time.monotonic_ns())
                silence = await inquiry.poll()
                if board.watched:
                    board.refresh()
                await parent.is_gone_within(_POLL_IN_SILENCE_S if silence else _POLL_S)
            silent = inquiry.silent()
    except AitherError as error:
        say(error=error.message)
        return 1
    beat = cell.read()
    if await parent.has_died() and beat is not None and beat.phase is not Phase.STOPPED:
        voice.tell_exit(how_it_ended(exit_descriptor), beat, silent)
    voice.close()
    return 0


class _Parent:
    """The service's process, of whose end this one hears at once, for the time in which it is dead
    is no stall. A forked child of it may hold the other end of stdin, and is not it."""

    def __init__(self, pid: int, exit_descriptor: int) -> None:
        self._pid = pid
        self._gone = asyncio.Event()
        self._said_farewell = False
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sys.stdin.fileno(), self._heard)
        if exit_descriptor >= 0:
            self._loop.add_reader(exit_descriptor, self._gone.set)

    @property
    def is_gone(self) -> bool:
        """Or wants this process to go."""
        return self._gone.is_set() or os.getppid() != self._pid

    async def is_gone_within(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._gone.wait()

    async def has_died(self) -> bool:
        """A process that dies closes its files a moment before it has ended."""
        for _ in range(_DYING_STEPS):
            if self._said_farewell or os.getppid() != self._pid:
                break
            await asyncio.sleep(_DYING_S / _DYING_STEPS)
        return os.getppid() != self._pid

    def _heard(self) -> None:
        self._said_farewell = bool(os.read(sys.stdin.fileno(), len(FAREWELL)))
        self._loop.remove_reader(sys.stdin.fileno())
        self._gone.set()


def _exporter(resource: dict[str, str]) -> Exporter | None:
    exporter = open_exporter(resource_of(os.environ, resource))
    if exporter is not None:
        # Not during the first stall: health must not wait for an import.
        threading.Thread(target=exporter.prepare, daemon=True).start()
    return exporter


def main() -> int:
    parser = argparse.ArgumentParser(prog="aither_sdk.witness")
    parser.add_argument("--cell", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    parser.add_argument("--bind", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--service", action="append", default=[])
    parser.add_argument("--resource", default="{}")
    parser.add_argument("--evidence", type=int)
    parser.add_argument("--signal", type=int, default=0)
    parser.add_argument("--user-code", action="append", default=[])
    arguments = parser.parse_args()
    # A Ctrl-C in the terminal reaches the whole process group; the service decides when to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.setswitchinterval(_SWITCH_S)
    return asyncio.run(_serve(arguments))


if __name__ == "__main__":
    sys.exit(main())
