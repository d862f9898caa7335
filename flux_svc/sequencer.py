"""Who comes next: gives events their place in the log and knows which ones it has seen.

Pure and synchronous, so that every log decides alike; the log says when what was staged is safe.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from aither.flux.v1.event_pb2 import Event
from aither_sdk.errors import FailedPrecondition
from flux_svc.frames import Record, encode_body, recorded_field, seal

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
        Draft(event.source, event.id, event.subject, encode_body(event, arrival_ns))
        for event in events
    ]


@dataclass(frozen=True, slots=True)
class Staged:
    """One batch with its places, not yet safe."""

    records: list[Record]
    """What is to be stored; duplicates are not in it."""
    ids: list[str]
    """The ids of `records`."""
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
    ) -> None:
        """`known`: the newest events of the log, oldest first."""
        self._window_events = window_events
        self._window: dict[Key, int] = {}
        self._order: deque[Key] = deque()
        """Keys of the window, oldest first: deleting a dict's front through its iterator is
        quadratic."""
        self._last_sequence = last_sequence
        self._staged: dict[Key, int] = {}
        self._staged_last = last_sequence
        self._remember(known)

    @property
    def last_sequence(self) -> int:
        """The newest sequence that was committed."""
        return self._last_sequence

    def stage(
        self, drafts: Sequence[Draft], recorded_ns: int, expected: Expected | None = None
    ) -> Staged:
        """Gives a batch its places after everything staged before.

        Raises FailedPrecondition WRONG_LAST_SEQUENCE and stages nothing when there is something new
        in the batch and the log would not end where it should.
        """
        window, staged = self._window, self._staged
        first = sequence = self._staged_last
        recorded = recorded_field(recorded_ns)
        records: list[Record] = []
        ids: list[str] = []
        results: list[Appended] = []
        batch: dict[Key, int] = {}
        for source, event_id, subject, body in drafts:
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
            results.append(Appended(sequence, False))
        if records and expected is not None:
            _check_last(expected, first)
        staged.update(batch)
        self._staged_last = sequence
        return Staged(records, ids, results)

    def commit(self) -> None:
        """Everything that was staged is safe."""
        self._remember(self._staged.items())
        self._last_sequence = self._staged_last
        self._staged = {}

    def abort(self) -> None:
        """Nothing that was staged is true; its sequences will be given again."""
        self._staged = {}
        self._staged_last = self._last_sequence

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
