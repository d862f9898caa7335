"""Times as people write them on a command line."""

from __future__ import annotations

from datetime import UTC, datetime

EXAMPLE = "2031-01-31T12:00:00Z"


def moment_of(text: str) -> datetime | None:
    """In UTC; local time where the text names no zone. None when it is no time."""
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError):
        return None
