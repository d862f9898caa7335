"""All of it together, for one event loop: beat, watchdog, telling, and the witness if wanted.

    async def main():
        with aither_sdk.watch():
            ...

`aither_sdk.run` does this for its services.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import uuid
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from google.protobuf.message import Message

from aither_sdk.beat import BeatCell, Heart, Phase
from aither_sdk.errors import AitherError, FailedPrecondition, InvalidArgument
from aither_sdk.stalls.calls import CallsInFlight
from aither_sdk.stalls.evidence import EvidenceLine, Unavailable
from aither_sdk.stalls.gauges import Collections, LoopGauge
from aither_sdk.stalls.observed import Identity, Witnessed
from aither_sdk.stalls.quota import Quota
from aither_sdk.stalls.record import SpanRef
from aither_sdk.stalls.sampling import is_foreign
from aither_sdk.stalls.sinks import open_sink
from aither_sdk.stalls.stacks import Frame, spell, survey
from aither_sdk.stalls.telling import Announce, LagHistogram, Teller, open_lag_histogram
from aither_sdk.stalls.watchdog import Watchdog
from aither_sdk.stalls.words import say
from aither_sdk.witness.parent import Witness

_ALWAYS_TOLD_NS = 5_000_000_000
_BURST = 10
_MINUTE_NS = 60_000_000_000
_LAST_PORT = 65_535
_watched: weakref.WeakSet[asyncio.AbstractEventLoop] = weakref.WeakSet()
"""Loops that have a watch; a module's variable because a loop is the process's, whoever asks for a
watch. Changed only by `Watch`."""


class Watch:
    """Watches the loop in which it is entered, until it is left. Once.

    `with` starts the witness in the background; `async with` waits until it serves and raises
    Unavailable when it cannot.
    """

    def __init__(
        self,
        service: str = "",
        *,
        stall_after_s: float = 0.1,
        error_after_s: float = 0.5,
        stalls_per_minute: float = 20,
        health_port: int | None = None,
        bind: str = "127.0.0.1",
        services: Sequence[str] = (),
        user_code: Iterable[str | Path] = (),
        instance_id: str = "",
        phase: Phase = Phase.SERVING,
    ) -> None:
        """`service`: the name to tell; unset: OTEL_SERVICE_NAME or the program's name.
        `stall_after_s`: lateness from which on the loop stands still, `error_after_s`: from which
        on that is an error. `health_port`: where a witness answers `grpc.health.v1` and takes
        evidence while something holds the GIL; 0: any free port, None: no witness. `services`: full
        names that its health answers to. `user_code`: folders whose code is yours though it lies
        among the installed packages.
        """
        for name, value in (
            ("stall_after_s", stall_after_s),
            ("error_after_s", error_after_s),
            ("stalls_per_minute", stalls_per_minute),
        ):
            if not value > 0:
                raise InvalidArgument(f"{name} must be more than 0; it is {value}")
        if health_port is not None and not 0 <= health_port <= _LAST_PORT:
            raise InvalidArgument(
                f"health_port must be 0 (any free one) to {_LAST_PORT}; it is {health_port}"
            )
        self.service = service or os.environ.get("OTEL_SERVICE_NAME") or _program()
        self.instance_id = instance_id or uuid.uuid4().hex
        self.announce: Announce | None = None
        """Is given the events of each stall that is told, in another thread. See `Announce`."""
        self.witness: Witness | None = None
        self.evidence: EvidenceLine | None = None
        self.stalls = 0
        """In this run, told or not; counted when the watch is left."""
        self._stall_after_ns = int(stall_after_s * 1e9)
        self._error_after_ns = int(error_after_s * 1e9)
        interval_ns = int(_MINUTE_NS / stalls_per_minute)
        self._quota = Quota(_BURST, interval_ns, _ALWAYS_TOLD_NS)
        self._excused_quota = Quota(_BURST, interval_ns, _ALWAYS_TOLD_NS)
        self._health = (bind, health_port, services) if health_port is not None else None
        self._user_code = tuple(str(path) for path in user_code)
        self._phase = phase
        self._cell = BeatCell.create()
        self._collections = Collections(self._cell.collecting)
        self.heart = Heart(self._cell, stall_after_ns=self._stall_after_ns, capture=self._capture)
        self.calls = CallsInFlight(self.heart)
        self._gauge: LoopGauge | None = None
        self._lags: LagHistogram | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = 0
        """In which it was entered; 0: not yet."""
        self._facts: dict[str, bool] = {}

    def __enter__(self) -> Self:
        self._start()
        if self.witness is not None:
            threading.Thread(
                target=self._start_witness, args=(self.witness,), name="witness-start", daemon=True
            ).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if os.getpid() == self._pid:  # else a forked child leaves the block; it is its parent's
            self._stop_watching()
            self._stop_rest()

    async def __aenter__(self) -> Self:
        self._start()
        if self.witness is not None:
            try:
                await asyncio.to_thread(self.witness.start)
            except BaseException:
                await self.__aexit__(None, None, None)
                raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if os.getpid() != self._pid:
            return
        self._stop_watching()
        # Shielded: who is cancelled in it would leave the witness behind.
        await asyncio.shield(asyncio.to_thread(self._stop_rest))

    def set_fact(self, fact: str, holds: bool) -> None:
        """A named condition of readiness, shown by `List` as `readiness/<fact>`."""
        self._facts[fact] = holds
        self._cell.write_facts(self._facts)
        self.heart.turn(self.heart.phase, ready=all(self._facts.values()))

    def drain(self) -> None:
        """Takes readiness back; liveness stays."""
        self.heart.turn(Phase.DRAINING, ready=False)

    def _start(self) -> None:
        try:
            loop = self._loop = self._claim()
        except FailedPrecondition:
            if not self._pid:
                self._cell.close()
            raise
        finally:
            self._pid = os.getpid()
        if is_foreign(loop):
            say(
                "warning",
                "stall.foreign_loop",
                loop=type(loop).__module__,
                lost="names and traces of bare callbacks; of tasks before Python 3.12 the traces",
            )
        resource = {"service.name": self.service, "service.instance.id": self.instance_id}
        self._collections.start()
        self._gauge = LoopGauge(self._collections)
        self._lags = open_lag_histogram()
        self.heart.observe_lag = self._lags.observe if self._lags is not None else None
        self.heart.turn(self._phase, ready=True)
        self.heart.start()
        self._teller = Teller(
            open_sink(resource),
            self._quota,
            self._excused_quota,
            self._error_after_ns,
            self._announced,
        )
        self._watchdog = Watchdog(
            loop,
            self.heart,
            self._gauge,
            self.calls,
            Identity(self.service, self.instance_id),
            survey(self._user_code),
            stall_after_ns=self._stall_after_ns,
            detected=self._teller.tell,
            ended=self._teller.tell,
        )
        self._teller.start()
        self._watchdog.start()
        if self._health is not None:
            self.witness = self._make_witness(*self._health, resource)

    def _claim(self) -> asyncio.AbstractEventLoop:
        """The loop that is to be watched, by nobody else."""
        if self._pid:
            raise FailedPrecondition(
                "a watch is entered once; make another: with aither_sdk.watch():",
                reason="WATCH_IS_USED",
            )
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise FailedPrecondition(
                "no event loop runs here; enter the watch in a coroutine: "
                "async def main(): with aither_sdk.watch(): ...",
                reason="NO_LOOP",
            ) from None
        if loop in _watched:
            raise FailedPrecondition(
                "this event loop has a watch already; aither_sdk.run gives every service one",
                reason="ALREADY_WATCHED",
            )
        _watched.add(loop)
        return loop

    def _make_witness(
        self, bind: str, port: int, services: Sequence[str], resource: dict[str, str]
    ) -> Witness:
        line = EvidenceLine.open()
        if isinstance(line, Unavailable):
            say("warning", "stall.no_evidence_without_gil", why=line.why)
        else:
            self.evidence = line
            self._watchdog.has_witness = True
        return Witness(
            self._cell,
            bind,
            port,
            services,
            evidence=self.evidence,
            resource=resource,
            user_code=self._user_code,
            heard=self._hear,
        )

    def _hear(self, said: dict[str, Any]) -> None:
        stacks = [tuple(Frame(*frame) for frame in stack) for stack in said["stacks"]]
        span = SpanRef(*said["interrupted"]) if said["interrupted"] else None
        self._watchdog.add_evidence(Witnessed(said["stall_id"], stacks[0], tuple(stacks[1:]), span))

    @staticmethod
    def _start_witness(witness: Witness) -> None:
        try:
            witness.start()
        except AitherError as error:
            if witness.stopping:
                return
            say("error", "witness.cannot_serve", reason=error.reason, message=error.message)

    def _stop_watching(self) -> None:
        """In the loop's thread; blocks for milliseconds."""
        self.heart.stop()
        if self._lags is not None:
            self._lags.flush()
        self._collections.stop()
        self._watchdog.stop()
        self.stalls = self._watchdog.stalls
        if self._loop is not None:
            _watched.discard(self._loop)

    def _stop_rest(self) -> None:
        self._teller.stop()
        if self.witness is not None:
            self.witness.stop()
        if self.evidence is not None:
            self.evidence.close()
        if self._gauge is not None:
            self._gauge.close()
        self._cell.close()

    def _announced(self, events: Sequence[Message]) -> None:
        if self.announce is not None:
            self.announce(events)

    def _capture(self) -> object:
        return self._gauge.here() if self._gauge is not None else None


watch = Watch
"""`with aither_sdk.watch():` reads as what it does."""


def _program() -> str:
    return spell(Path(sys.argv[0] or "python").stem) if sys.argv else "python"
