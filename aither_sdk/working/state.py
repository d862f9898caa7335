"""How a worker stands: what `Worker.state` and `Worker.statistics()` answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WorkerState:
    """Whether it can get work."""

    connected: bool = False
    """Whether it has joined the group on a stream that lives."""
    reason: str = "not connected yet"
    """Why it is not connected; "" when it is."""
    leading: bool = False
    """Exclusive groups: whether it is the active member."""
    closed: bool = False
    """Whether it is over for good."""


@dataclass(slots=True)
class Tally:
    """Counts since the worker was made; the worker counts up."""

    received: int = 0
    redelivered: int = 0
    acked: int = 0
    nacked: int = 0
    parked: int = 0
    lease_lost: int = 0
    unconfirmed: int = 0
    spared: int = 0
    refused: int = 0
    duplicates: int = 0
    given_back: int = 0


@dataclass(frozen=True, slots=True)
class WorkerStatistics:
    """Counts since the worker was made, and how it stands."""

    received: int
    """Deliveries that were to be handled."""
    redelivered: int
    """Of them, those that were not the first of their event."""
    acked: int
    """Acks sent."""
    nacked: int
    """Handlers that failed or asked for another attempt."""
    parked: int
    """Events that a handler had put aside."""
    lease_lost: int
    """Deliveries that were taken from this worker before it was done; handlers were cancelled."""
    unconfirmed: int
    """Handled events whose ack was not known to have arrived when a stream broke: they may come
    again."""
    spared: int
    """Of them, those that came again in time and were acknowledged without handling them twice."""
    refused: int
    """Acks and nacks that Flux answered as too late: those events are handled again somewhere."""
    duplicates: int
    """Deliveries that came twice with the same ack id."""
    given_back: int
    """Deliveries that were left to the group by a drain."""
    running: int
    """Handlers running."""
    waiting: int
    """Deliveries waiting for a free handler."""
    reconnects: int
    """Streams after the first one."""
    connected: bool
    silent_s: float | None
    """Seconds since the last message of any kind; None before the first."""
