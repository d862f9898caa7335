"""Who comes next: gives events their place in the log and knows which ones it has seen.

Pure and synchronous, so that every log decides alike; the log says when what was staged is safe.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from aither.flux.v1.event_pb2 import Event
from aither_sdk.errors import FailedPrecondition
from flux_svc.frames import Record, encode_body, expire_ns_of, recorded_field, seal

WINDOW_EVENTS = 131_072
"""Events within which source+id are known again; promised in flux_service.proto. About 35 MB."""

Key = tuple[str, str]
"""Source and id."""


class Draft(NamedTuple):
    """An event that was accepted and has no place yet."""

    source: str
    id: str
    subject: str
    body: bytes
    expire_ns: int = 0
    """Wall time from which it is of no interest; 0: never."""


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


def draft(events: Iterable[Event], arrival_ns: int) -> list[Draft]:
    """Encodes events; they may change or be reused afterwards."""
    return [
        Draft(
            event.source,
            event.id,
            event.subject,
            encode_body(event, arrival_ns),
            expire_ns_of(event) if event.HasField("expire_time") else 0,
        )
        for event in events
    ]


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
        self._order: deque[Key] = deque()
        """Keys of the window, oldest first: deleting a dict's front through its iterator is
        quadratic."""
        self._last_sequence = last_sequence
        self._staged: dict[Key, int] = {}
        self._staged_last = last_sequence
        self._newest_of = newest_of
        self._staged_records: list[Record] = []
        self._staged_newest: dict[str, int] = {}
        self._folded = 0
        """How many of the staged records `_staged_newest` knows: none until somebody asks."""
        self._remember(known)

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
        window, staged = self._window, self._staged
        first = sequence = self._staged_last
        recorded = recorded_field(recorded_ns)
        records: list[Record] = []
        ids: list[str] = []
        expiries: list[tuple[int, int]] = []
        results: list[Appended] = []
        batch: dict[Key, int] = {}
        for source, event_id, subject, body, expire_ns in drafts:
            key = (source, event_id)
            known = window.get(key) or staged.get(key) or batch.get(key)
            if known is not None:
                results.append(Appended(known, True))
                continue
            sequence += 1
            batch[key] = sequence
            frame = seal(body, sequence, recorded)
            records.append(Record(sequence, recorded_ns, subject, source, frame))
            ids.append(event_id)
            if expire_ns:
                expiries.append((sequence, expire_ns))
            results.append(Appended(sequence, False))
        if records and expected is not None:
            _check_last(expected, first)
            if expected.subjects:
                self._check_subjects(expected.subjects)
        staged.update(batch)
        self._staged_records += records
        self._staged_last = sequence
        return Staged(records, ids, expiries, results)

    def commit(self) -> None:
        """Everything that was staged is safe."""
        self._remember(self._staged.items())
        self._last_sequence = self._staged_last
        self._clear()

    def abort(self) -> None:
        """Nothing that was staged is true; its sequences will be given again."""
        self._staged_last = self._last_sequence
        self._clear()

    def _clear(self) -> None:
        self._staged = {}
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

    def _remember(self, known: Iterable[tuple[Key, int]]) -> None:
        window, order = self._window, self._order
        for key, sequence in known:
            window[key] = sequence
            order.append(key)
        for _ in range(len(order) - self._window_events):
            window.pop(order.popleft(), None)


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
