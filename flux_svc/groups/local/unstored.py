"""What of a group is not stored as it stands. Pure."""

from __future__ import annotations

from collections.abc import Callable

from flux_svc.groups.base import ParkedKey
from flux_svc.groups.local.store import Change, Header, PendingRow, RowKey


class Unstored:
    """Its core marks what it has changed; its shell stores it, or gives it back."""

    def __init__(self) -> None:
        self.rows: set[RowKey] = set()
        """Of events, pending or not, whose rows are not as they should be."""
        self.unparked: set[ParkedKey] = set()
        self.header = False
        self.fsync = False
        """Somebody acts on it who may not be wrong after a power failure."""

    @property
    def must(self) -> bool:
        """Somebody waits for it, or a crash would cost a redelivery."""
        return bool(self.rows or self.unparked or self.fsync)

    @property
    def may(self) -> bool:
        """Something is not stored, but nobody would miss it."""
        return self.header

    def take(
        self, name: str, header: Header, row_of: Callable[[RowKey], PendingRow | None]
    ) -> Change:
        """All of it; counts as stored until `give_back`. `row_of` tells a row as it stands; None:
        its event is done."""
        change = Change(name, header=header, durable=self.fsync)
        for key in self.rows:
            row = row_of(key)
            if row is None:
                change.done.append(key)
            else:
                change.pending.append(row)
        change.unparked += self.unparked
        self.rows.clear()
        self.unparked.clear()
        self.header = self.fsync = False
        return change

    def give_back(self, change: Change) -> None:
        """It is to be stored again, as it stands then."""
        self.rows.update(change.done)
        self.rows.update(row.key for row in change.pending)
        self.unparked.update(change.unparked)
        self.header = True
        self.fsync = self.fsync or change.durable
