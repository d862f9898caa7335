"""Recorded histories of publishers and subscribers, and what must hold of them.

A history is a list of entries, one for each thing a client did or was told, in its order:

    {"who", "say": "send", "batch", "events": [[id, subject], ...]}   before a batch is sent
    {"who", "say": "acked", "batch", "sequences"}                     its answer; none: not known
    {"who", "say": "refused", "batch"}                                it says: nothing was stored
    {"who", "say": "open", "filters", "start", "after", "excluded"}   before a stream is opened
    {"who", "say": "told", "events": [[sequence, source, id, subject], ...], "control", ...}

`violations` judges it by the six promises of docs/flux.md. A batch is atomic; `who` of a publisher
is its events' source.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from google.protobuf.json_format import MessageToDict

from aither.flux.v1 import flux_service_pb2 as pb
from aither.flux.v1.event_pb2 import Event
from aither_sdk.subjects import FilterSet

Entry = Mapping[str, Any]
_POSITIONS = {
    "progress": "sequence",
    "caught_up": "sequence",
    "snapshot_end": "sequence",
    "fell_behind": "sequence",
    "closing": "resume_sequence",
}
_SHOWN = 20


class Seen(NamedTuple):
    """One event as somebody saw it."""

    sequence: int
    source: str
    id: str
    subject: str

    @property
    def key(self) -> str:
        return f"{self.source}/{self.id}"


def seen(event: Event) -> Seen:
    return Seen(event.sequence, event.source, event.id, event.subject)


class Recorder:
    """One client's entries, in memory and, with a path, in a file that survives SIGKILL."""

    def __init__(self, who: str, path: Path | None = None) -> None:
        self.who = who
        self.entries: list[Entry] = []
        self.counts: Counter[str] = Counter()
        """By what they say."""
        self._file = None if path is None else os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def add(self, say: str, **fields: Any) -> None:
        entry = {"who": self.who, "say": say, **fields}
        self.entries.append(entry)
        self.counts[say] += 1
        if self._file is not None:
            # One write: it is in the kernel's hands whatever becomes of this process.
            os.write(self._file, json.dumps(entry).encode() + b"\n")

    def send(self, batch: int, events: Iterable[Event]) -> None:
        self.add("send", batch=batch, events=[[event.id, event.subject] for event in events])

    def acked(self, batch: int, sequences: Iterable[int]) -> None:
        self.add("acked", batch=batch, sequences=list(sequences))

    def open(self, request: pb.SubscribeRequest) -> None:
        self.add(
            "open",
            filters=list(request.filters),
            excluded=list(request.exclude_sources),
            start=request.WhichOneof("start") or "new",
            after=request.after_sequence,
        )

    def told(self, message: pb.SubscribeResponse) -> None:
        control = message.WhichOneof("control")
        fields: dict[str, Any] = {}
        if control is not None:
            fields = _fields(getattr(message, control))
        events = [list(seen(event)) for event in message.events]
        self.add("told", events=events, control=control, **fields)


def _fields(control: Any) -> dict[str, Any]:
    """Numbers as numbers; enums by name."""
    found = MessageToDict(
        control, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return {
        name: int(value) if isinstance(value, str) and value.isdigit() else value
        for name, value in found.items()
        if name != "epoch"
    }


def read_entries(path: Path) -> list[Entry]:
    """What a client wrote; a last line that its kill cut off is left out."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def standing(entries: Sequence[Entry]) -> int | None:
    """Where a subscriber goes on from, by what it recorded; None before its first stream."""
    follower = _Follower("", entries, _Log())
    return None if follower.begin is None else follower.line


def verify(
    entries: Iterable[Entry],
    *,
    name: str,
    stored: Sequence[Seen] | None = None,
    first_held: int = 1,
    removed: Collection[int] = (),
) -> None:
    """Raises AssertionError with what is wrong and the file that keeps the whole history.

    `stored`: the log as a newcomer read it in the end, from `first_held` on, without what was
    `removed` one by one. `name` says which test and seed it was.
    """
    entries = list(entries)
    found = violations(entries, stored=stored, first_held=first_held, removed=removed)
    if not found:
        return
    folder = Path(tempfile.gettempdir()) / "aither-histories"
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-{os.getpid()}.jsonl"
    rest = [{"who": "", "say": "stored", "event": list(one)} for one in stored or ()]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in [*entries, *rest]))
    told = "\n  ".join(found[:_SHOWN])
    raise AssertionError(f"{len(found)} violations; the history is in {path}\n  {told}")


def violations(
    entries: Sequence[Entry],
    *,
    stored: Sequence[Seen] | None = None,
    first_held: int = 1,
    removed: Collection[int] = (),
) -> list[str]:
    """Everything that contradicts the promises, in words; empty when all of them were kept."""
    clients: dict[str, list[Entry]] = {}
    for entry in entries:
        clients.setdefault(entry["who"], []).append(entry)
    log = _Log()
    followers = []
    for who, own in clients.items():
        log.take_publisher(who, own)
        if any(entry["say"] == "open" for entry in own):
            followers.append(_Follower(who, own, log))
    for one in stored or ():
        log.place(one, "the log")
    log.infer_batches()
    for follower in followers:
        follower.check_reliable(first_held, removed)
    if stored is not None:
        log.check_stored(stored, first_held, removed)
    return log.wrong


@dataclass(slots=True)
class _Batch:
    """What a publisher did with one batch."""

    who: str
    events: list[tuple[str, str]]
    sequences: list[int] | None = None
    refused: bool = False


@dataclass(slots=True)
class _Log:
    """What all of them together say is in the log."""

    wrong: list[str] = field(default_factory=list)
    events: dict[int, Seen] = field(default_factory=dict)
    places: dict[str, int] = field(default_factory=dict)
    batches: list[_Batch] = field(default_factory=list)

    def place(self, one: Seen, by: str) -> None:
        """Unique: one event, one place; one place, one event."""
        if self.places.setdefault(one.key, one.sequence) != one.sequence:
            at = self.places[one.key]
            self.wrong.append(f"{by}: {one.key} stands at {one.sequence} and at {at}")
        known = self.events.setdefault(one.sequence, one)
        if known.key != one.key:
            self.wrong.append(f"{by}: at {one.sequence} stand {one.key} and {known.key}")

    def take_publisher(self, who: str, entries: Sequence[Entry]) -> None:
        batches: dict[int, _Batch] = {}
        for entry in entries:
            if entry["say"] == "send":
                events = [(id_, subject) for id_, subject in entry["events"]]
                batches.setdefault(entry["batch"], _Batch(who, events))
            elif entry["say"] == "acked":
                self._take_answer(batches[entry["batch"]], entry["sequences"])
            elif entry["say"] == "refused":
                batches[entry["batch"]].refused = True
        self.batches += batches.values()

    def _take_answer(self, batch: _Batch, sequences: list[int]) -> None:
        batch.sequences = sequences
        expected = list(range(sequences[0], sequences[0] + len(batch.events)))
        if sequences != expected:
            self.wrong.append(f"{batch.who}: a batch is not whole and adjacent: {sequences}")
        for sequence, (id_, subject) in zip(sequences, batch.events, strict=False):
            self.place(Seen(sequence, batch.who, id_, subject), batch.who)

    def infer_batches(self) -> None:
        """Atomic: where one event of a batch stands, the others stand beside it."""
        for batch in self.batches:
            keys = [f"{batch.who}/{id_}" for id_, _ in batch.events]
            bases = {self.places[key] - i for i, key in enumerate(keys) if key in self.places}
            if len(bases) > 1:
                self.wrong.append(f"{batch.who}: the batch of {keys[0]} is torn apart: {bases}")
            elif bases and batch.refused:
                self.wrong.append(f"{batch.who}: {keys[0]} was refused and is there")
            elif bases:
                (base,) = bases
                for i, (id_, subject) in enumerate(batch.events):
                    self.place(Seen(base + i, batch.who, id_, subject), batch.who)
        self._check_publishers()

    def _check_publishers(self) -> None:
        """Ordered: each publisher's batches in its order, as it sends one after the other."""
        last: dict[str, int] = {}
        for batch in self.batches:
            place = self.places.get(f"{batch.who}/{batch.events[0][0]}")
            if place is not None:
                if place < last.get(batch.who, 0):
                    self.wrong.append(f"{batch.who}: what it sent later stands earlier, at {place}")
                last[batch.who] = place

    def check_stored(
        self, stored: Sequence[Seen], first_held: int, removed: Collection[int]
    ) -> None:
        sequences = [one.sequence for one in stored]
        if sequences != sorted(set(sequences)):
            self.wrong.append("the log: it is not read in order, each event once")
        held = {*sequences, *removed}
        for sequence, one in self.events.items():
            if sequence >= first_held and sequence not in held:
                self.wrong.append(f"{one.key} at {sequence} was acknowledged or seen, and is lost")


@dataclass(slots=True)
class _Gap:
    first: int
    last: int
    reason: str
    missing: int
    settled: int = 0
    """Where the stream stood when it ended: the gap speaks of what is up to here."""


class _Follower:
    """One subscriber over all its streams: what came, what was told, and where it stands."""

    def __init__(self, who: str, entries: Sequence[Entry], log: _Log) -> None:
        self.who = who
        self.log = log
        self.begin: int | None = None
        self.line = 0
        """Everything up to here came, was told as missing, or did not match."""
        self.came: dict[int, Seen] = {}
        self.gaps: list[_Gap] = []
        self.snapshot_end = 0
        self.matches: Callable[[str], bool] = lambda _: True
        self.excluded: frozenset[str] = frozenset()
        for stream in _streams(entries):
            self._follow(stream)

    def _wrong(self, told: str) -> None:
        self.log.wrong.append(f"{self.who}: {told}")

    def _follow(self, stream: Sequence[Entry]) -> None:
        opened, *messages = stream
        filters = FilterSet(opened["filters"])
        self.matches, self.excluded = filters.matches, frozenset(opened["excluded"])
        if not messages:
            return
        self._start(opened, messages[0])
        in_snapshot = opened["start"] == "last_per_subject"
        gaps = len(self.gaps)
        for at, message in enumerate(messages):
            for event in message["events"]:
                self._take(Seen(*event))
            control = message["control"]
            if control == "started" and at:
                self._wrong("`started` came twice on one stream")
            elif control == "gap":
                self._take_gap(message)
            elif control in _POSITIONS:
                if control == "snapshot_end":
                    in_snapshot, self.snapshot_end = False, message["sequence"]
                if not in_snapshot:
                    self._reach(message[_POSITIONS[control]], control)
            if control == "closing" and at + 1 < len(messages):
                self._wrong("something came after `closing`")
        for gap in self.gaps[gaps:]:
            gap.settled = self.line

    def _start(self, opened: Entry, first: Entry) -> None:
        """Resumable: a stream goes on where the one before it ended."""
        if first["control"] != "started":
            self._wrong(f"a stream began with {first['control']}")
            return
        position = first["position"]
        if opened["start"] == "after_sequence":
            if position != opened["after"]:
                self._wrong(f"asked for what is after {opened['after']}, begun at {position}")
            if self.begin is not None and position != self.line:
                self._wrong(f"resumed at {position} after it stood at {self.line}")
        elif self.begin is not None and opened["start"] != "last_per_subject":
            self._wrong(f"resumed with {opened['start']}")
        if self.begin is None:
            self.begin = position
        self.line = position

    def _take(self, one: Seen) -> None:
        """Ordered and bookmarkable: nothing at or below what was passed."""
        if one.sequence <= self.line:
            self._wrong(f"{one.sequence} came after everything up to {self.line}")
        if one.sequence in self.came and self.came[one.sequence] == one:
            self._wrong(f"{one.sequence} came twice")
        if not self.matches(one.subject) or one.source in self.excluded:
            self._wrong(f"{one.sequence} ({one.subject} of {one.source}) was not asked for")
        self.log.place(one, self.who)
        self.came[one.sequence] = one
        self.line = max(self.line, one.sequence)

    def _take_gap(self, message: Entry) -> None:
        reason = message["reason"].removeprefix("GAP_REASON_")
        gap = _Gap(
            message["from_sequence"], message["to_sequence"], reason, message["missing_events"]
        )
        self.gaps.append(gap)
        if not self.line < gap.first <= gap.last:
            self._wrong(f"a gap {gap.first}..{gap.last} where it stands at {self.line}")
        if gap.missing > gap.last - gap.first + 1:
            self._wrong(f"{gap.missing} events are missing in the gap {gap.first}..{gap.last}")
        if reason in ("TRIMMED", "UNREADABLE"):
            self.line = max(self.line, gap.last)

    def _reach(self, position: int, control: str) -> None:
        """Bookmarkable: a bookmark never goes back; `_take` sees that nothing comes below it."""
        if position < self.line:
            self._wrong(f"{control} says {position} where it stands at {self.line}")
        self.line = max(self.line, position)

    def check_reliable(self, first_held: int, removed: Collection[int]) -> None:
        """Every event between begin and end that it asked for came, or a gap told of it."""
        if self.begin is None:
            return
        asked = [
            one
            for sequence, one in sorted(self.log.events.items())
            if self.begin < sequence <= self.line and self.matches(one.subject)
        ]
        newest: dict[str, list[int]] = {}
        for one in asked:
            newest.setdefault(one.subject, []).append(one.sequence)
        lost = [
            one
            for one in asked
            if one.source not in self.excluded
            and one.sequence not in self.came
            and not self._is_excused(one, newest[one.subject], removed)
        ]
        for one in lost:
            if not any(self._counts(gap, one, lost) for gap in self.gaps):
                self._wrong(f"{one.key} at {one.sequence} ({one.subject}) never came, untold")
        for gap in self.gaps:
            if gap.reason == "TRIMMED" and gap.last >= first_held:
                self._wrong(f"told that {gap.first}..{gap.last} is trimmed; it is held")

    def _is_excused(self, one: Seen, of_subject: Sequence[int], removed: Collection[int]) -> bool:
        """By a snapshot that had something newer, or by a gap that says it is gone."""

        def superseded(end: int) -> bool:
            return any(one.sequence < other <= end for other in of_subject)

        if one.sequence <= self.snapshot_end and superseded(self.snapshot_end):
            return True
        return any(
            # What is newest in a conflated range must come, unless its subject lost its state.
            gap.reason in ("TRIMMED", "UNREADABLE")
            or (gap.reason == "CONFLATED" and (one.sequence in removed or superseded(gap.last)))
            for gap in self.gaps
            if gap.first <= one.sequence <= gap.last
        )

    def _counts(self, gap: _Gap, one: Seen, lost: Sequence[Seen]) -> bool:
        """Whether a gap among whose range others are held has this one in its number."""
        end = min(gap.last, gap.settled)
        if gap.reason != "COMPACTED" or not gap.first <= one.sequence <= end:
            return False
        untold = sum(gap.first <= other.sequence <= end for other in lost)
        return not gap.missing or untold <= gap.missing


def _streams(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    stream: list[Entry] = []
    for entry in entries:
        if entry["say"] == "open":
            if stream:
                yield stream
            stream = [entry]
        elif entry["say"] == "told":
            stream.append(entry)
    if stream:
        yield stream
