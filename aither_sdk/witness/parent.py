"""The service's side of its witness: start it, hear where it serves, start it anew if it dies."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import structlog

from aither_sdk.beat import BeatCell
from aither_sdk.errors import Unavailable
from aither_sdk.tasks import BoundedTasks

_START_TIMEOUT_S = 20.0
_RESTART_DELAY_S = 1.0
_END_TIMEOUT_S = 2.0
_log = structlog.get_logger()


class Witness:
    """A running witness. `address` is where health is answered; it stays when the child changes."""

    def __init__(self, cell: BeatCell, bind: str, port: int, services: Sequence[str]) -> None:
        self.address = ""
        self.restarts = 0
        self._cell = cell
        self._bind = bind
        self._port = port
        self._services = services
        self._child: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Raises Unavailable when it cannot serve, with its reason (a taken port, say)."""
        try:
            child = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "aither_sdk.witness",
                f"--cell={self._cell.fd}",
                f"--bind={self._bind}",
                f"--port={self._port}",
                *(f"--service={name}" for name in self._services),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                pass_fds=(self._cell.fd,),
            )
        except OSError as error:  # no process, no memory, no descriptor: perhaps in a moment
            raise Unavailable(
                f"the health witness cannot be started: {error.strerror or error}",
                reason="WITNESS_FAILED",
            ) from error
        self._child = child
        assert child.stdout is not None
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                line = await child.stdout.readline()
        except TimeoutError:
            await self.stop()
            raise Unavailable(
                f"the health witness did not serve within {_START_TIMEOUT_S:.0f} s; is the "
                "machine out of CPU or memory?",
                reason="WITNESS_FAILED",
            ) from None
        said = json.loads(line) if line else {"error": "it ended without a word"}
        if "error" in said:
            await self.stop()
            raise Unavailable(
                f"the health witness cannot serve: {said['error']}", reason="WITNESS_FAILED"
            )
        self.address = said["address"]
        # A restart must come back where probes look for it.
        self._port = int(self.address.rpartition(":")[2])

    async def keep(self) -> None:
        """Waits for the child's death and starts it again, until cancelled."""
        while True:
            if self._child is not None:
                code = await self._child.wait()
                _log.error("witness.died", exit_code=code, restarts=self.restarts)
            await asyncio.sleep(_RESTART_DELAY_S)
            try:
                await self.start()
            except Unavailable as error:
                _log.error("witness.restart_failed", reason=error.message)
                continue
            self.restarts += 1
            _log.warning("witness.restarted", address=self.address, restarts=self.restarts)

    async def stop(self) -> None:
        """Ends the child by closing its stdin, by SIGKILL where that is not heard."""
        child, self._child = self._child, None
        if child is None:
            return
        assert child.stdin is not None
        child.stdin.close()
        try:
            async with asyncio.timeout(_END_TIMEOUT_S):
                await child.wait()
        except TimeoutError:
            child.kill()
            await child.wait()


@asynccontextmanager
async def open_witness(
    cell: BeatCell, bind: str, port: int, services: Sequence[str], tasks: BoundedTasks
) -> AsyncIterator[Witness]:
    """A witness for as long as the block lasts. Raises Unavailable when it cannot serve."""
    witness = Witness(cell, bind, port, services)
    await witness.start()
    keeper = tasks.spawn("witness", witness.keep)
    try:
        yield witness
    finally:
        keeper.cancel()
        await asyncio.wait([keeper])
        await witness.stop()
