"""The events of a group that were handed out, or begin again, and are not done. Pure.

Each is out, waits for another delivery, or is on its way to the parked list. Those of the log hold
the checkpoint up, in `_pending`; those that are replayed from the parked list (`aside.py`) do not.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from flux_svc.groups.base import ParkedKey
from flux_svc.groups.local.aside import Aside
from flux_svc.groups.local.store import PendingRow, RowKey, Stored
from flux_svc.groups.local.table import Entry, Phase
from flux_svc.groups.local.unstored import Unstored
from flux_svc.groups.local.waiting import Retries
from flux_svc.groups.settings import BACKOFF_S

FETCHED_EVENTS = 64
"""Events fetched again at once for another delivery."""
_NS = 1e9


class Unfinished:
    """Owned by its core, which gives leases and takes them back."""

    def __init__(self, stored: Stored, unstored: Unstored, max_deliveries: int) -> None:
        self.epoch = stored.header.epoch
        """Of the log that the group stands in."""
        self.max_deliveries = max_deliveries
        self.aside = Aside(stored.parked)
        self.retries = Retries()
        self._unstored = unstored
        self._pending: OrderedDict[int, Entry] = OrderedDict()
        """Rising."""

    def __len__(self) -> int:
        return len(self._pending) + len(self.aside.replays)

    @property
    def of_the_log(self) -> int:
        return len(self._pending)

    @property
    def first(self) -> int | None:
        """The oldest of the log: the checkpoint lies before it."""
        return next(iter(self._pending), None)

    def restore(self, rows: Iterable[PendingRow], now_s: float, now_ns: int) -> None:
        """Takes what was found after a start, and what waits goes on waiting."""
        for row in rows:
            entry = Entry(row.key, row.attempts, crashed=not row.due_ns)
            self.file(entry)
            # A clock that was set back must not make a wait longer than any can be.
            wait_s = min((row.due_ns - now_ns) / _NS, BACKOFF_S[1]) if row.due_ns else 0.0
            self.retry(entry, now_s + wait_s, row.reason or "Flux ended while it was out")

    def row(self, key: RowKey, now_s: float, now_ns: int) -> PendingRow | None:
        """How it is to be stored; None: it is done."""
        entry = self._entry(key)
        if entry is None:
            return None
        wait_s = entry.due_s - now_s if entry.phase is Phase.WAITING else 0.0
        due_ns = now_ns + int(wait_s * _NS) if wait_s > 0 else 0
        return PendingRow(key, entry.attempts, due_ns, entry.reason)

    def file(self, entry: Entry) -> None:
        if isinstance(entry.key, int):
            self._pending[entry.key] = entry
        else:
            self.aside.replays[entry.key] = entry

    def is_replayed(self, sequence: int) -> bool:
        """Whether this event of the log is on its way from the parked list already."""
        replays = self.aside.replays
        return bool(replays) and ParkedKey(sequence, self.epoch) in replays

    # What becomes of one

    def retry(self, entry: Entry, due_s: float, reason: str) -> None:
        """Another delivery, or the parked list when there were enough."""
        if entry.attempts >= self.max_deliveries:
            self.park(entry, f"{reason}; delivered {entry.attempts} times")
            return
        entry.reason = reason
        self.retries.wait(entry, due_s)
        self._unstored.rows.add(entry.key)

    def park(self, entry: Entry, reason: str) -> None:
        self.aside.send(entry, reason)
        self._unstored.rows.add(entry.key)

    def done(self, entry: Entry) -> None:
        self.aside.call_back(entry)
        self._unfile(entry)
        if isinstance(entry.key, ParkedKey):
            self.aside.remove([entry.key])
            self._unstored.unparked.add(entry.key)

    # Frames

    def wanted(self, now_s: float, *, hungry: bool) -> tuple[list[int], list[ParkedKey]]:
        """Whose frames are needed: events of the log, and of the parked list. `hungry`: somebody
        would take one more."""
        if not hungry:
            self.retries.let_go()
        wanting = hungry and self.retries.at_hand < FETCHED_EVENTS
        found = self.retries.ripe(now_s, FETCHED_EVENTS if wanting else 0)
        found += (entry for entry in self.aside.coming(self.epoch) if entry.frame is None)
        keys = [entry.key for entry in found]
        logged = sorted(key for key in keys if isinstance(key, int))
        return logged, sorted(key for key in keys if isinstance(key, ParkedKey))

    def supply(self, key: RowKey, frame: bytes | None) -> bool:
        """A frame that was wanted; None: it is gone, and so the event is done. Whether it is."""
        entry = self._entry(key)
        if entry is None or entry.phase not in (Phase.RIPE, Phase.PARKING):
            return False
        if frame is None:
            if entry.phase is Phase.RIPE:
                self.retries.give_up(entry)
            self.done(entry)
            return True
        if entry.phase is Phase.RIPE:
            self.retries.supply(entry, frame)
        else:
            entry.frame = frame
        return False

    # The parked list

    def to_park(self) -> list[Entry]:
        """Those that can be stored on it now."""
        return [entry for entry in self.aside.coming(self.epoch) if entry.frame is not None]

    def parked_now(self, entries: Iterable[Entry]) -> None:
        """They are stored on it."""
        for entry in entries:
            if self.aside.arrived(entry, self.epoch):
                self._unfile(entry)

    def not_met_again(self, keys: Iterable[ParkedKey]) -> list[ParkedKey]:
        """Those of them that are not on their way from the log at the same time."""
        return [key for key in keys if self._met_again(key) is None]

    def replay(self, keys: Iterable[ParkedKey], now_s: float) -> None:
        """These of it begin again."""
        for key in keys:
            entry = self._met_again(key)
            if entry is None:
                entry = Entry(key)
                self.file(entry)
                self.retry(entry, now_s, "")
                continue
            # It was met in the log again after a seek: one of the two is enough.
            self.aside.remove([key])
            self._unstored.unparked.add(key)
            entry.attempts = 0 if entry.lease is None else 1
            self._unstored.rows.add(entry.key)
            if self.aside.call_back(entry):
                self.retry(entry, now_s, "")

    def forget(self, epoch: str) -> None:
        """All of them, for the group goes on elsewhere; what was being replayed is parked again."""
        self.epoch = epoch
        self._pending.clear()
        self._unstored.rows.clear()
        self.aside.settle()
        self.retries.clear()

    # How it is done

    def _entry(self, key: RowKey) -> Entry | None:
        return self._pending.get(key) if isinstance(key, int) else self.aside.replays.get(key)

    def _met_again(self, key: ParkedKey) -> Entry | None:
        """The same event, on its way from the log."""
        return self._pending.get(key.sequence) if key.epoch == self.epoch else None

    def _unfile(self, entry: Entry) -> None:
        if isinstance(entry.key, int):
            del self._pending[entry.key]
        else:
            del self.aside.replays[entry.key]
        self._unstored.rows.add(entry.key)
