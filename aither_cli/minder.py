"""Carries out what `supervisor.py` decides about one service: process, probes and signals."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence

import grpc

from aither_cli.data_dir import ChildLog
from aither_cli.dialing import is_ready
from aither_cli.services import Place
from aither_cli.supervisor import Child, Kill, Order, Report, Start, State, Terminate
from aither_sdk.channels import open_channel
from aither_sdk.clock import Clock

_EAGER_S, _CALM_S = 0.1, 1.0
"""From one probe to the next, while it starts and after."""
_CANNOT_EXECUTE = 126
"""What a shell says for a command that it cannot execute."""


class Minder:
    """Keeps one child process running from `mind()` until `stop()`.

    `report` is called with each Report of the machine, on the loop.
    """

    def __init__(
        self,
        place: Place,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        lifeline: int,
        log: ChildLog,
        child: Child,
        clock: Clock,
        report: Callable[[Minder, Report], None],
        readiness: Callable[[], Awaitable[bool]] | None = None,
    ) -> None:
        """`readiness`: how it is asked; unset: by gRPC at its health address."""
        self.place = place
        self.log = log
        self.child = child
        self.settled = asyncio.Event()  # set for good once it was ready or will never be
        self.gone = asyncio.Event()  # set when `mind` has ended
        self._command = command
        self._environment = environment
        self._lifeline = lifeline
        self._clock = clock
        self._report = report
        self._readiness = readiness
        self._process: asyncio.subprocess.Process | None = None
        self._exit: asyncio.Task[int] | None = None
        self._kill_at_s: float | None = None  # set by `stop`, taken by `mind`
        self._poked = asyncio.Event()

    @property
    def name(self) -> str:
        return self.place.name

    def stop(self, *, kill_at_s: float) -> None:
        """Asks it to drain; SIGKILL follows at that (monotonic) time. `mind` ends after."""
        self._kill_at_s = kill_at_s
        self._poked.set()

    def kill(self) -> None:
        """SIGKILL now, without a word."""
        self._signal(signal.SIGKILL)

    async def mind(self) -> None:
        """Returns when the child is gone for good."""
        channel = open_channel(self.place.health_address)
        probe: asyncio.Task[bool] | None = None
        try:
            await self._obey(self.child.start(self._clock.monotonic()))
            while not self.child.over or self._exit is not None:
                if probe is None and self.child.state in _PROBED:
                    probe = asyncio.create_task(self._probe(channel), name=f"{self.name}:probe")
                await self._turn(probe)
                if probe is not None and (probe.done() or self.child.state not in _PROBED):
                    probe.cancel()
                    probe = None
        finally:
            if probe is not None:
                probe.cancel()
            self.settled.set()
            self.gone.set()
            await channel.close()

    async def _turn(self, probe: asyncio.Task[bool] | None) -> None:
        """Waits for whatever comes first and lets the machine decide about it."""
        poke = asyncio.create_task(self._poked.wait(), name=f"{self.name}:poke")
        waits = [task for task in (self._exit, probe, poke) if task is not None]
        due_s = self.child.due_s()
        timeout_s = None if due_s is None else max(0.0, due_s - self._clock.monotonic())
        await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        poke.cancel()
        now_s = self._clock.monotonic()
        if self._exit is not None and self._exit.done():
            code, self._exit, self._process = self._exit.result(), None, None
            await self._obey(self.child.ended(code, now_s))
        elif probe is not None and probe.done():
            await self._obey(self.child.probed(probe.result(), now_s))
        if self._kill_at_s is not None:
            kill_at_s, self._kill_at_s = self._kill_at_s, None
            self._poked.clear()
            await self._obey(self.child.stop(now_s, kill_at_s=kill_at_s))
        await self._obey(self.child.passed(now_s))

    async def _probe(self, channel: grpc.aio.Channel) -> bool:
        starting = self.child.state is State.STARTING
        await asyncio.sleep(_EAGER_S if starting else _CALM_S)
        return await (is_ready(channel) if self._readiness is None else self._readiness())

    async def _obey(self, orders: Sequence[Order]) -> None:
        for order in orders:
            match order:
                case Start():
                    await self._start()
                case Terminate():
                    self._signal(signal.SIGTERM)
                case Kill():
                    self._signal(signal.SIGKILL)
                case Report():
                    self._report(self, order)
        if self.child.state is State.READY or self.child.over:
            self.settled.set()

    async def _start(self) -> None:
        try:
            with self.log.open_run() as fd:
                process = await asyncio.create_subprocess_exec(
                    *self._command,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=fd,
                    stderr=fd,
                    env=self._environment,
                    pass_fds=(self._lifeline,),
                    # Out of the terminal's reach: Ctrl-C is for the parent, which drains in order.
                    start_new_session=True,
                )
        except OSError as error:
            self.log.note(f"{self._command[0]} cannot be started: {error.strerror}")
            await self._obey(self.child.ended(_CANNOT_EXECUTE, self._clock.monotonic()))
            return
        self._process = process
        self._exit = asyncio.create_task(process.wait(), name=f"{self.name}:exit")
        self.child.started(process.pid)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            try:
                self._process.send_signal(number)
            except ProcessLookupError:
                return  # it ended in this moment; its exit is being delivered


_PROBED = (State.STARTING, State.READY, State.UNWELL)
