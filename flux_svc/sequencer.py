"""Who comes next: gives events their place in the log and knows which ones it has seen.

Pure and synchronous, so that every log decides alike; the log says when what was staged is safe.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from typing import NamedTuple

from aither_sdk.errors import FailedPrecondition
from flux_svc.drafts import Draft
from flux_svc.frames import Record, recorded_field, seal_all

WINDOW_EVENTS = 131_072
"""Events within which source+id are known again; promised in flux_service.proto. About 35 MB."""

Key = tuple[str, str]
"""Source and id."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What a publisher believes of the log; a batch is refused where it is wrong."""

    last_sequence: int | None = None
    """The newest sequence of the log. None: whatever it is."""
    subjects: Mapping[str, int] = field(default_factory=dict)
    """Subject -> sequence of its newest event that is held; 0: none is."""


class Appended(NamedTuple):
    """Where one event of a batch stands."""

    sequence: int
    duplicate: bool
    """It was stored before, or stands earlier in the same batch; `sequence` is where."""


# They take the fields in their order as one tuple; the classes' own calls take 0.2 us more.
_record = partial(tuple.__new__, Record)
_appended = partial(tuple.__new__, Appended)


@dataclass(frozen=True, slots=True)
class Staged:
    """One batch with its places, not yet safe."""

    records: list[Record]
    """What is to be stored; duplicates are not in it."""
    ids: list[str]
    """The ids of `records`."""
    expiries: list[tuple[int, int]]
    """Sequence and `expire_ns` of those records that have one."""
    results: list[Appended]
    """One for each event of the batch."""


class Sequencer:
    """Batches are staged upon each other and become true together with `commit`, or not at all.

    Owned by one thread.
    """

    def __init__(
        self,
        last_sequence: int = 0,
        known: Iterable[tuple[Key, int]] = (),
        *,
        window_events: int = WINDOW_EVENTS,
        newest_of: Callable[[str], int] = lambda _subject: 0,
    ) -> None:
        """`known`: the newest events of the log, oldest first. `newest_of` answers where the newest
        event of a subject stands that is committed and held, 0 for none; asked only where a batch
        expects something of the subject."""
        self._window_events = window_events
        self._window: dict[Key, int] = {}
        """With what is staged."""
        self._order: deque[Key] = deque()
        """Keys of the window that are committed, oldest first: deleting a dict's front through its
        iterator is quadratic."""
        self._last_sequence = last_sequence
        self._staged_keys: list[Key] = []
        self._staged_last = last_sequence
        self._newest_of = newest_of
        self._staged_records: list[Record] = []
        self._staged_newest: dict[str, int] = {}
        self._folded = 0
        """How many of the staged records `_staged_newest` knows: none until somebody asks."""
        for key, sequence in known:
            self._window[key] = sequence
            self._order.append(key)
        self._forget_oldest()

    @property
    def last_sequence(self) -> int:
        """The newest sequence that was committed."""
        return self._last_sequence

    @property
    def staged_last(self) -> int:
        """The newest sequence that was staged or committed."""
        return self._staged_last

    def stage(
        self, drafts: Sequence[Draft], recorded_ns: int, expected: Expected | None = None
    ) -> Staged:
        """Gives a batch its places after everything staged before.

        Raises FailedPrecondition WRONG_LAST_SEQUENCE and stages nothing when there is something new
        in the batch and the log, or a subject of it, would not end where it should.
        """
        first = self._staged_last
        columns = tuple(zip(*drafts, strict=True))
        keys = list(zip(*columns[:2], strict=True))
        places = dict(zip(keys, range(first + 1, first + 1 + len(keys)), strict=True))
        if len(places) == len(keys) and self._window.keys().isdisjoint(places):
            results = list(map(_appended, zip(places.values(), repeat(False))))
        else:
            drafts, places, results = self._sift(drafts, first)
            columns = tuple(zip(*drafts, strict=True))
        if places and expected is not None:
            _check_last(expected, first)
            if expected.subjects:
                self._check_subjects(expected.subjects)
        if not places:
            return Staged([], [], [], results)
        sources, ids, subjects, bodies, expire_ns = columns
        sequences = places.values()
        frames = seal_all(bodies, first + 1, recorded_field(recorded_ns))
        fields = zip(sequences, repeat(recorded_ns), subjects, sources, frames)
        records = list(map(_record, fields))
        expiries: list[tuple[int, int]] = []
        if any(expire_ns):
            expiries = [one for one in zip(sequences, expire_ns, strict=True) if one[1]]
        self._window.update(places)
        self._staged_keys += places
        self._staged_records += records
        self._staged_last = first + len(records)
        return Staged(records, list(ids), expiries, results)

    def commit(self) -> None:
        """Everything that was staged is safe."""
        self._order.extend(self._staged_keys)
        self._forget_oldest()
        self._last_sequence = self._staged_last
        self._clear()

    def abort(self) -> None:
        """Nothing that was staged is true; its sequences will be given again."""
        for key in self._staged_keys:
            del self._window[key]
        self._staged_last = self._last_sequence
        self._clear()

    def _sift(
        self, drafts: Sequence[Draft], first: int
    ) -> tuple[list[Draft], dict[Key, int], list[Appended]]:
        """The drafts that are new, their places after `first`, and an answer for every draft."""
        fresh: list[Draft] = []
        places: dict[Key, int] = {}
        results: list[Appended] = []
        for one in drafts:
            key = (one.source, one.id)
            known = self._window.get(key) or places.get(key)
            if known is None:
                fresh.append(one)
                places[key] = first + len(fresh)
            results.append(Appended(known or places[key], known is not None))
        return fresh, places, results

    def _clear(self) -> None:
        self._staged_keys = []
        self._staged_records = []
        self._staged_newest = {}
        self._folded = 0

    def _check_subjects(self, subjects: Mapping[str, int]) -> None:
        for record in self._staged_records[self._folded :]:
            self._staged_newest[record.subject] = record.sequence
        self._folded = len(self._staged_records)
        for subject, sequence in subjects.items():
            actual = self._staged_newest.get(subject) or self._newest_of(subject)
            if actual != sequence:
                raise _wrong_subject(subject, sequence, actual)

    def _forget_oldest(self) -> None:
        popleft = self._order.popleft
        oldest = [popleft() for _ in range(len(self._order) - self._window_events)]
        deque(map(self._window.pop, oldest, repeat(None)), maxlen=0)


def _check_last(expected: Expected, last: int) -> None:
    if expected.last_sequence is not None and expected.last_sequence != last:
        raise FailedPrecondition(
            f"the log ends at {last}, not at {expected.last_sequence} as expected; read what came "
            "in between and decide again",
            reason="WRONG_LAST_SEQUENCE",
            metadata={"actual": str(last), "expected": str(expected.last_sequence)},
        )


def _wrong_subject(subject: str, expected: int, actual: int) -> FailedPrecondition:
    stands = f"stands at {actual}" if actual else "has no event"
    return FailedPrecondition(
        f'subject "{subject}" {stands}, not at {expected} as expected; read its newest event and '
        "decide again",
        reason="WRONG_LAST_SEQUENCE",
        metadata={"subject": subject, "actual": str(actual), "expected": str(expected)},
    )
