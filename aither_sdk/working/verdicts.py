"""What becomes of an event after its handler: done, once more, or put aside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MAX_REASON_BYTES = 1024
MOST_DELAY_S = 12 * 3600.0
"""Flux refuses a longer one, and with it the stream."""


class Retry(Exception):
    """Raised by a handler to have the event again, after `delay_s` (12 h at most); None: after the
    group's backoff."""

    def __init__(self, delay_s: float | None = None, reason: str = "") -> None:
        super().__init__(reason or "the handler asked for another attempt")
        self.delay_s = None if delay_s is None else min(max(delay_s, 0.0), MOST_DELAY_S)


class Park(Exception):
    """Raised by a handler to put the event aside: no attempt will do better. Parked events are
    listed and replayed with `Consumers`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to tell Flux of one delivery."""

    kind: Literal["ack", "retry", "park"]
    delay_s: float | None = None
    """Wait before the next delivery; None: the group's backoff list."""
    reason: str = ""


ACK = Verdict("ack")


def judge(error: BaseException, park_on: tuple[type[Exception], ...] = ()) -> Verdict:
    """The verdict on a handler that raised."""
    if isinstance(error, Retry):
        return Verdict("retry", error.delay_s, _short(str(error)))
    if isinstance(error, Park):
        return Verdict("park", reason=_short(str(error)))
    told = _short(f"{type(error).__name__}: {error}")
    return Verdict("park" if isinstance(error, park_on) else "retry", reason=told)


def _short(reason: str) -> str:
    return reason.encode()[:MAX_REASON_BYTES].decode(errors="ignore")
