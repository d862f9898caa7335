"""How one group is written down: entries that follow each other, each with the whole header; pure.

A row is as it was written last. So everything before the oldest entry that holds a row's last
writing may be forgotten, and what lies there long is written again (`Book.old_rows`).
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from aither_sdk.errors import FailedPrecondition
from flux_svc.groups.base import ParkedKey
from flux_svc.groups.jetstream.place import Kept
from flux_svc.groups.local.store import Change, Header, PendingRow, RowKey

VERSION = 2
"""Of entries: 1 knew parked events by their sequence alone, which after a seek into another log is
that of an event there as well."""
KEPT_ENTRIES = 512
"""More of them are made fewer."""
_CARRIED_ROWS = 256
"""Rows written again with one entry."""
_PART_BYTES = 128 * 1024


@dataclass(slots=True)
class Book:
    """One group as its journal tells it, and where each thing stands in the stream."""

    header: Header | None = None
    rows: OrderedDict[RowKey, tuple[PendingRow, int]] = field(default_factory=OrderedDict)
    """Row and the entry of its last writing; the oldest writing first."""
    parked: dict[ParkedKey, Kept] = field(default_factory=dict)
    bare_epoch: str = ""
    """Of the log that copies belong to whose subjects name none; every entry tells it on."""
    deleted_at: int = 0
    """The entry that said so; what stands before it belonged to another group of this name."""
    entries: deque[int] = field(default_factory=deque)
    _parts: list[tuple[dict[str, Any], int]] = field(default_factory=list)
    """Of a change that is not whole yet."""

    def read(self, body: bytes, at: int) -> None:
        """Takes the entry that stands at `at`. Raises FailedPrecondition NEWER_SCHEMA."""
        entry = json.loads(body)
        self.entries.append(at)
        if self._parts and self._parts[-1][0]["id"] != entry["id"]:
            self._parts.clear()  # whoever wrote those ended in the middle
        self._parts.append((entry, at))
        if entry["more"]:
            return
        parts, self._parts = self._parts, []
        version = entry.get("version", 1)
        if version > VERSION:
            raise FailedPrecondition(
                f"the groups' journal was written by a newer version of Flux (entries of version "
                f"{version}, this one knows {VERSION}); run that version on every node",
                reason="NEWER_SCHEMA",
                metadata={"schema_version": str(version)},
            )
        if version == 1:
            epoch = entry["header"][1]
            parts = [(_brought_up(part, epoch), place) for part, place in parts]
        for part, place in parts:
            self._apply(part, place)

    def write(self, bodies: Sequence[bytes], places: Sequence[int]) -> None:
        for body, at in zip(bodies, places, strict=True):
            self.read(body, at)

    def found(self, copies: Sequence[Kept]) -> None:
        """Those that are on the parked list; what stands before `deleted_at` is not."""
        for kept in copies:
            sequence, _, epoch = kept.subject.partition(".")
            if kept.at > self.deleted_at:
                self.parked[ParkedKey(int(sequence), epoch or self.bare_epoch)] = kept

    def old_rows(self) -> list[PendingRow]:
        """What keeps old entries needed, when they are many."""
        if len(self.entries) <= KEPT_ENTRIES:
            return []
        found: list[PendingRow] = []
        for row, at in self.rows.values():
            if len(found) >= _CARRIED_ROWS or at > self.entries[len(self.entries) // 2]:
                break
            found.append(row)
        return found

    def forget(self) -> int | None:
        """The entry before which nothing is needed, where that lets go of many."""
        if len(self.entries) <= KEPT_ENTRIES or self._parts:
            return None
        first = next(iter(self.rows.values()), None)
        needed = self.entries[-1] if first is None else first[1]
        useless = sum(at < needed for at in self.entries)
        if useless < KEPT_ENTRIES // 2:
            return None
        while self.entries[0] < needed:
            self.entries.popleft()
        return needed

    def _apply(self, entry: dict[str, Any], at: int) -> None:
        if entry.get("deleted"):
            self.header = None
            self.rows.clear()
            self.parked.clear()
            self.deleted_at = at
            return
        if entry.get("clear"):
            self.rows.clear()
        for told in entry.get("done", ()):
            self.rows.pop(_key(told), None)
        for told, *rest in entry.get("rows", ()):
            key = _key(told)
            self.rows[key] = PendingRow(key, *rest), at
            self.rows.move_to_end(key)
        if "header" in entry:
            settings, *rest = entry["header"]
            self.header = Header(b64decode(settings), *rest)
            self.bare_epoch = entry["bare_epoch"]


def bodies_of(
    change: Change, header: Header, bare_epoch: str, carried: Sequence[PendingRow], id: str
) -> list[bytes]:
    """The entries of a change: several where it is large, and only with the last it counts."""
    told = {row.key for row in change.pending} | set(change.done)
    rows = [] if change.clear_pending else [one for one in carried if one.key not in told]
    rows += change.pending
    parts = list(_parts(rows)) or [[]]
    made: list[dict[str, Any]] = [{"id": id, "more": True, "rows": part} for part in parts]
    made[0] |= {"clear": change.clear_pending, "done": change.done}
    made[-1] |= {
        "more": False,
        "version": VERSION,
        "bare_epoch": bare_epoch,
        "deleted": change.delete,
        "header": [
            b64encode(header.settings).decode(),
            header.epoch,
            header.position,
            header.leader_epoch,
            header.delivered,
            header.acknowledged,
            header.missed,
        ],
    }
    return [json.dumps(one, separators=(",", ":")).encode() for one in made]


def _brought_up(entry: dict[str, Any], epoch: str) -> dict[str, Any]:
    """An entry of version 1, of a group that stood in this log."""
    rows = [
        [[sequence, epoch] if replayed else sequence, attempts, due_ns, reason]
        for sequence, attempts, due_ns, replayed, reason in entry.get("rows", ())
    ]
    done = [key for sequence in entry.get("done", ()) for key in (sequence, [sequence, epoch])]
    return {**entry, "rows": rows, "done": done, "bare_epoch": epoch}


def _key(told: int | list[Any]) -> RowKey:
    return told if isinstance(told, int) else ParkedKey(*told)


def _parts(rows: Sequence[PendingRow]) -> Iterator[list[PendingRow]]:
    part: list[PendingRow] = []
    size = 0
    for row in rows:
        size += 64 + 2 * len(row.reason)
        part.append(row)
        if size > _PART_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part
