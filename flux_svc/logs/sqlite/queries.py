"""What the reader of the SQLite log asks: many rows in one, for every row costs Python's lock."""

from __future__ import annotations


def _index(
    where: str, order: str = "", limit: str = "-1", *, subject: bool = False, source: bool = True
) -> str:
    """Sequences, checksums and sizes, and subjects and sources where they are asked for."""
    columns = (", subject" if subject else "") + (", source" if source else "")
    return (
        "SELECT group_concat(sequence), group_concat(crc), group_concat(size), "
        f"{'group_concat(subject)' if subject else 'NULL'}, "
        f"{'json_group_array(source)' if source else 'NULL'} "
        f"FROM (SELECT sequence, crc, length(frame) AS size{columns} FROM events "
        f"WHERE {where} ORDER BY sequence {order} LIMIT {limit})"
    )


_FORWARD = ("sequence > ? AND sequence <= ?", "ASC", "?")
_BACKWARD = ("sequence >= ? AND sequence < ?", "DESC", "?")
INDEX = {
    (backward, subject, source): _index(*where, subject=subject, source=source)
    for backward, where in ((False, _FORWARD), (True, _BACKWARD))
    for subject in (False, True)
    for source in (False, True)
}
"""The index query by what it is needed for: (backward, subject, source)."""
INDEX_NAMED = _index("sequence IN (SELECT value FROM json_each(?))")
ENTRIES = """
SELECT group_concat(sequence), group_concat(recorded_ns), group_concat(size), group_concat(subject)
FROM (
    SELECT sequence, recorded_ns, length(frame) AS size, subject FROM events
    WHERE sequence > ? AND sequence <= ? ORDER BY sequence LIMIT ?
)
"""
EXPIRIES = """
SELECT json_group_array(sequence), json_group_array(expire_ns) FROM expiries
WHERE sequence BETWEEN ? AND ?
"""
EXPIRED = """
SELECT json_group_array(sequence) FROM (
    SELECT sequence FROM expiries WHERE expire_ns <= ? ORDER BY expire_ns LIMIT ?
)
"""
UNREADABLE = """
SELECT from_sequence, to_sequence, events, reason FROM holes
WHERE to_sequence > ? AND from_sequence <= ? ORDER BY from_sequence
"""
