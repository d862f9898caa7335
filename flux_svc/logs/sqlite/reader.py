"""Reading the SQLite log: pure queries on a connection, and the threads that carry them out.

Python lets go of its lock at every row that SQLite steps to and must win it back from a busy event
loop each time: 500 rows beside one took 4.6 s where they take 1 ms alone. So many rows come in one
step, aggregated inside SQLite: first sequences, sizes and checksums, then the chosen frames as one
blob, which is the payload of a message already.
"""

from __future__ import annotations

import asyncio
import json
import queue
import sqlite3
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

from flux_svc.frames import is_intact
from flux_svc.logs.base import IndexEntry, Matches, Missing, ReadResult
from flux_svc.logs.faults import damaged_file, damaged_record, sqlite_fault
from flux_svc.logs.holes import holes
from flux_svc.logs.sqlite import queries as sql

SCAN_EVENTS = 16_384
"""Events looked at in one read, so that a filter which matches nothing holds no thread for long:
about 10 ms."""
_FIRST_STEP = 64
"""Half the events looked at before asking whether it is enough; it doubles from step to step. Few
large events fill an answer, and looking at thousands to take five would cost a page each."""
_NAMED_STEP = 1024
"""Events fetched by their sequences in one step."""
_SHOWN = 200
"""Characters of what Python says of a text that it cannot read; it cites all of it."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What `EventLog.read` was asked; `newest` is the last sequence that may be shown."""

    position: int
    newest: int
    max_events: int
    max_bytes: int
    matches: Matches | None = None
    exclude_sources: frozenset[str] = frozenset()
    until: int | None = None
    backward: bool = False


@dataclass(slots=True)
class _Chosen:
    """Events to be fetched, in the order of reading."""

    sequences: list[int]
    crcs: list[int]
    sizes: list[int]


def read(connection: sqlite3.Connection, path: Path, wanted: Wanted) -> ReadResult:
    """One snapshot of the log, whatever is written or trimmed meanwhile. Blocking."""
    with _snapshot(connection, path):
        floor = _floor(connection)
        if wanted.backward:
            end = floor if wanted.until is None else max(floor, wanted.until)
            start = min(wanted.position, wanted.newest + 1)
        else:
            end = wanted.newest if wanted.until is None else min(wanted.newest, wanted.until)
            # What a client may ask for is larger than any number of SQLite.
            start = max(min(wanted.position, wanted.newest), floor - 1)
        chosen, looked_at, position = _choose(connection, wanted, start, end)
        payload, good = _fetch(connection, chosen, wanted.backward)
        if good < len(chosen.sequences):
            if not good:
                raise damaged_record(path, chosen.sequences[0])
            position = chosen.sequences[good - 1]
        missing = () if wanted.backward else _missing(connection, start, looked_at, position)
    if not wanted.backward:
        # A position beyond the end stays where it is.
        position = max(position, wanted.position)
    reached = position <= end if wanted.backward else position >= end
    return ReadResult(
        payload, chosen.sequences[:good], chosen.sizes[:good], position, reached, floor, missing
    )


def fetch(
    connection: sqlite3.Connection,
    path: Path,
    sequences: Sequence[int],
    exclude_sources: frozenset[str],
) -> ReadResult:
    """The events of rising `sequences`; those trimmed meanwhile are left out. Blocking."""
    payloads: list[bytes] = []
    all_sequences: list[int] = []
    all_sizes: list[int] = []
    gone: set[int] = set(sequences)
    with _snapshot(connection, path):
        floor = _floor(connection)
        for start in range(0, len(sequences), _NAMED_STEP):
            named = json.dumps(sequences[start : start + _NAMED_STEP])
            row = connection.execute(sql.INDEX_NAMED, (named,)).fetchone()
            held, chosen = _parsed(row, None, exclude_sources)
            gone.difference_update(held)
            payload, good = _fetch(connection, chosen, backward=False)
            if good < len(chosen.sequences):
                raise damaged_record(path, chosen.sequences[good])
            payloads.append(payload)
            all_sequences += chosen.sequences
            all_sizes += chosen.sizes
    position = sequences[-1] if sequences else 0
    return ReadResult(
        b"".join(payloads), all_sequences, all_sizes, position, True, floor, gone=sorted(gone)
    )


def index(
    connection: sqlite3.Connection, path: Path, position: int, newest: int, max_events: int
) -> list[IndexEntry]:
    """What is held after `position` without the events themselves. Blocking."""
    bounds = (position, newest, max_events)
    with _snapshot(connection, path):
        row = connection.execute(sql.ENTRIES, bounds).fetchone()
        if row[0] is None:
            return []
        sequences, times, sizes = (json.loads(f"[{column}]") for column in row[:3])
        # Few events have an expiry.
        expiring = connection.execute(sql.EXPIRIES, (sequences[0], sequences[-1])).fetchone()
        expire_ns = dict(zip(*map(json.loads, expiring), strict=True))
        return [
            IndexEntry(sequence, recorded_ns, subject, size, expire_ns.get(sequence, 0))
            for sequence, recorded_ns, subject, size in zip(
                sequences, times, row[3].split(","), sizes, strict=True
            )
        ]


def expired(connection: sqlite3.Connection, path: Path, time_ns: int, max_events: int) -> list[int]:
    """Sequences of events whose time was over at `time_ns`. Blocking."""
    with _snapshot(connection, path):
        row = connection.execute(sql.EXPIRED, (time_ns, max_events)).fetchone()
    return sorted(json.loads(row[0]))


def sequence_at(connection: sqlite3.Connection, path: Path, time_ns: int, newest: int) -> int:
    """Blocking. Between two rows of `times` lie at most a second or some thousand events."""
    with _snapshot(connection, path):
        if connection.execute("SELECT latest_ns FROM stream").fetchone()[0] < time_ns:
            return newest + 1
        before = connection.execute(
            "SELECT sequence FROM times WHERE latest_ns < ? ORDER BY latest_ns DESC LIMIT 1",
            (time_ns,),
        ).fetchone()
        found = connection.execute(
            "SELECT sequence FROM events WHERE sequence > ? AND sequence <= ? AND recorded_ns >= ? "
            "ORDER BY sequence LIMIT 1",
            (before[0] if before else 0, newest, time_ns),
        ).fetchone()
    return int(found[0]) if found else newest + 1


class Readers:
    """A few threads with a connection each. Owned by the log, used on its loop."""

    def __init__(self, connections: Sequence[sqlite3.Connection]) -> None:
        self._connections = list(connections)
        self._free: queue.SimpleQueue[sqlite3.Connection] = queue.SimpleQueue()
        for connection in connections:
            self._free.put(connection)
        self._threads = ThreadPoolExecutor(len(self._connections), "flux-log-read")

    async def run(self, query: Callable[[sqlite3.Connection], T]) -> T:
        """Cancelling the caller leaves the query to end by itself."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._run, query)

    def close(self) -> None:
        """Waits for the queries under way. Blocking."""
        self._threads.shutdown(wait=True)
        for connection in self._connections:
            connection.close()

    def _run(self, query: Callable[[sqlite3.Connection], T]) -> T:
        connection = self._free.get()
        try:
            return query(connection)
        finally:
            self._free.put(connection)


def _choose(
    connection: sqlite3.Connection, wanted: Wanted, position: int, end: int
) -> tuple[_Chosen, list[int], int]:
    """What to fetch, all that was looked at, and up to where that settles it."""
    chosen = _Chosen([], [], [])
    looked_at: list[int] = []
    everything = wanted.matches is None and not wanted.exclude_sources
    index = sql.INDEX[wanted.backward, wanted.matches is not None, bool(wanted.exclude_sources)]
    scanned, size, step = 0, 0, _FIRST_STEP
    while scanned < SCAN_EVENTS:
        step = min(SCAN_EVENTS - scanned, step * 2)
        if everything:
            step = min(step, wanted.max_events - len(chosen.sequences))
        bounds = (end, position) if wanted.backward else (position, end)
        row = connection.execute(index, (*bounds, step)).fetchone()
        held, found = _parsed(row, wanted.matches, wanted.exclude_sources)
        looked_at += held
        sizes = found.sizes[: wanted.max_events - len(chosen.sequences)]
        fits = 0
        for frame_size in sizes:
            size += frame_size
            if size > wanted.max_bytes and (fits or chosen.sequences):
                break
            fits += 1
        chosen.sequences += found.sequences[:fits]
        chosen.crcs += found.crcs[:fits]
        chosen.sizes += found.sizes[:fits]
        if fits < len(found.sequences):
            beyond = found.sequences[fits]
            return chosen, looked_at, beyond + 1 if wanted.backward else beyond - 1
        if len(held) < step:
            at_end = (end < position) == wanted.backward
            return chosen, looked_at, end if at_end else position
        scanned += step
        position = held[-1]
        if len(chosen.sequences) >= wanted.max_events:
            break
    return chosen, looked_at, position


def _missing(
    connection: sqlite3.Connection, after: int, looked_at: list[int], upto: int
) -> tuple[Missing, ...]:
    if upto - after <= bisect_right(looked_at, upto):
        return ()
    rows = connection.execute(sql.UNREADABLE, (after, upto))
    return holes(after, looked_at, upto, [Missing(*row) for row in rows])


def _fetch(connection: sqlite3.Connection, chosen: _Chosen, backward: bool) -> tuple[bytes, int]:
    """The frames joined, and how many there are before the first damaged one."""
    sequences = chosen.sequences
    if not sequences:
        return b"", 0
    low, high = min(sequences[0], sequences[-1]), max(sequences[0], sequences[-1])
    if high - low + 1 == len(sequences):
        joined = _joined(connection, "sequence BETWEEN ? AND ?", (low, high))
    else:
        named = (json.dumps(sequences),)
        joined = _joined(connection, "sequence IN (SELECT value FROM json_each(?))", named)
    sizes = chosen.sizes[::-1] if backward else chosen.sizes
    ends = list(accumulate(sizes))
    view = memoryview(joined)
    frames = [view[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    if backward:
        frames.reverse()
    # `frames.checksum` of each, without a step of Python for every one.
    if ends[-1] == len(joined) and list(map(zlib.crc32, frames, sequences)) == chosen.crcs:
        return (b"".join(frames) if backward else joined), len(sequences)
    intact = map(is_intact, frames, sequences, chosen.crcs)
    good = next((i for i, well in enumerate(intact) if not well), len(sequences))
    return b"".join(frames[:good]), good


def _parsed(
    row: tuple[str | None, str, str, str, str],
    matches: Matches | None,
    exclude_sources: frozenset[str],
) -> tuple[list[int], _Chosen]:
    """All sequences of an index row, and those that are wanted."""
    if row[0] is None:
        return [], _Chosen([], [], [])
    # The JSON scanner reads numbers twice as fast as split and int.
    sequences, crcs, sizes = (json.loads(f"[{column}]") for column in row[:3])
    if not len(sequences) == len(crcs) == len(sizes):
        raise ValueError(_told_between(sequences))
    if matches is None and not exclude_sources:
        return sequences, _Chosen(sequences, crcs, sizes)
    kept: Sequence[int] = range(len(sequences))
    if matches is not None:
        subjects = row[3].split(",")
        # One bit makes a comma of a dot; what follows would pass for its neighbour.
        if len(subjects) != len(sequences):
            raise ValueError(_told_between(sequences))
        distinct = set(subjects)
        good = {subject for subject in distinct if matches(subject)}
        if len(good) < len(distinct):
            kept = [i for i, subject in enumerate(subjects) if subject in good] if good else ()
    if exclude_sources and kept:
        sources = json.loads(row[4])
        kept = [i for i in kept if sources[i] not in exclude_sources]
    if len(kept) == len(sequences):
        return sequences, _Chosen(sequences, crcs, sizes)
    return sequences, _Chosen(
        [sequences[i] for i in kept], [crcs[i] for i in kept], [sizes[i] for i in kept]
    )


def _told_between(sequences: Sequence[int]) -> str:
    return f"a column of an event from {min(sequences)} to {max(sequences)} is not what was written"


def _floor(connection: sqlite3.Connection) -> int:
    return int(connection.execute("SELECT floor FROM stream").fetchone()[0])


def _joined(connection: sqlite3.Connection, where: str, values: tuple[int | str, ...]) -> bytes:
    # LIMIT -1 keeps SQLite from dropping the order; the checksums would tell if it did.
    rows = f"SELECT frame FROM events WHERE {where} ORDER BY sequence LIMIT -1"
    if not concatenates_blobs():
        return b"".join(frame for (frame,) in connection.execute(rows, values))
    joined = f"SELECT CAST(group_concat(frame, '') AS BLOB) FROM ({rows})"
    return connection.execute(joined, values).fetchone()[0] or b""


@cache
def concatenates_blobs() -> bool:
    """Whether this SQLite joins blobs whole; versions before 3.38 may cut them at the first NUL."""
    with closing(sqlite3.connect(":memory:")) as connection:
        probe = (
            "SELECT CAST(group_concat(x, '') AS BLOB) FROM "
            "(SELECT x'4100ff' AS x UNION ALL SELECT x'0042')"
        )
        return bool(connection.execute(probe).fetchone()[0] == b"A\0\xff\0B")


@contextmanager
def _snapshot(connection: sqlite3.Connection, path: Path) -> Iterator[None]:
    try:
        connection.execute("BEGIN")
        try:
            yield
        finally:
            connection.execute("ROLLBACK")
    except sqlite3.Error as error:
        if not hasattr(error, "sqlite_errorcode"):
            # Not SQLite's own, but Python's: a text that is none.
            raise damaged_file(path, str(error)[:_SHOWN]) from error
        raise sqlite_fault(error, path) from error
    except (ValueError, TypeError) as error:
        raise damaged_file(path, str(error)[:_SHOWN]) from error
