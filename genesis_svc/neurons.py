"""Neurons: timers whose firings are events."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from aither.genesis.v1 import genesis_events_pb2
from genesis_svc.ids import fraction
from genesis_svc.schedule import FixedRate


@dataclass(frozen=True, slots=True)
class NeuronSpec:
    """One timer, as the file says."""

    name: str
    every_s: float
    jitter_s: float
    """The first firing is put off by a part of this that follows from the name, so that many
    neurons of one period do not fire together."""


class _Timer:
    def __init__(self, spec: NeuronSpec, now: float) -> None:
        self.spec = spec
        self.rate = FixedRate(now + spec.jitter_s * fraction(spec.name), spec.every_s)
        self.count = 0
        self.missed = 0


class Neurons:
    """All timers. Owned by one task, which waits until `next_at` and then asks `fire`."""

    def __init__(self, specs: Sequence[NeuronSpec], now: float) -> None:
        self._timers = [_Timer(spec, now) for spec in specs]

    @property
    def next_at(self) -> float | None:
        """When the next one is due (monotonic s); None without neurons."""
        return min((timer.rate.next_at for timer in self._timers), default=None)

    def fire(self, now: float) -> list[genesis_events_pb2.NeuronFired]:
        """All that are due, each once however late; what was left out is counted in it."""
        fired = []
        for timer in self._timers:
            beat = timer.rate.take(now)
            if beat is None:
                continue
            timer.count += 1
            timer.missed += beat.skipped
            fired.append(
                genesis_events_pb2.NeuronFired(
                    neuron=timer.spec.name, count=timer.count, missed=timer.missed
                )
            )
        return fired
