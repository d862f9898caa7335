"""What `aither up` tells while it runs: what changes, and now and then how everything is."""

from __future__ import annotations

import asyncio
import time

from aither.flux.v1.event_pb2 import Event
from aither.flux.v1.flux_service_pb2 import Gap
from aither.genesis.v1.genesis_events_pb2 import GenesisTick
from aither.pulse.v1.pulse_events_pb2 import PulseTick
from aither_cli.flood import Flood
from aither_cli.payloads import unpacked
from aither_cli.rendering import clock_of, gap_words, live_line, seconds
from aither_cli.teller import Teller
from aither_sdk.errors import AitherError
from aither_sdk.subscribing.subscriber import NEW, Subscriber

FILTERS = (
    "pulse.tick",
    "pulse.fleet.changed",
    "pulse.target.*.changed",
    "pulse.reflex.*.fired",
    "sense.anomaly.*",
    "runtime.>",
    "genesis.tick",
    "genesis.decision.*",
    "genesis.task.*.completed",
    "genesis.task.*.failed",
    "genesis.task.*.dead",
    "genesis.command.accepted",
    "genesis.command.rejected",
)
"""Not `>`: what users publish may be a hundred thousand events a second, and has `aither tail`."""
_SUMMARY_EVERY_S = 60.0
_AGAIN_AFTER_S = 5.0


async def follow(address: str, teller: Teller) -> None:
    """Tells of events until cancelled, over every outage of Flux."""
    news = News(teller)
    while True:
        subscriber = Subscriber(
            address,
            FILTERS,
            start=NEW,
            client_name="aither up",
            # The memory log begins anew with every start of Flux.
            on_new_epoch="restart",
            on_gap=news.gap,
        )
        try:
            async with subscriber:
                async for event in subscriber:
                    news.take(event, time.monotonic())
        except Exception as error:
            # What is told matters less than what runs: the services stay up whatever this was.
            why = error.message if isinstance(error, AitherError) else repr(error)
            teller.tell("aither", f"cannot follow events: {why}; trying again", bad=True)
        await asyncio.sleep(_AGAIN_AFTER_S)


class News:
    """Events in, few lines out. Ticks are not told one by one; the newest feeds the summary."""

    def __init__(self, teller: Teller, flood: Flood | None = None) -> None:
        self._teller = teller
        self._flood = flood or Flood()
        self._pulse: PulseTick | None = None
        self._genesis: GenesisTick | None = None
        self._summary_at_s: float | None = None

    def take(self, event: Event, now_s: float) -> None:
        if event.subject in ("pulse.tick", "genesis.tick"):
            self._ticked(event, now_s)
            return
        line = live_line(event)
        if line is None or not self._flood.admits(now_s):
            return
        self._tell_left_out()
        self._teller.tell(line.who, line.text, bad=line.bad, at=clock_of(event)[:8])

    def gap(self, gap: Gap) -> None:
        self._teller.tell("aither", gap_words(gap), bad=True)

    def _ticked(self, event: Event, now_s: float) -> None:
        message = unpacked(event.payload)
        if isinstance(message, PulseTick):
            self._pulse = message
        elif isinstance(message, GenesisTick):
            self._genesis = message
        if self._summary_at_s is None:
            self._summary_at_s = now_s + _SUMMARY_EVERY_S
        if now_s >= self._summary_at_s:
            self._summary_at_s = now_s + _SUMMARY_EVERY_S
            self._tell_left_out()
            for who, text in summary(self._pulse, self._genesis):
                self._teller.tell(who, text)

    def _tell_left_out(self) -> None:
        count = self._flood.take_left_out()
        if count:
            told = f"({count} lines left out; see them all with: aither tail 'runtime.>' ...)"
            self._teller.tell("aither", told)


def summary(pulse: PulseTick | None, genesis: GenesisTick | None) -> list[tuple[str, str]]:
    """How everything is, a line for each service that ticks."""
    lines = []
    if pulse is not None:
        counts = [
            f"{count} {word}"
            for count, word in (
                (pulse.targets_up, "up"),
                (pulse.targets_down, "down"),
                (pulse.targets_unreachable, "unreachable"),
                (pulse.targets_unknown, "unknown"),
            )
            if count or word in ("up", "down")
        ]
        down = f" ({', '.join(pulse.down[:8])})" if pulse.down else ""
        late = seconds(pulse.lag_duration)
        lines.append(("pulse", f"{', '.join(counts)}{down}; tick {pulse.tick}, {late} late"))
    if genesis is not None:
        agents = f"{genesis.agents_idle} agents idle, {genesis.agents_busy} busy"
        took = seconds(genesis.tick_duration)
        lines.append(("genesis", f"{agents}; tick {genesis.tick}, took {took}"))
    return lines
