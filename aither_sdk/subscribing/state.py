"""How a subscriber stands: what `Subscriber.state` and `Subscriber.statistics()` answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SubscriberState:
    """How it stands. `connected` changes at once, the others when all before them is handled."""

    connected: bool = False
    """Whether a stream is open and Flux has answered on it."""
    reason: str = "not connected yet"
    """Why it is not connected; "" when it is."""
    epoch: str = ""
    """Which life of the log the events come from; "" before the first answer."""
    snapshot_complete: bool = False
    """LAST_PER_SUBJECT: the whole snapshot has been handled. Always True for other starts."""
    caught_up: bool = False
    """Everything that was in the log has been handled; False again when Flux says otherwise."""
    closed: bool = False
    """Whether it is over for good."""


@dataclass(frozen=True, slots=True)
class SubscriberStatistics:
    """Counts since the subscriber was opened, and how it stands."""

    received: int
    """Events received, duplicates not counted."""
    handled: int
    """Events handled: those before the one that was asked for last."""
    duplicates: int
    """Events left out because they came again or out of order."""
    gaps: int
    """Holes that Flux told of."""
    missed_events: int
    """Events that are gone in them, matching or not; where Flux does not know, the sequences."""
    reconnects: int
    """Streams after the first one."""
    connected: bool
    lag_events: int | None
    """Events the log had after the position, by Flux's last word; None before it said anything."""
    silent_s: float | None
    """Seconds since the last message of any kind; None before the first."""
