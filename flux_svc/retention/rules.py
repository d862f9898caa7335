"""What retention decides, without log and clock."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from aither_sdk.settings import RetentionRule
from aither_sdk.subjects import FilterSet
from flux_svc.logs.base import IndexEntry, Matches

AGE, BYTES, EVENTS, SUPERSEDED = "max_age", "max_bytes", "max_events", "superseded"
"""Names of what the bounds of the whole log retire; rules by subject are named by their filter."""
_FORGET_SUBJECTS = 4096
"""Subjects known before the ledger looks for those that have left the log."""


@dataclass(frozen=True, slots=True)
class SubjectRule:
    """One rule by subject."""

    name: str
    matches: Matches
    max_age_ns: int | None
    keep_events: int | None


def compiled(rules: Iterable[RetentionRule]) -> list[SubjectRule]:
    """The rules of the settings."""
    return [
        SubjectRule(
            rule.filter,
            FilterSet([rule.filter]).matches,
            None if rule.max_age_s is None else int(rule.max_age_s * 1e9),
            rule.max_events_per_subject,
        )
        for rule in rules
    ]


def aged(entries: Sequence[IndexEntry], before_ns: int, now_ns: int) -> tuple[int, bool]:
    """Up to which sequence events are older than `before_ns` (0: none), and whether to look on.

    The order of the log is true and its times may not be: an event that claims to be of the future
    is as old as what came after it.
    """
    upto = 0
    for entry in entries:
        if entry.recorded_ns < before_ns:
            upto = entry.sequence
        elif entry.recorded_ns <= now_ns:
            return upto, False
    return upto, bool(entries)


@dataclass(slots=True)
class Excess:
    """By how much the log is over its bounds; falls as events are retired."""

    aged_to: int = 0
    """Events up to this sequence are too old."""
    events: int = 0
    bytes: int = 0

    def rule(self, entry: IndexEntry) -> str | None:
        """Why this event, the oldest one left, must go; None: it may stay."""
        if entry.sequence <= self.aged_to:
            return AGE
        if self.events > 0:
            return EVENTS
        return BYTES if self.bytes > 0 else None

    def take(self, entry: IndexEntry) -> None:
        self.events -= 1
        self.bytes -= entry.size


@dataclass(slots=True)
class Plan:
    """What to do about a page of the oldest events."""

    upto: int = 0
    """Everything up to here was settled."""
    retired: list[int] = field(default_factory=list)
    by_rule: Counter[str] = field(default_factory=Counter)
    ended: bool = False
    """The bounds are kept."""


def plan(
    entries: Sequence[IndexEntry], excess: Excess, keeps: Callable[[IndexEntry], bool]
) -> Plan:
    """Retires the oldest events until the bounds are kept, but those that `keeps` wants."""
    made = Plan()
    for entry in entries:
        rule = excess.rule(entry)
        if rule is None:
            made.ended = True
            break
        made.upto = entry.sequence
        if not keeps(entry):
            excess.take(entry)
            made.retired.append(entry.sequence)
            made.by_rule[rule] += 1
    return made


class Ledger:
    """What the log holds of each subject, as far as rules ask for it; fed with the whole index.

    Memory: about 200 bytes a subject that a rule with `max_events_per_subject` or
    `keep_last_per_subject` covers, and 8 more for each event kept of it (40 where they are larger
    than a machine's small numbers). Rebuilt from the index at each start.
    """

    def __init__(self, rules: Sequence[SubjectRule], *, keep_last: bool) -> None:
        self._rules = [rule for rule in rules if rule.keep_events is not None]
        self._keep_last = keep_last
        self.position = 0
        """Fed up to here."""
        self._rule_of: dict[str, SubjectRule | None] = {}
        self._last: dict[str, deque[int]] = {}
        """The newest events of subjects with a rule, oldest first."""
        self._newest: dict[str, int] = {}
        """With `keep_last`: the newest event of each subject."""
        self._kept: dict[str, int] = {}
        """Newest events that were spared; they go when they are superseded."""
        self._forget_at = 0
        """From so many subjects on it is looked for those that left; 0: not fed to the end yet."""

    @property
    def is_needed(self) -> bool:
        return self._keep_last or bool(self._rules)

    def feed(self, entries: Sequence[IndexEntry]) -> dict[str, list[int]]:
        """Takes in what comes next in the log; answers what has to go for it, by rule."""
        retired: dict[str, list[int]] = {}
        for entry in entries:
            subject, sequence = entry.subject, entry.sequence
            rule = self._rule(subject)
            if rule is not None and rule.keep_events is not None:
                last = self._last.setdefault(subject, deque())
                last.append(sequence)
                if len(last) > rule.keep_events:
                    retired.setdefault(rule.name, []).append(last.popleft())
            if self._keep_last:
                self._newest[subject] = sequence
                if (spared := self._kept.pop(subject, None)) is not None:
                    retired.setdefault(SUPERSEDED, []).append(spared)
        if entries:
            self.position = entries[-1].sequence
        return retired

    def keeps(self, entry: IndexEntry) -> bool:
        """Whether an event stays as the state of its subject; notes it if so."""
        if self._newest.get(entry.subject) != entry.sequence:
            return False
        self._kept[entry.subject] = entry.sequence
        return True

    @property
    def subjects(self) -> int:
        """Known of."""
        return max(len(self._last), len(self._newest), len(self._rule_of))

    def forget(self, floor: int) -> bool:
        """Lets go of subjects whose events have all left; `floor` is the oldest event held. Fed to
        the end.

        False: few were found this way, because something old is held for long (a state, say) and
        others come and go above it. A new ledger, fed from the beginning, knows them no more.
        """
        known = self.subjects
        self._forget_at = self._forget_at or max(_FORGET_SUBJECTS, 2 * known)
        if known < self._forget_at:
            return True
        for states in (self._newest, self._kept):
            for subject in [one for one, sequence in states.items() if sequence < floor]:
                del states[subject]
        for subject in [one for one, last in self._last.items() if last[-1] < floor]:
            del self._last[subject]
        self._rule_of.clear()
        self._forget_at = max(_FORGET_SUBJECTS, 2 * self.subjects)
        return 2 * self.subjects <= known

    def _rule(self, subject: str) -> SubjectRule | None:
        if not self._rules:
            return None
        try:
            return self._rule_of[subject]
        except KeyError:
            found = next((rule for rule in self._rules if rule.matches(subject)), None)
            self._rule_of[subject] = found
            return found
