"""The end of the write-ahead log, looked at before SQLite is trusted with it.

At a start SQLite takes over all commits up to the first frame whose checksum is wrong and forgets
the rest without a word. That is right for a tail that was torn by a power failure, and wrong for a
damage further in: commits that were fsynced and acknowledged lie behind it. Formats:
https://sqlite.org/walformat.html
"""

from __future__ import annotations

import os
import sqlite3
import struct
from contextlib import closing
from pathlib import Path

_HEADER = struct.Struct(">8I")
"""Magic, version, page size, checkpoint number, two salts, two checksums."""
_FRAME = struct.Struct(">4I")
"""Page, size of the file in pages after a commit (0: no commit), two salts; two checksums and the
page follow."""
_FRAME_HEADER_BYTES = 24
_MAGIC = (0x377F0682, 0x377F0683)
_SHM_FRAMES = struct.Struct("=I")
_SHM_FRAMES_AT = 16
"""Where the index beside the write-ahead log says how many of its frames are valid."""


def commits_behind_the_end(path: Path) -> int:
    """How many commits lie in the write-ahead log of `path` behind the point up to which SQLite
    reads it. Changes nothing that matters: a connection that only reads leaves the files there.

    0: the log is whole. 1: its last commit is torn. More: it is damaged further in, or several
    commits that were not fsynced are torn. Raises sqlite3.Error. Blocking; nobody else may have
    the file open.
    """
    wal = path.with_name(path.name + "-wal")
    if not path.exists() or not wal.exists() or wal.stat().st_size <= _HEADER.size:
        return 0
    uri = f"{path.absolute().as_uri()}?mode=ro"
    with closing(sqlite3.connect(uri, uri=True, isolation_level=None)) as connection:
        connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        valid = _valid_frames(path.with_name(path.name + "-shm"))
    descriptor = os.open(wal, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _commits_after(descriptor, valid)
    finally:
        os.close(descriptor)


def _valid_frames(shm: Path) -> int:
    try:
        with shm.open("rb") as file:
            file.seek(_SHM_FRAMES_AT)
            return int(_SHM_FRAMES.unpack(file.read(_SHM_FRAMES.size))[0])
    except (OSError, struct.error):
        return 0


def _commits_after(wal: int, frames: int) -> int:
    header = os.pread(wal, _HEADER.size, 0)
    magic, _version, page_bytes, _number, *rest = _HEADER.unpack(header)
    salts = tuple(rest[:2])
    if magic not in _MAGIC or page_bytes < 512 or page_bytes & (page_bytes - 1):
        return 2  # nobody tears 32 bytes: the header itself is damaged
    if _checksum(header[:24], "<" if magic == _MAGIC[0] else ">") != tuple(rest[2:]):
        return 2
    size = os.fstat(wal).st_size
    commits = 0
    step = _FRAME_HEADER_BYTES + page_bytes
    for at in range(_HEADER.size + frames * step, size - _FRAME.size + 1, step):
        _page, commit, *frame_salts = _FRAME.unpack(os.pread(wal, _FRAME.size, at))
        # Other salts: frames of an earlier round, which were moved into the file long ago.
        if commit and tuple(frame_salts) == salts:
            commits += 1
    return commits


def _checksum(content: bytes, order: str) -> tuple[int, int]:
    first = second = 0
    words = struct.unpack(f"{order}{len(content) // 4}I", content)
    for one, two in zip(words[::2], words[1::2], strict=True):
        first = (first + one + second) & 0xFFFFFFFF
        second = (second + two + first) & 0xFFFFFFFF
    return first, second
