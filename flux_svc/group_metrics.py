"""What consumer groups tell by metrics; read when an exporter asks, free otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from opentelemetry import metrics

from aither.flux.v1.consumer_service_pb2 import ConsumerState
from flux_svc.groups.base import ConsumerGroups

MAX_GROUPS_NAMED = 100
"""Groups with a label of their own, by name; the others share "other", so that whoever makes groups
cannot make time series without end."""
GROUP = "aither.flux.consumer"
OTHER = "other"


def observe_groups(groups: ConsumerGroups) -> None:
    """Registers the instruments of this process; once, after telemetry was opened."""
    meter = metrics.get_meter("flux_svc")

    def values(value: Callable[[ConsumerState], int]) -> list[tuple[str, int]]:
        return [(name, value(state)) for name, state in groups.states()]

    def gauge(name: str, told: str, value: Callable[[ConsumerState], int]) -> None:
        meter.create_observable_gauge(
            f"aither.flux.consumer.{name}",
            [lambda _options: _by_group(values(value))],
            unit="{event}",
            description=told,
        )

    def counter(name: str, told: str, read: Callable[[], Sequence[tuple[str, int]]]) -> None:
        meter.create_observable_counter(
            f"aither.flux.consumer.{name}",
            [lambda _options: _by_group(read())],
            unit="{event}",
            description=told,
        )

    gauge("lag", "In the log after the checkpoint", lambda state: state.lag_events)
    gauge("outstanding", "Delivered, not acknowledged", lambda state: state.outstanding_events)
    gauge("retrying", "Waiting for another delivery", lambda state: state.retrying_events)
    gauge("parked", "Put aside", lambda state: state.parked_events)
    counter(
        "delivered",
        "Deliveries, each attempt counted",
        lambda: values(lambda state: state.delivered_events),
    )
    counter("redelivered", "Deliveries other than the first of an event", groups.redelivered)
    counter("acknowledged", "Acknowledged", lambda: values(lambda one: one.acknowledged_events))
    counter(
        "missed",
        "Gone before they were delivered",
        lambda: values(lambda state: state.missed_events),
    )


def _by_group(values: Sequence[tuple[str, int]]) -> Iterable[metrics.Observation]:
    named = sorted(values)
    for name, value in named[:MAX_GROUPS_NAMED]:
        yield metrics.Observation(value, {GROUP: name})
    others = sum(value for _, value in named[MAX_GROUPS_NAMED:])
    if others:
        yield metrics.Observation(others, {GROUP: OTHER})
