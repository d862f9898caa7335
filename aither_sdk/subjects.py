"""Subjects and filters: dotted lower-case tokens, `*` for one token, a last `>` for the rest."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from aither_sdk.errors import FieldViolation, InvalidArgument

MAX_TOKENS = 16
MAX_BYTES = 255
MAX_FILTERS = 64
_MEMO_SUBJECTS = 4096
"""Subjects remembered by a FilterSet; a full memo is thrown away whole. 1.6 MB at worst: a thousand
consumer groups have one each. A subject that is not remembered costs 1 us."""

_TOKEN = r"[a-z0-9_-]+"
_SUBJECT = re.compile(rf"{_TOKEN}(?:\.{_TOKEN}){{0,{MAX_TOKENS - 1}}}")
_FILTER_TOKEN = re.compile(rf"{_TOKEN}|\*")


def subject_fault(subject: str) -> str | None:
    """What is wrong with a subject and what would be right, or None."""
    if len(subject) <= MAX_BYTES and _SUBJECT.fullmatch(subject):
        return None
    return _fault(subject, "subject", wildcards=False)


def filter_fault(pattern: str) -> str | None:
    """What is wrong with a filter and what would be right, or None."""
    if len(pattern) > MAX_BYTES:
        return _fault(pattern, "filter", wildcards=True)
    tokens = pattern.split(".")
    if tokens[-1] == ">":
        tokens = tokens[:-1]
    plain = all(_FILTER_TOKEN.fullmatch(token) for token in tokens)
    if plain and pattern.count(".") < MAX_TOKENS:
        return None
    return _fault(pattern, "filter", wildcards=True)


def check_subject(subject: str, field: str = "subject") -> None:
    """Raises InvalidArgument naming `field` when the subject is malformed."""
    fault = subject_fault(subject)
    if fault is not None:
        raise InvalidArgument.of([FieldViolation(field, fault)])


def _fault(text: str, what: str, *, wildcards: bool) -> str:
    example = '"pulse.target.*.changed" or "pulse.>"' if wildcards else '"pulse.tick"'
    if not text:
        return f"an empty {what}; use something like {example}"
    if len(text.encode()) > MAX_BYTES:
        return f"{len(text.encode())} bytes; a {what} has {MAX_BYTES} at most"
    if text.count(".") >= MAX_TOKENS:
        return f"{text.count('.') + 1} tokens; a {what} has {MAX_TOKENS} at most"
    shown = text if len(text) <= 80 else text[:77] + "..."
    if any(token == "" for token in text.split(".")):
        return f'"{shown}" has an empty token; use something like {example}'
    if not wildcards and ("*" in text or ">" in text):
        return f'"{shown}" has a wildcard; events need a plain subject such as {example}'
    if ">" in text:
        return f'"{shown}": ">" may only be the whole last token, as in "pulse.>"'
    if "*" in text:
        return f'"{shown}": "*" may only be a whole token, as in "pulse.target.*.changed"'
    return f'"{shown}" has characters other than a-z 0-9 _ - and dots; use something like {example}'


def filter_violations(filters: Sequence[str]) -> list[FieldViolation]:
    """Everything that is wrong with filters that shall be used together. Of too many only so many
    are looked at as there may be: a request has room for a million."""
    violations = [
        FieldViolation(f"filters[{i}]", fault)
        for i, fault in enumerate(map(filter_fault, filters[:MAX_FILTERS]))
        if fault is not None
    ]
    if len(filters) > MAX_FILTERS:
        told = f"{len(filters)} filters; {MAX_FILTERS} at most"
        violations.append(FieldViolation("filters", told))
    return violations


class FilterSet:
    """A set of filters as one question: does this subject match any of them?

    Two sets with the same `key` give the same answers, whatever order they were written in, so
    subscribers with equal filters can share work. Answers are remembered per subject.
    """

    __slots__ = ("_exact", "_memo", "_pattern", "filters", "key")

    def __init__(self, filters: Iterable[str]) -> None:
        """Raises InvalidArgument naming every malformed filter. None at all means `>`."""
        given = list(filters)
        if violations := filter_violations(given):
            raise InvalidArgument.of(violations)
        self.filters: tuple[str, ...] = tuple(sorted(set(given))) or (">",)
        self.key: str = " ".join(self.filters) if ">" not in self.filters else ">"
        self._exact = frozenset(f for f in self.filters if "*" not in f and ">" not in f)
        wild = [f for f in self.filters if f not in self._exact]
        self._pattern = re.compile("|".join(map(_regex, wild))) if wild else None
        self._memo: dict[str, bool] = {}

    @property
    def matches_all(self) -> bool:
        """True when no subject is left out."""
        return self.key == ">"

    def matches(self, subject: str) -> bool:
        known = self._memo.get(subject)
        if known is None:
            known = self.matches_all or subject in self._exact or self._matches_wild(subject)
            if len(self._memo) >= _MEMO_SUBJECTS:
                self._memo.clear()
            self._memo[subject] = known
        return known

    def _matches_wild(self, subject: str) -> bool:
        return self._pattern is not None and self._pattern.fullmatch(subject) is not None


def _regex(pattern: str) -> str:
    tokens = [r"[^.]+" if token == "*" else re.escape(token) for token in pattern.split(".")]
    if pattern.endswith(">"):
        tokens[-1] = r".+"
    return r"\.".join(tokens)
