"""Taking events out of the SQLite log: one bounded step, within the writer's transaction."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from flux_svc.logs.sqlite.stream import StreamRow, store_stream
from flux_svc.sequencer import WINDOW_EVENTS

STEP_EVENTS = 1000
"""Events deleted in one transaction; about 10 ms between two groups."""
STEP_BYTES = 8 * 2**20
"""Bytes of the same; whichever bound is met first."""
_IDS_KEPT = 2 * WINDOW_EVENTS
"""Sequences whose ids are kept: twice the window, since sequences may skip ahead."""


@dataclass(frozen=True, slots=True)
class Step:
    """What one step took out."""

    stream: StreamRow
    """As it is now."""
    highest: int
    """The last event that it took; 0: there was none."""
    events: int
    bytes: int
    subjects: Mapping[str, int]
    """Subjects whose newest event (the value) is gone."""


def trim_step(connection: sqlite3.Connection, stream: StreamRow, before: int) -> Step:
    """Takes the oldest events below `before`."""
    return _step(connection, stream, "sequence < ?", before)


def remove_step(
    connection: sqlite3.Connection, stream: StreamRow, sequences: Sequence[int]
) -> Step:
    """Takes those of STEP_EVENTS rising `sequences` that are held, the lowest first."""
    named = "sequence IN (SELECT value FROM json_each(?))"
    return _step(connection, stream, named, json.dumps(sequences))


def _step(connection: sqlite3.Connection, stream: StreamRow, where: str, value: int | str) -> Step:
    run = connection.execute
    sized = _SIZED.format(where=where)
    events, size, highest = run(sized, (value, STEP_EVENTS, STEP_BYTES)).fetchone()
    if not events:
        return Step(stream, 0, 0, 0, {})
    where, bounds = f"{where} AND sequence <= ?", (value, highest)
    subjects = _subjects_without_state(connection, where, bounds)
    oldest_id = stream.last_sequence - _IDS_KEPT
    run("DELETE FROM trimmed_ids WHERE sequence <= ?", (oldest_id,))
    run(
        "INSERT OR REPLACE INTO trimmed_ids SELECT sequence, source, id FROM events "
        f"WHERE {where} AND sequence > ?",
        (*bounds, oldest_id),
    )
    run(f"DELETE FROM expiries WHERE {where}", bounds)
    run(f"DELETE FROM events WHERE {where}", bounds)
    lowest, newest = run(_ENDS).fetchone()
    floor = lowest or stream.last_sequence + 1
    run("DELETE FROM holes WHERE to_sequence < ?", (floor,))
    run(_OLD_TIMES, (floor,))
    following = replace(
        stream,
        floor=floor,
        held_to=newest or 0,
        events=stream.events - events,
        bytes=stream.bytes - size,
    )
    store_stream(connection, following)
    return Step(following, highest, events, size, subjects)


def _subjects_without_state(
    connection: sqlite3.Connection, where: str, bounds: tuple[int | str, int]
) -> dict[str, int]:
    # Many rows in one: every row costs Python's lock.
    found = connection.execute(_NEWEST.format(where=where), bounds).fetchone()
    subjects: dict[str, int] = dict(zip(*map(json.loads, found), strict=True))
    if subjects:
        named = (json.dumps(list(subjects)),)
        connection.execute(
            "DELETE FROM subjects WHERE subject IN (SELECT value FROM json_each(?))", named
        )
    return subjects


_SIZED = """
SELECT count(*), coalesce(sum(size), 0), max(sequence) FROM (
    SELECT sequence, size, sum(size) OVER (ORDER BY sequence) AS total FROM (
        SELECT sequence, length(frame) AS size FROM events
        WHERE {where} ORDER BY sequence LIMIT ?
    )
) WHERE total <= ? OR total = size
"""
"""Events of the next step, at most so many and so many bytes, but one at least."""
_NEWEST = """
SELECT json_group_array(subject), json_group_array(last_sequence) FROM (
    SELECT subjects.subject, last_sequence
    FROM (SELECT sequence, subject FROM events WHERE {where}) AS gone
    JOIN subjects ON subjects.subject = gone.subject AND last_sequence = gone.sequence
)
"""
_OLD_TIMES = """
DELETE FROM times WHERE latest_ns < (
    SELECT latest_ns FROM times WHERE sequence >= ? ORDER BY latest_ns LIMIT 1
)
"""
"""Both columns rise together: it looks at what it deletes and at one row more."""
_ENDS = "SELECT (SELECT min(sequence) FROM events), (SELECT max(sequence) FROM events)"
