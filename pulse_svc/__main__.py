"""`python -m pulse_svc`: the wiring of Pulse."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

from aither_sdk.clock import SystemClock
from aither_sdk.lifecycle import Life, run
from pulse_svc.board import Board
from pulse_svc.checks import CheckTools, open_check
from pulse_svc.checks.http import open_session
from pulse_svc.default_fleet import default_fleet
from pulse_svc.emitter import Emitter, flux_of_clients
from pulse_svc.fleet_watch import FleetWatch
from pulse_svc.lag import LagMeter
from pulse_svc.news import News
from pulse_svc.prober import Prober
from pulse_svc.roster import Roster
from pulse_svc.servicer import SERVICE_NAME, PulseServicer
from pulse_svc.threads import Threads
from pulse_svc.tick import BUFFER_EVENTS, Ticker
from pulse_svc.vitals import VitalsReader
from pulse_svc.watchers import Watchers

FLUX_CONNECTED = "flux connected"


async def body(life: Life) -> None:
    """Parts in the order of need; left in the reverse."""
    settings, clock = life.settings, SystemClock()
    life.set_fact(FLUX_CONNECTED, False)
    async with AsyncExitStack() as stack:
        lag, names = LagMeter(clock), Threads("names", 8)
        session = await stack.enter_async_context(open_session(names))
        tools = CheckTools(clock, lag, session, names, Threads("processes", 8))
        news, watchers, vitals = News(), Watchers(), VitalsReader(settings.data_dir)
        board = Board(clock, news, watchers)
        prober = Prober(
            board,
            lambda t: open_check(t, tools),
            clock,
            lag,
            settings.pulse.max_checks,
            own_tasks=life.bounded_tasks,
        )
        roster = Roster(board, prober, news)
        parts = [prober.run, vitals.run]
        if settings.pulse.fleet is None:
            roster.apply(default_fleet(settings))
        else:
            watch = FleetWatch(settings.pulse.fleet, roster, news)
            await watch.load()
            parts.append(watch.run)
        emitter = Emitter(settings.flux.address, flux_of_clients(life.dependency))
        stack.push_async_callback(emitter.aclose)
        servicer = PulseServicer(board, roster, watchers, vitals, emitter)
        server = await stack.enter_async_context(
            life.serve(
                settings.pulse.bind,
                settings.pulse.port or 0,
                register=[servicer.register],
                services=[SERVICE_NAME],
            )
        )
        publisher = await stack.enter_async_context(
            life.publisher(
                when_full="drop_oldest", buffer_events=BUFFER_EVENTS, close_timeout_s=1.0
            )
        )
        ticker = Ticker(
            board,
            prober,
            news,
            vitals,
            publisher,
            clock,
            lambda connected: life.set_fact(FLUX_CONNECTED, connected),
        )
        parts.append(ticker.run)
        lag.start()
        stack.callback(lag.stop)
        async with asyncio.TaskGroup() as group:
            # A part that fails takes the service down, loudly, instead of leaving half of it.
            tasks = [group.create_task(part(), name=f"pulse:{part.__qualname__}") for part in parts]
            life.serving(server.address)
            await life.until_stop()
            watchers.close()
            for task in tasks:
                task.cancel()


if __name__ == "__main__":
    run(
        "pulse",
        body,
        services=[SERVICE_NAME],
        health_port=lambda settings: settings.pulse.health_port,
        bind=lambda settings: settings.pulse.bind,
    )
