"""From start to stop: starting, serving, draining, stopped, with a bound on every step.

`run(name, body)` is the `main` of a service: it reads settings, starts the witness, runs `body` and
drains on SIGTERM or SIGINT. A second signal exits at once.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import grpc
import structlog
from google.protobuf.message import Message

from aither.runtime.v1 import runtime_events_pb2 as runtime_pb
from aither_sdk.beat import Phase
from aither_sdk.errors import AitherError, ConfigError
from aither_sdk.health import HealthBoard
from aither_sdk.logs import configure_logs
from aither_sdk.publisher import Publisher
from aither_sdk.server import Server, open_server
from aither_sdk.settings import Settings, load_settings
from aither_sdk.stalls.watch import Watch
from aither_sdk.subscriber import Subscriber
from aither_sdk.tasks import BoundedTasks
from aither_sdk.telemetry import Telemetry, open_telemetry
from aither_sdk.version import VERSION
from aither_sdk.witness.parent import Witness

LIFELINE_ENV = "AITHER_LIFELINE_FD"
"""A file descriptor whose end of file asks the service to stop: it does not outlive its starter."""

_ANNOUNCE_TIMEOUT_S = 1.0
_TASK_LIMIT = 256
_TOO_SLOW = 3
"""Exit status of a drain that was cut off."""
_END_S = 2.0
"""After the drain timeout: for what was cancelled, the witness and telemetry."""
_TELEMETRY_S = 1.0
"""For spans and log lines that are not sent yet."""
_GC_THRESHOLDS = (20_000, 50, 20)
"""Allocations before a collection, and collections before one of the older generations. Python's
own 700 make a collection of every few messages: a fifth of Flux's CPU under load."""
_log = structlog.get_logger()

Announce = Callable[[str, Message], Awaitable[object]]


class Life:
    """One run of a service, handed to its body."""

    def __init__(self, name: str, settings: Settings, watch: Watch, board: HealthBoard) -> None:
        self.name = name
        self.settings = settings
        self.instance_id = watch.instance_id
        self.tasks = BoundedTasks(name, _TASK_LIMIT, close_timeout_s=0.5)
        self.health = board
        self.stop_reason = ""
        self.served = False
        """Whether it ever came to `serving`; until then a failure is one of the start."""
        self.telemetry = False
        """Whether anybody is told of spans and metrics."""
        self._watch = watch
        self._heart = watch.heart
        self._facts: dict[str, bool] = {}
        self._stop = asyncio.Event()
        self._stop_asked_s = 0.0
        self._born_s = time.monotonic()
        self._address = ""
        self._announce: Announce | None = None
        self._subscribers: weakref.WeakSet[Subscriber] = weakref.WeakSet()

    def serving(self, address: str = "") -> None:
        """The body is ready; `address` is where it serves gRPC, if it does."""
        self._address = address
        self.served = True
        # What stands now stands to the end; the collector need not look at it again and again.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*_GC_THRESHOLDS)
        self._turn(Phase.SERVING)
        _log.info("service.serving", address=address, health=self._health_address())
        if self._announce is not None:
            self.tasks.spawn("announce", self._say_started)

    def set_fact(self, fact: str, holds: bool) -> None:
        """A named condition of readiness, e.g. "flux stream up". Liveness never depends on one."""
        if self._facts.get(fact) is not holds:
            self._facts[fact] = holds
            _log.info("service.fact", fact=fact, holds=holds)
            self._turn(self._heart.phase)

    @property
    def witness(self) -> Witness | None:
        return self._watch.witness

    async def until_stop(self) -> str:
        """Waits until the service shall end; answers why, e.g. "SIGTERM"."""
        await self._stop.wait()
        return self.stop_reason

    @property
    def stopping(self) -> bool:
        return self._stop.is_set()

    def stop(self, reason: str) -> None:
        """Asks the service to drain: readiness falls now, the body ends after."""
        if not self._stop.is_set():
            self.stop_reason = reason
            self._stop_asked_s = time.monotonic()
            _log.info("service.draining", reason=reason)
            self._turn(Phase.DRAINING)
            self._stop.set()
            for subscriber in self._subscribers:
                self.tasks.try_spawn("end-subscriber", subscriber.aclose)

    def serve(
        self,
        bind: str,
        port: int,
        *,
        register: Sequence[Callable[[grpc.aio.Server], None]],
        services: Sequence[str],
        **options: Any,
    ) -> AbstractAsyncContextManager[Server]:
        """As `open_server`, with this life's health board, telemetry and the settings' security."""
        options.setdefault("plaintext", self.settings.security.allow_plaintext)
        options.setdefault("telemetry", self.telemetry)
        options.setdefault("calls", self._watch.calls)
        return open_server(
            bind, port, register=register, services=services, board=self.health, **options
        )

    @asynccontextmanager
    async def publisher(self, **options: Any) -> AsyncIterator[Publisher]:
        """A Publisher to the Flux of the settings. The first one also tells of this service on
        `runtime.<service>.started` and `.stopped`."""
        options.setdefault("source", self.name)
        # With Flux away, what is buffered must be given up well within the drain time.
        options.setdefault("close_timeout_s", min(1.5, self.settings.drain_timeout_s / 3))
        async with Publisher(self.settings.flux.address, **options) as publisher:

            async def announce(subject: str, payload: Message) -> None:
                await publisher.publish(subject, payload)

            async with self.announcing(announce):
                yield publisher

    @asynccontextmanager
    async def announcing(self, announce: Announce) -> AsyncIterator[None]:
        """Tells of this service through `announce` while the block lasts."""
        if self._announce is not None:
            yield
            return
        self._announce = announce
        if self._heart.phase is Phase.SERVING:
            self.tasks.spawn("announce", self._say_started)
        try:
            yield
        finally:
            if self.stopping:
                await self.tasks.aclose()  # they may still publish, and it is told who did not end
            await self._say_stopped()
            self._announce = None

    def subscriber(self, filters: Sequence[str], **options: Any) -> Subscriber:
        """A Subscriber to the Flux of the settings; its iteration ends when the service drains, so
        that `async for event in ...` may be all that a body does."""
        options.setdefault("client_name", self.name)
        subscriber = Subscriber(self.settings.flux.address, filters, **options)
        self._subscribers.add(subscriber)
        if self.stopping:
            self.tasks.try_spawn("end-subscriber", subscriber.aclose)
        return subscriber

    def _turn(self, phase: Phase) -> None:
        phase = max(phase, self._heart.phase)  # who was asked to stop while starting stays draining
        facts = all(self._facts.values())
        self._heart.cell.write_facts(self._facts)
        self._heart.turn(phase, ready=facts)
        started = phase is not Phase.STARTING
        ready = phase is Phase.SERVING and facts
        self.health.set(live=True, started=started, ready=ready, facts=self._facts)

    def _health_address(self) -> str:
        return self.witness.address if self.witness is not None else ""

    async def _say_started(self) -> None:
        event = runtime_pb.ServiceStarted(
            service=self.name,
            instance_id=self.instance_id,
            version=VERSION,
            pid=os.getpid(),
            host=socket.gethostname(),
            address=self._address,
            health_address=self._health_address(),
        )
        event.startup_duration.FromNanoseconds(int((time.monotonic() - self._born_s) * 1e9))
        try:
            if self._announce is not None:
                await self._announce(f"runtime.{self.name}.started", event)
        except AitherError as error:
            _log.info("service.start_not_told", why=error.message)

    def stalled(self, events: Sequence[Message]) -> None:
        """Tells of a stall that is over. In the loop's thread."""
        if self._announce is not None:
            self.tasks.try_spawn("announce-stall", partial(self._say_stall, events))

    async def _say_stall(self, events: Sequence[Message]) -> None:
        try:
            for event in events:
                if self._announce is not None:
                    await self._announce(f"runtime.{self.name}.stall", event)
        except AitherError as error:
            _log.info("service.stall_not_told", why=error.message)

    async def _say_stopped(self) -> None:
        event = runtime_pb.ServiceStopped(
            service=self.name,
            instance_id=self.instance_id,
            reason=self.stop_reason or "error",
            cancelled_tasks=self.tasks.cancelled_at_close,
        )
        if self._stop_asked_s:
            drained_s = time.monotonic() - self._stop_asked_s
            event.drain_duration.FromNanoseconds(int(drained_s * 1e9))
        if self._announce is None:
            return
        try:
            async with asyncio.timeout(_ANNOUNCE_TIMEOUT_S):
                await self._announce(f"runtime.{self.name}.stopped", event)
        except (TimeoutError, AitherError) as error:
            _log.info("service.stop_not_told", why=str(error) or "no answer in time")


Body = Callable[[Life], Awaitable[None]]


def run(
    name: str,
    body: Body,
    *,
    services: Sequence[str] = (),
    health_port: Callable[[Settings], int | None] = lambda _settings: 0,
    bind: Callable[[Settings], str] = lambda _settings: "127.0.0.1",
    argv: Sequence[str] | None = None,
) -> NoReturn:
    """Runs `body` as the service `name` and exits the process.

    `body` enters its parts in an AsyncExitStack, calls `life.serving()`, awaits
    `life.until_stop()` and leaves the stack, which drains it. Exit status: 0 drained, 1 the body
    failed, 2 it could not start with these settings, 3 drained too slowly, 130/143 a second signal.
    """
    try:
        settings = _settings(name, argv)
    except ConfigError as error:
        sys.stderr.write("".join(f"{name}: {fault}\n" for fault in error.faults))
        sys.exit(2)
    level, log_format = settings.telemetry.log_level, settings.telemetry.log_format
    configure_logs(name, level=level, log_format=log_format)
    told = settings.telemetry
    watch = Watch(
        name,
        stall_after_s=told.stall_ms / 1000,
        error_after_s=told.stall_error_ms / 1000,
        stalls_per_minute=told.stalls_per_minute,
        health_port=health_port(settings) or 0,
        bind=bind(settings),
        services=services,
        user_code=(*told.user_code, *_home_of(body)),
        phase=Phase.STARTING,
    )
    code = asyncio.run(_live(name, body, settings, watch, services))
    sys.exit(code)


async def _live(
    name: str, body: Body, settings: Settings, watch: Watch, services: Sequence[str]
) -> int:
    # First of all: its providers are what the watch and the interceptors tell.
    telemetry = open_telemetry(name, version=VERSION, instance_id=watch.instance_id)
    life = Life(name, settings, watch, HealthBoard(services))
    life.telemetry = telemetry.enabled
    life.health.set(live=True, started=False, ready=False)
    _watch_signals(life)
    _watch_lifeline(life)
    loop = asyncio.get_running_loop()
    watch.announce = lambda events: _in_loop(loop, life.stalled, events)
    try:
        async with watch:
            code = await _run_body(life, body)
            watch.heart.turn(Phase.STOPPED, ready=False)
    except AitherError as error:
        _log.error("service.cannot_start", reason=error.reason, message=error.message)
        # A line each: whoever started this picks out what is ours by its name.
        sys.stderr.write("".join(f"{name}: {line}\n" for line in error.message.splitlines()))
        code = 2
    finally:
        await _close_telemetry(telemetry)
    _log.info("service.stopped", reason=life.stop_reason, exit_code=code)
    return code


def _in_loop(
    loop: asyncio.AbstractEventLoop, call: Callable[[Sequence[Message]], None], events: Any
) -> None:
    with suppress(RuntimeError):  # the loop is closed: nobody is left to tell
        loop.call_soon_threadsafe(call, events)


def _home_of(body: Body) -> tuple[str, ...]:
    """The folder of the service's own package: its code is to blame wherever it is installed."""
    module = sys.modules.get(getattr(body, "__module__", ""))
    file = getattr(module, "__file__", None)
    in_package = bool(getattr(module, "__package__", ""))
    return (f"{Path(file).resolve().parent}/",) if file and in_package else ()


async def _run_body(life: Life, body: Body) -> int:
    """The body until it ends; once stop was asked for, at most the drain time longer."""
    started = asyncio.get_running_loop().create_task(_whole(life, body), name=f"{life.name}:body")
    stop = asyncio.get_running_loop().create_task(life.until_stop(), name=f"{life.name}:stop")
    try:
        await asyncio.wait((started, stop), return_when=asyncio.FIRST_COMPLETED)
        if not started.done():
            _end_at_the_latest(life.settings.drain_timeout_s + _END_S)
            await asyncio.wait((started,), timeout=life.settings.drain_timeout_s)
        if not started.done():
            left = sorted(task.get_name() for task in asyncio.all_tasks())
            _log.error("service.drain_timeout", after_s=life.settings.drain_timeout_s, tasks=left)
            started.cancel()
            await asyncio.wait((started,), timeout=1.0)
            return _TOO_SLOW
    finally:
        stop.cancel()
        started.cancel()
    return _exit_code(life, started)


async def _whole(life: Life, body: Body) -> None:
    try:
        await body(life)
    finally:
        await life.tasks.aclose()


def _exit_code(life: Life, body: asyncio.Task[None]) -> int:
    if body.cancelled():
        return 1
    error = body.exception()
    if error is None:
        return 0
    if isinstance(error, AitherError) and not life.served:
        raise error
    _log.error("service.failed", exc_info=error)
    return 1


def _end_at_the_latest(after_s: float) -> None:
    """Whatever holds the loop or a thread by then, the process ends."""

    def end() -> None:
        _log.error("service.exit_at_once", after_s=after_s)
        os._exit(_TOO_SLOW)

    timer = threading.Timer(after_s, end)
    timer.daemon = True
    timer.start()


async def _close_telemetry(telemetry: Telemetry) -> None:
    """A collector that is away must not hold up the end: its exporter would try for seconds."""
    closing = threading.Thread(target=telemetry.close, name="close-telemetry", daemon=True)
    closing.start()
    await asyncio.to_thread(closing.join, _TELEMETRY_S)
    if closing.is_alive():
        _log.warning("telemetry.abandoned", after_s=_TELEMETRY_S)


def _watch_signals(life: Life) -> None:
    loop = asyncio.get_running_loop()

    def asked(number: signal.Signals) -> None:
        if life.stopping:
            _log.warning("service.exit_at_once", signal=number.name)
            os._exit(128 + number)
        life.stop(number.name)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked, number)


def _watch_lifeline(life: Life) -> None:
    fd = os.environ.get(LIFELINE_ENV, "")
    if not fd.isdecimal():
        return
    loop = asyncio.get_running_loop()

    def ended() -> None:
        if not os.read(int(fd), 64):
            loop.remove_reader(int(fd))
            life.stop("the starter is gone")

    loop.add_reader(int(fd), ended)


def _settings(name: str, argv: Sequence[str] | None) -> Settings:
    parser = argparse.ArgumentParser(prog=name, description=f"The Aither service {name}.")
    parser.add_argument("--config", type=Path, help="aither.yaml to read")
    parser.add_argument("--data-dir", type=Path, help="folder of everything that is kept")
    parser.add_argument("--port-base", type=int, help="all ports follow from it; 0: any free ones")
    arguments = parser.parse_args(argv)
    given = {"data_dir": arguments.data_dir, "port_base": arguments.port_base}
    return load_settings(arguments.config, {k: v for k, v in given.items() if v is not None})
