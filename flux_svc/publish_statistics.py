"""What became of the events that publishers sent, counted."""

from __future__ import annotations

from collections import Counter
from copy import copy
from dataclasses import dataclass, field

from aither_sdk.errors import AitherError

REASONS = frozenset(
    {
        "INVALID_ARGUMENT",
        "BATCH_TOO_LARGE",
        "HOPS_EXCEEDED",
        "EXPIRED",
        "WRONG_LAST_SEQUENCE",
        "EXPECTATION_UNSUPPORTED",
        "DURABILITY_UNSUPPORTED",
        "QUOTA_EXCEEDED",
        "LOG_FULL",
        "WRITE_QUEUE_FULL",
        "DISK_FULL",
        "LOG_CLOSED",
        "DRAINING",
        "LOG_BUSY",
        "LOG_IO_ERROR",
        "LOG_UNREACHABLE",
        "LOG_BEHIND",
        "LOG_REPLACED",
        "LOG_REWOUND",
        "CONTENDED",
        "EVENT_TOO_LARGE",
        "TOO_MANY_STREAMS",
    }
)
"""By which refusals are counted; any other one counts as OTHER, so that a metric stays small."""
TROUBLES = frozenset(
    {
        "LOG_FULL",
        "DISK_FULL",
        "LOG_BUSY",
        "LOG_IO_ERROR",
        "LOG_UNREACHABLE",
        "LOG_BEHIND",
        "LOG_REPLACED",
        "LOG_REWOUND",
    }
)
"""Of them, those that the log is the reason for, whatever is asked of it."""


@dataclass(slots=True)
class PublishStatistics:
    """Counts since the start."""

    published_events: int = 0
    duplicate_events: int = 0
    refused_events: int = 0
    refused_by_reason: Counter[str] = field(default_factory=Counter)
    """The same events by the reason of their refusal, one of REASONS or OTHER."""
    trouble: AitherError | None = None
    """What the newest refusal for one of TROUBLES said; None since an append went well."""

    def refuse(self, events: int, error: AitherError, *, news: bool = True) -> None:
        """`news` False: it was told before, and the log may be well again."""
        if news and error.reason in TROUBLES:
            # Without the traceback, which holds all batches that were refused with it.
            self.trouble = copy(error)
        self.refused_events += events
        self.refused_by_reason[error.reason if error.reason in REASONS else "OTHER"] += events
