"""How much a publisher may hold and send at once, and what may be asked of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from aither_sdk.errors import FieldViolation, InvalidArgument
from aither_sdk.event_rules import MAX_BATCH_BYTES, MAX_BATCH_EVENTS

WhenFull = Literal["wait", "refuse", "drop_oldest"]

_MAX_BATCH_BYTES = MAX_BATCH_BYTES - 2**10
"""A little is left for the fields beside the events."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a buffer and of its batches."""

    buffer_events: int = 10_000
    buffer_bytes: int = 16 * 2**20
    batch_events: int = 512
    batch_bytes: int = 2**20
    batches_in_flight: int = 8


def check_settings(
    source: str, limits: Limits, when_full: str, ack_timeout_s: float, close_timeout_s: float
) -> None:
    """Raises InvalidArgument naming every setting that is wrong."""
    faults = list(_setting_faults(limits, when_full, ack_timeout_s, close_timeout_s))
    if not 1 <= len(source.encode()) <= 255:
        faults.append(("source", "1..255 bytes: the name of who publishes"))
    if faults:
        raise InvalidArgument.of([FieldViolation(name, told) for name, told in faults])


def _setting_faults(
    limits: Limits, when_full: str, ack_timeout_s: float, close_timeout_s: float
) -> Iterable[tuple[str, str]]:
    if limits.buffer_events < 1 or limits.buffer_bytes < 1:
        yield "buffer_events", "buffer_events and buffer_bytes must be at least 1"
    if not 1 <= limits.batch_events <= MAX_BATCH_EVENTS:
        yield "batch_events", f"must be 1..{MAX_BATCH_EVENTS}"
    if not 1 <= limits.batch_bytes <= _MAX_BATCH_BYTES:
        yield "batch_bytes", f"must be 1..{_MAX_BATCH_BYTES}"
    if limits.batches_in_flight < 1:
        yield "batches_in_flight", "must be at least 1"
    if when_full not in ("wait", "refuse", "drop_oldest"):
        yield "when_full", f'"{when_full}"; must be "wait", "refuse" or "drop_oldest"'
    if ack_timeout_s <= 0 or close_timeout_s < 0:
        yield "ack_timeout_s", "must be above 0, and close_timeout_s not below 0"
