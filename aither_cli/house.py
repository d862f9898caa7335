"""The house that `aither up` keeps: starts the services, minds them, drains them."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NoReturn

from aither_cli.data_dir import ChildLog
from aither_cli.failures import Failure
from aither_cli.follow import follow
from aither_cli.log_watch import watch_log
from aither_cli.minder import Minder
from aither_cli.nats_server import NAME as NATS
from aither_cli.nats_server import NatsPlace, is_healthy
from aither_cli.services import Place, module_of
from aither_cli.supervisor import Child, Patience, Report, State
from aither_cli.teller import Teller
from aither_sdk.clock import Clock, SystemClock
from aither_sdk.lifecycle import LIFELINE_ENV
from aither_sdk.tasks import BoundedTasks

DRAIN_S = 3.7
"""From the request to stop until SIGKILL; Ctrl-C shall take less than 5 s in all."""
_HEAD_START_S = 1.0
"""What each service gets at most to drain before the one it stands on is asked to."""
_TRIM_EVERY_S = 30.0
_LOG_LINES = 8
ONE_REQUEST_S = 0.2
"""Signals so near together are one request: `timeout` and some shells and runners signal the child
and then its whole group. A person takes longer to press Ctrl-C again."""
_AT_ONCE = 130


@dataclass(frozen=True, slots=True)
class HousePlan:
    """What shall run."""

    places: Sequence[Place]
    """In the order of start."""
    data_dir: Path
    environment: Mapping[str, str]
    """Of the children."""
    flux_address: str
    """Where events are followed."""
    follow: bool = True
    patience: Patience = field(default_factory=Patience)


class House:
    """All minders, from `keep()` to its return."""

    def __init__(self, plan: HousePlan, teller: Teller, clock: Clock | None = None) -> None:
        self._plan = plan
        self._teller = teller
        self._clock = clock or SystemClock()
        self._stop = asyncio.Event()  # set once by `stop`, by a signal or when nobody reads
        self._first_failure: tuple[Minder, Report] | None = None
        self._minders: list[Minder] = []

    def stop(self) -> None:
        """Asks for an orderly end."""
        self._stop.set()

    def stop_at_once(self) -> NoReturn:
        """Kills everything and exits the process."""
        for minder in self._minders:
            minder.kill()
        os._exit(_AT_ONCE)

    @property
    def stopping(self) -> bool:
        return self._stop.is_set()

    async def keep(self) -> None:
        """Until it is stopped and drained. Raises Failure when a service cannot start."""
        with _lifeline() as lifeline:
            async with BoundedTasks("aither up", 16, close_timeout_s=0.5) as tasks:
                try:
                    await self._start_all(lifeline, tasks)
                    if self._first_failure is None and not self._stop.is_set():
                        self._show_table()
                        tasks.spawn("trim logs", self._trim_logs)
                        await self._tell_until_stop(tasks)
                finally:
                    await self._drain()
        if self._first_failure is not None:
            raise Failure(_cannot_start(*self._first_failure))

    async def _tell_until_stop(self, tasks: BoundedTasks) -> None:
        """That a service is gone is no news once it was asked to go: following ends first."""
        address = self._plan.flux_address
        watch = partial(watch_log, address, self._teller, self._clock)
        telling = [tasks.spawn("watch the log", watch)]
        if self._plan.follow:
            telling.append(tasks.spawn("follow", partial(follow, address, self._teller)))
        await self._stop.wait()
        for task in telling:
            task.cancel()
        self._teller.say("draining ...")

    async def _start_all(self, lifeline: int, tasks: BoundedTasks) -> None:
        """Where Flux keeps its events, Flux, for all others dial it; then those at the same
        time."""
        for place in self._plan.places:
            self._minders.append(self._minder(place, lifeline))
        by_name = {minder.name: minder for minder in self._minders}
        first = [[by_name.pop(name)] for name in (NATS, "flux") if name in by_name]
        for group in (*first, list(by_name.values())):
            for minder in group:
                tasks.spawn(f"mind {minder.name}", minder.mind)
            await self._settle(group)
            if self._first_failure is not None or self._stop.is_set():
                return

    async def _settle(self, group: Sequence[Minder]) -> None:
        """Until every one is ready, one of them cannot be, or stop is asked for."""
        settled = [asyncio.ensure_future(minder.settled.wait()) for minder in group]
        stop = asyncio.ensure_future(self._stop.wait())
        waits = {stop, *settled}
        try:
            while not stop.done() and self._first_failure is None:
                if all(future.done() for future in settled):
                    return
                _, waits = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for future in (stop, *settled):
                future.cancel()

    def _minder(self, place: Place, lifeline: int) -> Minder:
        log = ChildLog(self._plan.data_dir, place.name)
        log.rotate()
        nats = place if isinstance(place, NatsPlace) else None
        return Minder(
            place,
            [sys.executable, "-m", module_of(place.name)] if nats is None else nats.command,
            readiness=None if nats is None else partial(is_healthy, nats.health_address),
            environment={**self._plan.environment, LIFELINE_ENV: str(lifeline)},
            lifeline=lifeline,
            log=log,
            child=Child(self._plan.patience),
            clock=self._clock,
            report=self._reported,
        )

    def _reported(self, minder: Minder, report: Report) -> None:
        if minder.child.state is State.FAILED:
            self._first_failure = self._first_failure or (minder, report)
            return
        self._teller.tell(minder.name, report.text, bad=report.bad)
        if report.with_log:
            for line in minder.log.last_lines(_LOG_LINES):
                self._teller.say(f"    {line}")

    def _show_table(self) -> None:
        rows = [
            (
                minder.name,
                minder.place.address or "-",
                minder.place.health_address,
                str(minder.child.pid or "-"),
                minder.child.state.value,
            )
            for minder in self._minders
        ]
        self._teller.table(("service", "address", "health", "pid", "state"), rows)
        self._teller.say(f"data and logs are in {self._plan.data_dir}; Ctrl-C drains and stops")

    async def _trim_logs(self) -> None:
        while True:
            await asyncio.sleep(_TRIM_EVERY_S)
            for minder in self._minders:
                await asyncio.to_thread(minder.log.trim)

    async def _drain(self) -> None:
        """Pulse first, for it would tell of the end of the others as of a failure; then in the
        reverse order of start. A service that drains slowly takes nothing away from the
        others: the next is asked after _HEAD_START_S at the latest, and all end at DRAIN_S."""
        began_s = self._clock.monotonic()
        kill_at_s = began_s + DRAIN_S
        running = [m for m in reversed(self._minders) if m.child.state is not State.WAITING]
        running.sort(key=lambda minder: minder.name != "pulse")
        for minder in running:
            minder.stop(kill_at_s=kill_at_s)
            await self._gone([minder], self._clock.monotonic() + _HEAD_START_S)
        # A killed process is gone within a moment; waiting for ever would help nobody.
        await self._gone(running, kill_at_s + 0.8)
        if running and self._first_failure is None:
            self._teller.say(f"stopped after {self._clock.monotonic() - began_s:.1f} s")

    async def _gone(self, minders: Sequence[Minder], until_s: float) -> None:
        left_s = max(0.0, until_s - self._clock.monotonic())
        waits = [asyncio.ensure_future(minder.gone.wait()) for minder in minders]
        if waits:
            _, pending = await asyncio.wait(waits, timeout=left_s)
            for future in pending:
                future.cancel()


def run_house(plan: HousePlan) -> None:
    """Blocks until the house was stopped by SIGINT, SIGTERM or SIGHUP and has drained.

    Raises Failure when a service cannot start.
    """
    asyncio.run(_run(plan))


async def _run(plan: HousePlan) -> None:
    loop = asyncio.get_running_loop()

    def nobody_reads() -> None:
        with suppress(RuntimeError):  # the loop is closed: it is stopping for another reason
            loop.call_soon_threadsafe(house.stop)

    asked_s = float("inf")

    def signalled() -> None:
        nonlocal asked_s
        if loop.time() - asked_s > ONE_REQUEST_S:
            house.stop_at_once()
        asked_s = min(asked_s, loop.time())
        house.stop()

    teller = Teller(sys.stdout, nobody_reads)
    house = House(plan, teller)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, signalled)
    try:
        await house.keep()
    finally:
        teller.close()


@contextmanager
def _lifeline() -> Iterator[int]:
    """The reading end of a pipe whose writing end only this process has: when this process is gone,
    however that came about, the children read the end of the file and drain."""
    reading, writing = os.pipe()
    try:
        yield reading
    finally:
        os.close(reading)
        os.close(writing)


def _cannot_start(minder: Minder, report: Report) -> str:
    """One line about it, then what the service said about its settings, or its last words."""
    own = f"{minder.name}: "
    lines = minder.log.last_lines(_LOG_LINES * 3)
    said = [line.removeprefix(own) for line in lines if line.startswith(own)]
    shown = said or lines[-_LOG_LINES:]
    told = f"{minder.name} {report.text}; see {minder.log.path}"
    return "\n".join([told, *(f"  {line}" for line in shown)])
