"""The board: the one owner of what is thought of every target.

Definitions come from the roster, results from the prober; everybody else reads. All of it runs on
one loop and nothing here waits, so a reader never sees half a change.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from aither.pulse.v1.pulse_events_pb2 import TargetChanged
from aither.pulse.v1.target_pb2 import CheckResult, Target, TargetStatus
from aither_sdk.clock import Clock
from pulse_svc.news import News
from pulse_svc.spans import duration_of_s
from pulse_svc.verdict import DOWN, UNREACHABLE, State, Told, Verdict, judged, told
from pulse_svc.watchers import Watchers

_NEW, _UNTOLD = Verdict(), Told()
SETTLE_S = 5.0
"""A target whose root cause is over is not called DOWN before this: clients dial again with a
backoff (those of the SDK within 2 s), and only then can it be well."""


@dataclass(slots=True)
class _Entry:
    """One target. Changed by the Board alone."""

    target: Target
    from_fleet: bool
    since_s: float
    since_ns: int
    verdict: Verdict = _NEW
    told: Told = _UNTOLD
    last_result: CheckResult | None = None
    settled_s: float = float("-inf")
    """Its root cause went by so recently that it is not DOWN before this."""


class Board:
    """Verdicts by name. What changes goes to `news` for Flux and to `watchers` for WatchTargets."""

    def __init__(self, clock: Clock, news: News, watchers: Watchers) -> None:
        self._clock = clock
        self._news = news
        self._watchers = watchers
        self._entries: dict[str, _Entry] = {}
        self._needed_by: dict[str, set[str]] = {}
        """Who names a target in `depends_on`, whether that target exists or not."""

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    # -- definitions

    def put(self, target: Target, *, from_fleet: bool) -> None:
        """Adds a target, or gives it another definition. It keeps its state while its check stays
        the same: another check asks another question."""
        name = target.name
        before = self._entries.get(name)
        if before is None:
            now = self._clock.monotonic(), self._clock.time_ns()
            self._entries[name] = _Entry(target, from_fleet, *now)
        else:
            self._unlink(before)
            asks_the_same = before.target.check == target.check
            before.target, before.from_fleet = target, from_fleet
            if not asks_the_same:
                before.verdict, before.last_result = _NEW, None
        for other in target.depends_on:
            self._needed_by.setdefault(other, set()).add(name)
        self._watchers.changed(name)
        self._tell(name, None)

    def remove(self, name: str) -> None:
        entry = self._entries.pop(name)
        self._unlink(entry)
        self._watchers.changed(name)
        for dependent in self._dependents(name):
            self._tell(dependent, None)

    def _dependents(self, name: str) -> list[str]:
        return sorted(self._needed_by.get(name, ()))

    def _unlink(self, entry: _Entry) -> None:
        for other in entry.target.depends_on:
            needed_by = self._needed_by[other]
            needed_by.discard(entry.target.name)
            if not needed_by:
                del self._needed_by[other]

    # -- results

    def record(self, name: str, result: CheckResult) -> list[str]:
        """Takes one result into the verdict and tells what changed, dependents included.

        Returns whom to ask soon: those that are judged anew, because what they depend on is back.
        """
        entry = self._entries[name]
        target = entry.target
        entry.last_result = result
        entry.verdict = judged(entry.verdict, result.ok, target.rise, target.fall)
        return self._tell(name, result)

    def suspect(self, name: str) -> bool:
        """Whether its newest result speaks against what is told: look again soon."""
        return self._entries[name].verdict.suspect

    def ok(self, name: str) -> bool | None:
        """The newest result, if it counts for the verdict."""
        return self._entries[name].verdict.ok

    # -- questions

    def status(self, name: str) -> TargetStatus | None:
        entry = self._entries.get(name)
        return None if entry is None else _status(entry)

    def statuses(
        self, names: Collection[str] = (), states: Collection[State] = ()
    ) -> list[TargetStatus]:
        """Ordered by name; only these names and states, where there are any."""
        return [
            _status(entry)
            for name, entry in sorted(self._entries.items())
            if (not names or name in names) and (not states or entry.told.state in states)
        ]

    def names(self) -> list[str]:
        return sorted(self._entries)

    def count(self) -> dict[State, int]:
        counts: dict[State, int] = {}
        for entry in self._entries.values():
            counts[entry.told.state] = counts.get(entry.told.state, 0) + 1
        return counts

    def down(self, limit: int) -> list[str]:
        """Names of those that are DOWN."""
        names = (name for name, entry in self._entries.items() if entry.told.state == DOWN)
        return sorted(names)[:limit]

    # -- telling

    def _tell(self, name: str, result: CheckResult | None) -> list[str]:
        """Tells anew of a target and of everything above it that this changes; returns those that
        are judged anew. Dependencies make no circle, so this ends."""
        anew: list[str] = []
        waiting: list[tuple[str, CheckResult | None]] = [(name, result)]
        while waiting:
            name, result = waiting.pop()
            entry = self._entries.get(name)
            if entry is not None and self._turn(entry, result):
                waiting.extend((dependent, None) for dependent in self._dependents(name))
                if entry.verdict.ok is None:
                    anew.append(name)
        return anew

    def _turn(self, entry: _Entry, result: CheckResult | None) -> bool:
        """True when what is told of this target is not what it was."""
        before, now = entry.told, self._told(entry)
        if before.state == UNREACHABLE and now.state == DOWN:
            # What it depends on is back. Its own bad results are from before that and prove
            # nothing: it is judged anew, instead of one alarm for everything above.
            entry.verdict, entry.settled_s = _NEW, self._clock.monotonic() + SETTLE_S
            now = self._told(entry)
        if now == before:
            return False
        entry.told = now
        if now.state != before.state:
            self._news.changed(self._change(entry, before, result))
            entry.since_s, entry.since_ns = self._clock.monotonic(), self._clock.time_ns()
        else:
            self._news.blame(entry.target.name, now.root_cause)
        self._watchers.changed(entry.target.name)
        return True

    def _told(self, entry: _Entry) -> Told:
        def of(name: str) -> Told | None:
            other = self._entries.get(name)
            return None if other is None else other.told

        settling = self._clock.monotonic() < entry.settled_s
        return told(entry.verdict.state, entry.target.depends_on, of, settling=settling)

    def _change(self, entry: _Entry, before: Told, result: CheckResult | None) -> TargetChanged:
        lasted_s = self._clock.monotonic() - entry.since_s
        return TargetChanged(
            name=entry.target.name,
            from_state=before.state,
            to_state=entry.told.state,
            result=result,
            previous_duration=duration_of_s(lasted_s),
            root_cause=entry.told.root_cause,
            layer=entry.target.layer,
        )


def _status(entry: _Entry) -> TargetStatus:
    status = TargetStatus(
        target=entry.target,
        state=entry.told.state,
        last_result=entry.last_result,
        streak=entry.verdict.streak,
        from_fleet=entry.from_fleet,
        root_cause=entry.told.root_cause,
    )
    status.since_time.FromNanoseconds(entry.since_ns)
    return status
