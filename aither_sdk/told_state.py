"""How a client stands, and who is told when that changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Generic, TypeVar

from aither_sdk.words import Words

_log = Words("aither_sdk")

State = TypeVar("State")
"""A frozen dataclass."""


class ToldState(Generic[State]):
    """Holds a state; `on_change` is called with each one that differs from the one before. What it
    raises is logged as `failed`, with `about`, and stops nothing."""

    def __init__(
        self,
        state: State,
        on_change: Callable[[State], None] | None,
        failed: str,
        **about: object,
    ) -> None:
        self.value = state
        self._on_change = on_change
        self._failed = failed
        self._about = about

    def change(self, **changes: bool | str) -> None:
        """Gives the named fields of the state other values."""
        state: Any = replace(self.value, **changes)  # type: ignore[type-var]  # see State
        if state == self.value:
            return
        self.value = state
        if self._on_change is not None:
            try:
                self._on_change(state)
            except Exception:
                _log.exception(self._failed, **self._about)
