"""What a group keeps, and the port of what keeps it. Memory fulfils it here, SQLite next door."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

from flux_svc.groups.base import Parked


@dataclass(frozen=True, slots=True)
class Header:
    """One group without its single events."""

    settings: bytes
    """A Consumer, defaults filled in."""
    epoch: str
    """Of the log that `position` belongs to."""
    position: int
    """Everything up to this was handed out at least once, did not match, or was gone. What of it is
    not done yet has a PendingRow: few rows, however far acknowledged events lie above the
    checkpoint."""
    leader_epoch: int = 0
    delivered: int = 0
    acknowledged: int = 0
    missed: int = 0


class PendingRow(NamedTuple):
    """An event that was handed out and is neither acknowledged nor parked."""

    sequence: int
    attempts: int
    due_ns: int
    """Wall time of its next delivery; 0: at once."""
    replayed: bool
    """It came from the parked list, which still holds its frame."""
    reason: str
    """Why its last delivery failed."""


@dataclass(slots=True)
class Change:
    """What became of one group; stored all or none."""

    name: str
    header: Header | None = None
    pending: list[PendingRow] = field(default_factory=list)
    """Written over what is there."""
    done: list[int] = field(default_factory=list)
    """No longer pending."""
    parked: list[Parked] = field(default_factory=list)
    unparked: list[int] = field(default_factory=list)
    clear_pending: bool = False
    """Before `pending` is written."""
    delete: bool = False
    """The whole group."""
    durable: bool = False
    """Fsynced before it is answered: survives power failure."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One group as it was found."""

    header: Header
    pending: Sequence[PendingRow]
    """By sequence."""
    parked: dict[int, int]
    """Sequence -> bytes of the frame; those that are being replayed included."""


class GroupStore(Protocol):
    """Keeps groups. Used on one loop. Raises ResourceExhausted DISK_FULL or Unavailable."""

    persistent: bool

    async def load(self) -> dict[str, Stored]: ...

    async def write(self, change: Change) -> None:
        """All of it or nothing; in the order of the calls. Outlives the process when it returns,
        and the machine if `durable`. Cancelling the caller does not stop it."""
        ...

    async def parked(self, name: str, sequences: Sequence[int], *, max_bytes: int) -> list[Parked]:
        """Those of these rising sequences that are there, up to `max_bytes`, but at least one."""
        ...

    async def close(self) -> None: ...


class MemoryStore:
    """For the memory log: gone with the process, like the events."""

    persistent = False

    def __init__(self) -> None:
        self._headers: dict[str, Header] = {}
        self._pending: dict[str, dict[int, PendingRow]] = {}
        self._parked: dict[str, dict[int, Parked]] = {}

    async def load(self) -> dict[str, Stored]:
        return {
            name: Stored(
                header,
                sorted(self._pending[name].values()),
                {one.sequence: len(one.frame) for one in self._parked[name].values()},
            )
            for name, header in self._headers.items()
        }

    async def write(self, change: Change) -> None:
        name = change.name
        if change.delete:
            for table in (self._headers, self._pending, self._parked):
                table.pop(name, None)
            return
        if change.header is not None:
            self._headers[name] = replace(change.header)
        pending = self._pending.setdefault(name, {})
        parked = self._parked.setdefault(name, {})
        if change.clear_pending:
            pending.clear()
        pending.update((row.sequence, row) for row in change.pending)
        _drop(pending, change.done)
        parked.update((one.sequence, one) for one in change.parked)
        _drop(parked, change.unparked)

    async def parked(self, name: str, sequences: Sequence[int], *, max_bytes: int) -> list[Parked]:
        found: list[Parked] = []
        size = 0
        table = self._parked.get(name, {})
        for sequence in sequences:
            one = table.get(sequence)
            if one is None:
                continue
            size += len(one.frame)
            if found and size > max_bytes:
                break
            found.append(one)
        return found

    async def close(self) -> None:
        pass


def _drop(table: dict[int, PendingRow] | dict[int, Parked], sequences: Collection[int]) -> None:
    for sequence in sequences:
        table.pop(sequence, None)
