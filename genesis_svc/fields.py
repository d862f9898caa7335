"""Reading one mapping of a YAML file field by field, keeping every fault instead of the first."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

from aither_sdk.errors import Fault
from aither_sdk.fault_words import no_such_key, shown
from aither_sdk.spans import SECOND, parse_span, spell_span
from aither_sdk.yaml_file import YamlFile

NAME = re.compile(r"[a-z0-9-]{1,63}")
ACTION_ID = re.compile(r"[a-z0-9_-]{1,63}")


class Fields:
    """One mapping at a key path of a file. Wrong fields become faults and read as their default."""

    def __init__(self, file: YamlFile, at: Sequence[str | int], faults: list[Fault], data: Any):
        self.file = file
        self.at = tuple(at)
        self.faults = faults
        self.ok = isinstance(data, dict)
        self._data: dict[Any, Any] = data if isinstance(data, dict) else {}
        if not self.ok:
            self.fault((), f"{shown(data)} is not a mapping; write `key: value` lines")

    def fault(self, key: Sequence[str | int], message: str) -> None:
        self.faults.append(self.file.fault((*self.at, *key), message))

    def only(self, known: Collection[str]) -> None:
        """Every other key is a fault."""
        for key in self._data:
            if key not in known:
                self.fault((str(key),), no_such_key(key, known))

    def has(self, key: str) -> bool:
        return self._data.get(key) is not None

    def value(self, key: str) -> Any:
        return self._data.get(key)

    def text(self, key: str, *, default: str | None = None, want: str = "a text") -> str:
        """Required unless there is a default."""
        value = self._data.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, str) and value:
            return value
        self.fault((key,), f"missing; give {want}" if value is None else _wrong(value, want))
        return default or ""

    def name(self, key: str, pattern: re.Pattern[str] = NAME) -> str:
        value = self.text(key, want=f"a name of {pattern.pattern}")
        if value and not pattern.fullmatch(value):
            self.fault((key,), _wrong(value, f"a name of {pattern.pattern}"))
            return ""
        return value

    def word(self, key: str, words: Collection[str], *, default: str | None = None) -> str:
        want = "one of " + ", ".join(words)
        value = self.text(key, default=default, want=want)
        if value and value not in words:
            self.fault((key,), _wrong(value, want))
            return default or ""
        return value

    def flag(self, key: str, *, default: bool) -> bool:
        value = self._data.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.fault((key,), _wrong(value, "true or false"))
            return default
        return value

    def whole(self, key: str, least: int, most: int, *, default: int | None = None) -> int:
        value = self._data.get(key)
        if value is None and default is not None:
            return default
        want = f"a whole number, {least}..{most}"
        if type(value) is int and least <= value <= most:
            return value
        self.fault((key,), f"missing; give {want}" if value is None else _wrong(value, want))
        return least if default is None else default

    def number(self, key: str, least: float, most: float, *, default: float) -> float:
        value = self._data.get(key)
        if value is None:
            return default
        if type(value) in (int, float) and least <= value <= most:
            return float(value)
        self.fault((key,), _wrong(value, f"a number, {least:g}..{most:g}"))
        return default

    def duration_s(
        self, key: str, least: float, most: float, *, default: float | None = None
    ) -> float:
        """A span such as 800ms, 30s, 5m, 1h, 1d, in seconds."""
        value = self._data.get(key)
        if value is None and default is not None:
            return default
        want = f"a span such as 30s, {_spelled(least)}..{_spelled(most)}"
        span_ns = parse_span(value) if isinstance(value, str) else None
        if span_ns is not None and least <= span_ns / SECOND <= most:
            return span_ns / SECOND
        self.fault((key,), f"missing; give {want}" if value is None else _wrong(value, want))
        return least if default is None else default

    def mapping(self, key: str) -> Fields:
        """Required."""
        if key not in self._data:
            self.fault((key,), "missing; give a mapping")
            return Fields(self.file, (*self.at, key), [], None)
        return Fields(self.file, (*self.at, key), self.faults, self._data[key])

    def each(self, key: str, *, most: int, empty: bool = False) -> list[Fields]:
        """The mappings of a list. Required; may be empty only if told."""
        value = self._data.get(key)
        if not isinstance(value, list) or (not value and not empty):
            self.fault((key,), "missing or not a list; write one `- ...` item or more")
            return []
        if len(value) > most:
            self.fault((key,), f"{len(value)} items; {most} at most")
            return []
        items = [Fields(self.file, (*self.at, key, i), self.faults, v) for i, v in enumerate(value)]
        return [item for item in items if item.ok]


def _spelled(span_s: float) -> str:
    return spell_span(round(span_s * SECOND))


def _wrong(value: object, want: str) -> str:
    return f"{shown(value)} is not {want}"
