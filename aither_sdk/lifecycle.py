"""From start to stop: starting, serving, draining, stopped, with a bound on every step.

`run(name, body)` is the `main` of a service: it reads settings, starts the witness, runs `body` and
drains on SIGTERM or SIGINT. A second signal exits at once.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import NoReturn

from aither_sdk.beat import Phase
from aither_sdk.errors import AitherError, ConfigError
from aither_sdk.health import HealthBoard
from aither_sdk.life import Life
from aither_sdk.logs import configure_logs
from aither_sdk.settings import Settings
from aither_sdk.settings_sources import load_settings
from aither_sdk.stalls.watch import Watch
from aither_sdk.telemetry import Telemetry, open_telemetry
from aither_sdk.version import VERSION
from aither_sdk.words import Words

__all__ = ["LIFELINE_ENV", "Life", "run"]

LIFELINE_ENV = "AITHER_LIFELINE_FD"
"""A file descriptor whose end of file asks the service to stop: it does not outlive its starter."""

_TOO_SLOW = 3
"""Exit status of a drain that was cut off."""
_END_S = 2.0
"""After the drain timeout: for what was cancelled, the witness, the last stalls and telemetry."""
_TELEMETRY_S = 1.0
"""For spans and log lines that are not sent yet."""
_log = Words("aither_sdk")

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
    watch.announce = life.stalled
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
        await asyncio.to_thread(life.stall_post.close)
        await _close_telemetry(telemetry)
    _log.info("service.stopped", reason=life.stop_reason, exit_code=code)
    return code


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
