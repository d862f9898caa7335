"""What a group keeps, and the port of what keeps it. Memory fulfils it here, SQLite next door."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

from flux_svc.groups.base import Parked, ParkedKey

RowKey = int | ParkedKey
"""What an event that is not done is known by: one of the log by its sequence, one that is replayed
by its key on the parked list."""


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

    key: RowKey
    attempts: int
    due_ns: int
    """Wall time of its next delivery; 0: at once."""
    reason: str
    """Why its last delivery failed."""

    @property
    def sequence(self) -> int:
        return self.key if isinstance(self.key, int) else self.key.sequence


@dataclass(slots=True)
class Change:
    """What became of one group; stored all or none."""

    name: str
    header: Header | None = None
    pending: list[PendingRow] = field(default_factory=list)
    """Written over what is there."""
    done: list[RowKey] = field(default_factory=list)
    """No longer pending."""
    parked: list[Parked] = field(default_factory=list)
    unparked: list[ParkedKey] = field(default_factory=list)
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
    parked: dict[ParkedKey, int]
    """Bytes of the frame; those that are being replayed included."""


class GroupStore(Protocol):
    """Keeps groups. Used on one loop. Raises ResourceExhausted DISK_FULL or Unavailable."""

    persistent: bool

    async def load(self) -> dict[str, Stored]: ...

    async def write(self, change: Change) -> None:
        """All of it or nothing; in the order of the calls. Outlives the process when it returns,
        and the machine if `durable`. Cancelling the caller does not stop it."""
        ...

    async def parked(self, name: str, keys: Sequence[ParkedKey], *, max_bytes: int) -> list[Parked]:
        """Those of these rising keys that are there, up to `max_bytes`, but at least one."""
        ...

    async def close(self) -> None: ...


class MemoryStore:
    """For the memory log: gone with the process, like the events."""

    persistent = False

    def __init__(self) -> None:
        self._headers: dict[str, Header] = {}
        self._pending: dict[str, dict[RowKey, PendingRow]] = {}
        self._parked: dict[str, dict[ParkedKey, Parked]] = {}

    async def load(self) -> dict[str, Stored]:
        return {
            name: Stored(
                header,
                sorted(self._pending[name].values(), key=lambda row: row.sequence),
                {one.key: len(one.frame) for one in self._parked[name].values()},
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
        for gone in change.done:
            pending.pop(gone, None)
        pending.update((row.key, row) for row in change.pending)
        parked.update((one.key, one) for one in change.parked)
        for aside in change.unparked:
            parked.pop(aside, None)

    async def parked(self, name: str, keys: Sequence[ParkedKey], *, max_bytes: int) -> list[Parked]:
        found: list[Parked] = []
        size = 0
        table = self._parked.get(name, {})
        for key in keys:
            one = table.get(key)
            if one is None:
                continue
            size += len(one.frame)
            if found and size > max_bytes:
                break
            found.append(one)
        return found

    async def close(self) -> None:
        pass
