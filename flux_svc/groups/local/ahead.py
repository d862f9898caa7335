"""Events of the log that were read and not yet handed out to anybody. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

READ_AHEAD_EVENTS = 1024
READ_AHEAD_BYTES = 2**20
"""One event more than the bytes may be held."""


class Ahead:
    """In order. Whatever lies between the first of them and `read_position` and is not here did not
    match, or was gone."""

    def __init__(self, position: int) -> None:
        self.read_position = position
        """Everything up to here was looked at."""
        self._ready: deque[tuple[int, bytes]] = deque()
        self._bytes = 0

    @property
    def position(self) -> int:
        """Everything up to here was handed out at least once or needs no handing out."""
        return self._ready[0][0] - 1 if self._ready else self.read_position

    def room(self) -> tuple[int, int]:
        """Events and bytes to read now; (0, 0): read nothing."""
        events = READ_AHEAD_EVENTS - len(self._ready)
        size = READ_AHEAD_BYTES - self._bytes
        # Reading for a handful costs as much as for a thousand.
        if events < READ_AHEAD_EVENTS // 2 or size < READ_AHEAD_BYTES // 2:
            return 0, 0
        return events, size

    def add(self, sequences: Sequence[int], frames: Sequence[bytes], position: int) -> bool:
        """What was read after `read_position`, up to `position`; whether that moved it."""
        self._ready.extend(zip(sequences, frames, strict=True))
        self._bytes += sum(map(len, frames))
        moved = position > self.read_position
        self.read_position = max(self.read_position, position)
        return moved

    def take(self) -> tuple[int, bytes] | None:
        if not self._ready:
            return None
        taken = self._ready.popleft()
        self._bytes -= len(taken[1])
        return taken

    def go_to(self, position: int) -> None:
        """Forgets what is here and reads on behind this."""
        self._ready.clear()
        self._bytes = 0
        self.read_position = position
