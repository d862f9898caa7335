"""How a mistake in a configuration is worded, the same in every file."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from typing import Any

_SHOWN_CHARACTERS = 60


def no_such_key(key: Any, known: Collection[str]) -> str:
    """For a key that means nothing: the one that was probably meant, or all there are."""
    close = difflib.get_close_matches(str(key), known, n=1)
    hint = f'did you mean "{close[0]}"?' if close else f"use one of {', '.join(known)}"
    return f"no such key; {hint}"


def shown(value: Any) -> str:
    """A value as the file has it, cut where it is long; always text that UTF-8 can carry."""
    if value is None:
        return "nothing"
    text = f'"{value}"' if isinstance(value, str) else repr(value)
    # YAML can spell half a surrogate pair.
    text = text.encode(errors="backslashreplace").decode()
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."
