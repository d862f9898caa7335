"""Log lines that suit the program they are written in."""

from __future__ import annotations

import logging
from typing import Any

from aither_sdk.words import Words

_WORDS = Words("aither_sdk.stalls")


def say(level: str, event: str, **fields: Any) -> None:
    """See `Words`."""
    _WORDS.say(logging.getLevelNamesMapping()[level.upper()], event, **fields)
