"""Every record of a log one by one, whatever state its file is in."""

from __future__ import annotations

import sqlite3
from bisect import bisect_right
from collections import deque
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError

from flux_svc.frames import event_of, expire_ns_of, is_intact

_STEP = 1000
Row = tuple[int, int, int, str, str, str, bytes]
"""Sequence, recorded_ns, crc, subject, source, id, frame: so they were stored."""
Found = tuple[Any, ...]
"""The same as it stands there: one bit makes another kind of a column."""
_COLUMNS = "SELECT sequence, recorded_ns, crc, subject, source, id, frame FROM events"
_ROWS = f"{_COLUMNS} WHERE sequence BETWEEN ? AND ? ORDER BY sequence"
LARGEST = 2**62
_BLIND_STEPS = 100
"""In a row, behind which nothing can be found: so many are tried, for it may be one page only."""
_HIDDEN = "nothing is found there, and the structure of the file is damaged"


@dataclass(frozen=True, slots=True)
class Good:
    """A record whose checksum is right and whose columns say what the event says."""

    row: Row
    expire_ns: int


@dataclass(frozen=True, slots=True)
class Bad:
    """A record, or a range of them, that must not be believed."""

    from_sequence: int
    to_sequence: int
    why: str
    row: Found | None = None
    """None: it cannot be read at all, and it is not known how many there were."""
    mended: Good | None = None
    """The record as it was, where its event is whole and only what stands beside it is not."""


def whole(record: Good | Bad) -> Good | None:
    """The record as it was stored; None: that is not known."""
    return record if isinstance(record, Good) else record.mended


def begin_of(record: Good | Bad) -> int:
    """Its sequence, or the first of its range."""
    return record.row[0] if isinstance(record, Good) else record.from_sequence


def records(connection: sqlite3.Connection, first: int, last: int) -> Iterator[Good | Bad]:
    """All that stands from `first` to `last`, in order. Blocking; a snapshot for each step unless
    the connection is within a transaction. Texts of the connection are read as they stand from then
    on."""
    connection.text_factory = _as_it_stands
    blind = 0
    while first <= last and blind < _BLIND_STEPS:
        end = min(first + _STEP - 1, last)
        yield from _piece(connection, first, end)
        first = end + 1
        following = _following(connection, first)
        blind = blind + 1 if following is None else 0
        if following is not None:
            first = max(first, following)


@dataclass(frozen=True, slots=True)
class Census:
    """What a walk through the table as it lies has met, whatever numbers its tree has."""

    strays: dict[int, Good]
    """Whole events that a search by their number does not find, by their own number."""
    oldest: int
    newest: int
    """Of whole events, by their own numbers; 0: there is none."""


def census(connection: sqlite3.Connection) -> Census:
    """Meets every row twice, from both ends, for a page that cannot be read ends a walk. One bit in
    the number of a row hides it and, from a search, those beside it. Blocking; as `records` it
    changes how texts are read."""
    found = _Ranges()
    for record in records(connection, 0, LARGEST):
        good = whole(record)
        if good is not None:
            found.add(good.row[0])
    strays: dict[int, Good] = {}
    oldest = newest = 0
    for order in ("", "ORDER BY sequence DESC"):
        for row in _walk(connection, order):
            good = _by_itself(row)
            if good is None:
                continue
            own = good.row[0]
            oldest, newest = min(oldest or own, own), max(newest, own)
            if own not in found:
                strays[own] = good
    return Census(strays, oldest, newest)


def between(found: Iterable[Good | Bad], first: int, last: int) -> Iterator[Good | Bad]:
    """Those of these numbers."""
    for record in found:
        if first <= begin_of(record) <= last:
            yield record


def in_their_places(found: Iterable[Good | Bad]) -> Iterator[Good | Bad]:
    """Without the rows whose event is whole and another's number stands before it: it may be the
    number of one that is there as well, and they are among the strays."""
    for record in found:
        if isinstance(record, Bad) and record.mended is None and record.row is not None:
            if _by_itself(record.row) is None:
                yield record
        else:
            yield record


def placed(found: Iterable[Good | Bad], strays: dict[int, Good]) -> Iterator[Good | Bad]:
    """`found`, in order, with the strays in the places of what was missing or bad there."""
    waiting = deque(sorted(strays))

    def until(number: int) -> Iterator[Good]:
        while waiting and waiting[0] < number:
            yield strays[waiting.popleft()]

    for record in found:
        if isinstance(record, Good) or record.mended is not None:
            yield from until(begin_of(record))
            if waiting and waiting[0] == begin_of(record):
                waiting.popleft()
            yield record
            continue
        begin, row = record.from_sequence, record.row
        yield from until(begin)
        while waiting and waiting[0] <= record.to_sequence:
            if begin < waiting[0]:
                yield Bad(begin, waiting[0] - 1, record.why)
            begin, row = waiting[0] + 1, None
            yield strays[waiting.popleft()]
        if begin <= record.to_sequence:
            yield Bad(begin, record.to_sequence, record.why, row)
    yield from until(LARGEST)


class _Ranges:
    """Numbers that mostly rise one by one."""

    def __init__(self) -> None:
        self._low: list[int] = []
        self._high: list[int] = []

    def add(self, number: int) -> None:
        """Not less than any before it."""
        if self._high and number <= self._high[-1] + 1:
            self._high[-1] = max(number, self._high[-1])
        else:
            self._low.append(number)
            self._high.append(number)

    def __contains__(self, number: int) -> bool:
        at = bisect_right(self._low, number) - 1
        return at >= 0 and number <= self._high[at]


def _walk(connection: sqlite3.Connection, order: str) -> Iterator[Found]:
    try:
        yield from connection.execute(f"{_COLUMNS} {order}")
    except sqlite3.DatabaseError:
        return  # what lies behind is met from the other end, or looked up


def _by_itself(row: Found) -> Good | None:
    """The event of a row whatever number the row has; None: it is not whole."""
    if (good := whole(judged(row))) is not None:
        return good
    frame = row[6]
    try:
        own = event_of(frame).sequence
    except (DecodeError, IndexError, TypeError):
        return None
    return whole(judged((own, *row[1:])))


def with_hidden(
    connection: sqlite3.Connection,
    found: Iterable[Good | Bad],
    first: int,
    last: int,
    removed: Container[int],
) -> Iterator[Good | Bad]:
    """`found`, and what a damaged tree may have hidden from it: whatever is missing between `first`
    and `last` is looked up by itself. What is not there either and is not known as `removed` is a
    range that must not be taken for one that retention has emptied. Each sequence comes once."""
    expected = first
    for record in found:
        begin, end = (
            (record.from_sequence, record.to_sequence)
            if isinstance(record, Bad)
            else (record.row[0], record.row[0])
        )
        if begin >= expected:
            yield from _looked_up(connection, expected, begin - 1, removed)
            yield record
            expected = end + 1
    yield from _looked_up(connection, expected, last, removed)


def _looked_up(
    connection: sqlite3.Connection, first: int, last: int, removed: Container[int]
) -> Iterator[Good | Bad]:
    hidden = 0  # the first of those right before that are not there
    for sequence in range(first, last + 1):
        good = next(
            (one for one in _piece(connection, sequence, sequence) if _is(one, sequence)), None
        )
        if good is None and sequence not in removed:
            hidden = hidden or sequence
            continue
        if hidden:
            yield Bad(hidden, sequence - 1, _HIDDEN)
            hidden = 0
        if good is not None:
            yield good
    if hidden:
        yield Bad(hidden, last, _HIDDEN)


def _is(record: Good | Bad, sequence: int) -> bool:
    return isinstance(record, Good) and record.row[0] == sequence


def _following(connection: sqlite3.Connection, first: int) -> int | None:
    """Where the next record is, so that large holes are skipped; None: not known, or none is."""
    try:
        row = connection.execute(
            "SELECT sequence FROM events WHERE sequence >= ? ORDER BY sequence LIMIT 1", (first,)
        ).fetchone()
    except sqlite3.DatabaseError:
        return None
    return int(row[0]) if row else 2**62


def _piece(connection: sqlite3.Connection, first: int, last: int) -> Iterator[Good | Bad]:
    try:
        rows = connection.execute(_ROWS, (first, last)).fetchall()
    except sqlite3.DatabaseError as error:
        if first == last:
            yield Bad(first, last, f"its page cannot be read: {error}")
            return
        middle = (first + last) // 2
        yield from _piece(connection, first, middle)
        yield from _piece(connection, middle + 1, last)
        return
    for row in rows:
        yield judged(row)


def _as_it_stands(text: bytes) -> str:
    """A column that is no text any more must not hide its event."""
    return text.decode(errors="backslashreplace")


def judged(row: Found) -> Good | Bad:
    """Whether a record is what was stored."""
    sequence, _, crc, *_, frame = row
    if not isinstance(frame, bytes) or not is_intact(frame, sequence, crc):
        return Bad(sequence, sequence, "its checksum is wrong", row)
    try:
        event = event_of(frame)
    except (DecodeError, IndexError):
        return Bad(sequence, sequence, "it is not an event", row)
    recorded = event.recorded_time
    said_ns = recorded.seconds * 1_000_000_000 + recorded.nanos
    stored: Row = sequence, said_ns, crc, event.subject, event.source, event.id, frame
    good = Good(stored, expire_ns_of(event))
    if event.sequence != sequence:
        return Bad(sequence, sequence, "it says another sequence", row)
    if stored != row:
        return Bad(sequence, sequence, "its columns differ from the event", row, mended=good)
    return good
