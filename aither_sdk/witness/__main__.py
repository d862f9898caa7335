"""Serves `grpc.health.v1` and reflection for another process, from its beat cell alone.

`python -m aither_sdk.witness --cell FD --bind HOST --port N [--service NAME]...`; says one line of
JSON on stdout once it serves (`{"address": ...}`) or cannot (`{"error": ...}`), and ends when its
stdin does: it never outlives the service by more than a moment.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import time

from aither_sdk.beat import BeatCell
from aither_sdk.errors import AitherError
from aither_sdk.health import HealthBoard
from aither_sdk.listening import bind_fault
from aither_sdk.server import open_server
from aither_sdk.witness.verdict import judge

_POLL_S = 0.05
_PORT_PATIENCE_S = 2.0


async def _serve(arguments: argparse.Namespace) -> int:
    cell = BeatCell(arguments.cell)

    def refresh(board: HealthBoard) -> None:
        verdict = judge(cell.read(), time.monotonic_ns())
        board.set(live=verdict.live, started=verdict.started, ready=verdict.ready)

    board = HealthBoard(arguments.service, refresh)
    parent_gone = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), parent_gone.set)
    try:
        await _until_free(arguments.bind, arguments.port)
        async with open_server(
            arguments.bind, arguments.port, board=board, drain_s=0.1, plaintext=True
        ) as server:
            _say(address=server.address)
            while not parent_gone.is_set():
                board.refresh()  # for those who watch; who checks has it fresh anyway
                await asyncio.sleep(_POLL_S)
    except AitherError as error:
        _say(error=error.message)
        return 1
    return 0


async def _until_free(bind: str, port: int) -> None:
    """Waits a moment for a taken port: after a crash of the service, the witness before this one
    may still be on its way out."""
    end_s = time.monotonic() + _PORT_PATIENCE_S
    taken = bind_fault(bind, port) is not None
    while port and taken and time.monotonic() < end_s:
        await asyncio.sleep(_POLL_S)
        taken = bind_fault(bind, port) is not None


def _say(**fields: str) -> None:
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(prog="aither_sdk.witness")
    parser.add_argument("--cell", type=int, required=True)
    parser.add_argument("--bind", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--service", action="append", default=[])
    arguments = parser.parse_args()
    # A Ctrl-C in the terminal reaches the whole process group; the service decides when to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return asyncio.run(_serve(arguments))


if __name__ == "__main__":
    sys.exit(main())
