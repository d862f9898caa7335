"""The row of totals: what the writer knows of the log at every moment, and what a start begins
with."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass, fields
from operator import attrgetter
from pathlib import Path

from flux_svc.logs.faults import damaged_file


@dataclass(slots=True)
class StreamRow:
    """The row of `stream`. Changed by the writer within its transactions."""

    epoch: str
    floor: int
    last_sequence: int
    events: int
    bytes: int
    latest_ns: int
    commits: int
    held_to: int
    ceiling: int
    """Sequences up to here may have been given out by commits that nobody fsynced: after a power
    failure they are not given again. 0: none."""
    boot_id: str
    """Of the kernel that holds those commits in its memory."""


_COLUMNS = [field.name for field in fields(StreamRow)]
_values = attrgetter(*_COLUMNS)
_SELECT = f"SELECT {', '.join(_COLUMNS)} FROM stream"
_UPDATE = f"UPDATE stream SET {', '.join(f'{name} = ?' for name in _COLUMNS)}"


def load_stream(connection: sqlite3.Connection, path: Path) -> StreamRow:
    row = connection.execute(_SELECT).fetchone()
    if row is None:
        raise damaged_file(path, "it has lost its row of totals")
    return StreamRow(*row)


def store_stream(connection: sqlite3.Connection, stream: StreamRow) -> None:
    connection.execute(_UPDATE, _values(stream))


def boot_id() -> str:
    """Names this boot of the kernel; "" where it does not tell.

    While it stays the same, what was committed without fsync is still in the kernel's memory.
    """
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
