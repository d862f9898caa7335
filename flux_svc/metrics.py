"""What Flux counts, as OpenTelemetry instruments: read when an exporter asks, free otherwise. All
labels come from small fixed sets.

An exporter asks from a thread of its own: what the loop may change is listed in one step first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from opentelemetry import metrics

from aither.flux.v1 import flux_service_pb2 as pb
from flux_svc.fanout.audience import Audience
from flux_svc.fanout.delivery import reason_name
from flux_svc.fanout.hub import Hub
from flux_svc.logs.base import EventLog
from flux_svc.publishing import Publishing
from flux_svc.retention import Retention

REASON = "aither.flux.reason"
STATE = "aither.flux.subscription.state"
CLIENT = "aither.flux.client"
RULE = "aither.flux.retention.rule"
_APPEND_BOUNDS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_STATES = (
    pb.SUBSCRIPTION_STATE_LIVE,
    pb.SUBSCRIPTION_STATE_CATCHING_UP,
    pb.SUBSCRIPTION_STATE_BLOCKED,
)
Labelled = Callable[[], Mapping[str, int]]


def observe(log: EventLog, hub: Hub, publishing: Publishing, audience: Audience) -> None:
    """Registers the instruments of this process; once, after telemetry was opened."""
    meter = _Meter()
    _observe_publishing(meter, log, publishing)
    _observe_fanout(meter, hub, audience)
    meter.gauge("log.events", "{event}", "Events held", lambda: log.info().events)
    meter.gauge("log.size", "By", "Encoded events held", lambda: log.info().bytes)
    meter.gauge("log.subjects", "{subject}", "Subjects held", lambda: log.info().subjects)
    meter.gauge("log.last_sequence", "{event}", "Newest sequence", lambda: log.info().last_sequence)


def observe_retention(retention: Retention) -> None:
    """As `observe`, for what leaves the log."""
    counts, meter = retention.statistics, _Meter()
    meter.counters(
        "events.retired",
        "{event}",
        "Removed by retention, by the bound or the filter of the rule",
        RULE,
        lambda: counts.by_rule,
    )
    told = "Removed since their own time was over"
    meter.counter("events.expired", "{event}", told, lambda: counts.expired_events)


def _observe_publishing(meter: _Meter, log: EventLog, publishing: Publishing) -> None:
    counts = publishing.statistics
    meter.counter("events.published", "{event}", "Appended", lambda: counts.published_events)
    meter.counter(
        "published.size", "By", "Encoded events appended", lambda: log.info().committed_bytes
    )
    meter.counter(
        "events.duplicate",
        "{event}",
        "Found to be stored already",
        lambda: counts.duplicate_events,
    )
    meter.counters("events.refused", "{event}", "Refused", REASON, lambda: counts.refused_by_reason)
    publishing.on_append = (
        metrics.get_meter("flux_svc")
        .create_histogram(
            "aither.flux.append.duration",
            unit="s",
            description="Until a batch handed to the log is as safe as was asked for",
            explicit_bucket_boundaries_advisory=_APPEND_BOUNDS_S,
        )
        .record
    )


def _observe_fanout(meter: _Meter, hub: Hub, audience: Audience) -> None:
    counts = hub.statistics
    told = "Handed to subscribers, each counted once a subscriber"
    meter.counter("events.delivered", "{event}", told, lambda: counts.delivered_events)
    meter.counter("delivered.size", "By", told, lambda: counts.delivered_bytes)
    meter.counters(
        "events.missed",
        "{event}",
        "Told as missing, each counted once a subscriber",
        REASON,
        lambda: {reason_name(reason): n for reason, n in list(counts.missed_events.items())},
    )
    meter.counter("reads.ring", "{batch}", "Batches from memory", lambda: counts.ring_reads)
    meter.counter("reads.log", "{batch}", "Batches from the log", lambda: counts.log_reads)
    meter.gauges("subscriptions", "{subscription}", "Open", STATE, lambda: _states(audience))
    meter.gauge("lag.max", "{event}", "Of the one furthest behind", audience.max_lag_events)
    meter.gauges("lag", "{event}", "Of the named, the longest", CLIENT, audience.lags)


def _states(audience: Audience) -> dict[str, int]:
    states = audience.states()
    return {
        pb.SubscriptionState.Name(state).removeprefix("SUBSCRIPTION_STATE_"): states[state]
        for state in _STATES
    }


class _Meter:
    """Instruments that are asked: their names, units and words in one line each."""

    def __init__(self) -> None:
        self._meter = metrics.get_meter("flux_svc")

    def counter(self, name: str, unit: str, told: str, value: Callable[[], int]) -> None:
        self._meter.create_observable_counter(
            f"aither.flux.{name}", [_reading(value)], unit=unit, description=told
        )

    def counters(self, name: str, unit: str, told: str, label: str, values: Labelled) -> None:
        self._meter.create_observable_counter(
            f"aither.flux.{name}", [_readings(label, values)], unit=unit, description=told
        )

    def gauge(self, name: str, unit: str, told: str, value: Callable[[], int]) -> None:
        self._meter.create_observable_gauge(
            f"aither.flux.{name}", [_reading(value)], unit=unit, description=told
        )

    def gauges(self, name: str, unit: str, told: str, label: str, values: Labelled) -> None:
        self._meter.create_observable_gauge(
            f"aither.flux.{name}", [_readings(label, values)], unit=unit, description=told
        )


Reading = Callable[[metrics.CallbackOptions], Iterable[metrics.Observation]]


def _reading(value: Callable[[], int]) -> Reading:
    return lambda _options: [metrics.Observation(value())]


def _readings(label: str, values: Labelled) -> Reading:
    return lambda _options: [
        metrics.Observation(value, {label: key}) for key, value in list(values().items())
    ]
