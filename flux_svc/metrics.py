"""What Flux counts, as OpenTelemetry instruments: read when an exporter asks, free otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from opentelemetry import metrics

from flux_svc.fanout.hub import Hub
from flux_svc.logs.base import EventLog
from flux_svc.publishing import Publishing
from flux_svc.retention import Retention


def observe(log: EventLog, hub: Hub, publishing: Publishing) -> None:
    """Registers the instruments of this process; once, after telemetry was opened."""
    meter = metrics.get_meter("flux_svc")
    published, fanout = publishing.statistics, hub.statistics

    def counter(name: str, told: str, unit: str, value: Callable[[], int]) -> None:
        meter.create_observable_counter(name, [_reading(value)], unit=unit, description=told)

    def gauge(name: str, told: str, unit: str, value: Callable[[], int]) -> None:
        meter.create_observable_gauge(name, [_reading(value)], unit=unit, description=told)

    counter(
        "aither.flux.events.published", "Appended", "{event}", lambda: published.published_events
    )
    counter(
        "aither.flux.events.duplicate",
        "Found to be stored already",
        "{event}",
        lambda: published.duplicate_events,
    )
    counter("aither.flux.events.refused", "Refused", "{event}", lambda: published.refused_events)
    counter(
        "aither.flux.events.delivered",
        "Handed to subscribers, each counted once a subscriber",
        "{event}",
        lambda: fanout.delivered_events,
    )
    counter("aither.flux.reads.ring", "Batches from memory", "{batch}", lambda: fanout.ring_reads)
    counter("aither.flux.reads.log", "Batches from the log", "{batch}", lambda: fanout.log_reads)
    gauge("aither.flux.log.events", "Events held", "{event}", lambda: log.info().events)
    gauge("aither.flux.log.size", "Encoded events held", "By", lambda: log.info().bytes)
    gauge(
        "aither.flux.log.last_sequence",
        "Newest sequence",
        "{event}",
        lambda: log.info().last_sequence,
    )


def observe_retention(retention: Retention) -> None:
    """As `observe`, for what leaves the log."""
    meter, statistics = metrics.get_meter("flux_svc"), retention.statistics

    def retired(_options: metrics.CallbackOptions) -> Iterable[metrics.Observation]:
        return [
            metrics.Observation(events, {"aither.flux.retention.rule": rule})
            for rule, events in statistics.by_rule.items()
        ]

    meter.create_observable_counter(
        "aither.flux.events.retired",
        [retired],
        unit="{event}",
        description="Removed by retention, by the bound or the filter of the rule",
    )
    meter.create_observable_counter(
        "aither.flux.events.expired",
        [_reading(lambda: statistics.expired_events)],
        unit="{event}",
        description="Removed since their own time was over",
    )


def _reading(
    value: Callable[[], int],
) -> Callable[[metrics.CallbackOptions], Iterable[metrics.Observation]]:
    return lambda _options: [metrics.Observation(value())]
