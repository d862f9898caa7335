"""The port of all logs: what the rest of Flux may rely on, and what it may not.

`tests/conformance/event_log_suite.py` is this text as tests; every backend runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple, Protocol

from aither.flux.v1.event_pb2 import Event
from aither.flux.v1.flux_service_pb2 import DURABILITY_UNSPECIFIED, Durability, GapReason
from aither_sdk.errors import AitherError
from flux_svc.frames import Record, record_of
from flux_svc.sequencer import Appended, Expected

__all__ = [
    "ANYTHING",
    "Ability",
    "Appended",
    "CommitListener",
    "EventLog",
    "Expected",
    "IndexEntry",
    "LogInfo",
    "Matches",
    "Missing",
    "Newest",
    "ReadResult",
    "Record",
    "Succession",
]


@dataclass(frozen=True, slots=True)
class LogInfo:
    """What the log holds at one moment."""

    kind: str
    """As in the setting `flux.log`."""
    epoch: str
    first_sequence: int
    """Oldest event held; 0 when none is."""
    last_sequence: int
    """Newest event ever appended, held or not; 0 when there was none."""
    events: int
    bytes: int
    """Of frames held; without Ability.EMBEDDED, of what the storage keeps for them."""
    subjects: int
    """Distinct subjects with an event that is held."""
    committed_bytes: int = field(compare=False)
    """Of frames that were committed since this process opened the log, by whomever."""


class Missing(NamedTuple):
    """Events within what was looked at that the log holds no longer, although it holds older ones.

    The range goes from the first to the last of them; others of it may be held.
    """

    from_sequence: int
    to_sequence: int
    events: int
    """How many of this range are gone. 0: not known."""
    reason: GapReason.ValueType
    """COMPACTED: removed one by one. UNREADABLE: taken out by a repair, or perhaps lost with the
    power before they were fsynced (durability MEMORY)."""


class IndexEntry(NamedTuple):
    """What retention needs to know of an event."""

    sequence: int
    recorded_ns: int
    subject: str
    size: int
    """Bytes of its frame; without Ability.EMBEDDED, of what the storage keeps for it."""
    expire_ns: int
    """Wall time from which it is of no interest; 0: never."""


class Newest(NamedTuple):
    """Where the newest events of some subjects stand."""

    sequences: Sequence[int]
    """Rising."""
    position: int
    """The newest sequence of the log at that moment: the state is that after it."""


@dataclass(frozen=True, slots=True)
class ReadResult:
    """A piece of the log."""

    payload: bytes
    """The frames joined in the order of reading: the events of a response, ready to be sent."""
    sequences: Sequence[int]
    sizes: Sequence[int]
    """Bytes of each frame in `payload`."""
    position: int
    """Where to read on: everything from the position asked for up to here was looked at."""
    end_reached: bool
    """Nothing more in this direction at the moment of reading."""
    first_sequence: int
    """The oldest event held; one past the last ever appended when all are gone. All below it are
    gone (1: none is), true for the moment of reading: a forward reader whose position is less than
    this minus 1 has a gap, and `missing` begins here."""
    missing: tuple[Missing, ...] = ()
    """What is missing between the position asked for (or the floor) and `position`: at most one for
    each reason, and each event once for a reader that goes on at `position`. Forward reads only."""
    gone: Sequence[int] = ()
    """Of `fetch`: the sequences asked for that are not held any more."""

    @property
    def events(self) -> int:
        return len(self.sequences)

    @property
    def frames(self) -> list[bytes]:
        """The payload cut up again."""
        frames, start = [], 0
        for size in self.sizes:
            frames.append(self.payload[start : start + size])
            start += size
        return frames

    @property
    def records(self) -> list[Record]:
        """Decodes every event (about 2 us each): for those who need more than bytes."""
        return [record_of(frame) for frame in self.frames]


class Ability(Enum):
    """What a log may or may not do; the conformance suite skips what is not declared."""

    EMBEDDED = "embedded"
    """The storage lives in this process: recorded times come from the clock that the log was opened
    with, and every size and count is its own. Without it the storage is another program with its
    own clock and accounting, other nodes may append, and counts are true when nothing happens."""
    PERSISTENT = "persistent"
    """Events, epoch, idempotency and positions survive close and open."""
    FSYNC = "fsync"
    """DURABILITY_FSYNC is honoured; without it such a batch is refused."""
    EXPECTED_LAST_SEQUENCE = "expected_last_sequence"
    EXPECTED_SUBJECT_SEQUENCES = "expected_subject_sequences"
    BACKWARD = "backward"
    TRIM = "trim"
    REMOVE = "remove"
    """Single events can be removed, and the index be read."""
    WRITE_QUEUE = "write_queue"
    """Appends wait in a bounded queue."""


@dataclass(slots=True)
class Succession:
    """Batches of one publisher that may only be stored one after the other: once one of them has
    failed in the log, those that wait behind it fail as well, with the same error."""

    error: AitherError | None = None
    """Set once, by the log, perhaps in its writer's thread."""


ANYTHING = Expected()
Matches = Callable[[str], bool]
"""Whether a subject is wanted. Pure, and safe to call from another thread."""
CommitListener = Callable[[Sequence[Record]], None]


class EventLog(Protocol):
    """One ordered log of events. All methods are called on the event loop that opened it.

    Sequences rise by one from event to event as they are appended and are never used twice, not
    even after everything was trimmed. They rise by more only over a hole that readers are told of.
    """

    @property
    def epoch(self) -> str:
        """Names this life of the log; a log that is wiped or replaced gets another one."""
        ...

    @property
    def abilities(self) -> frozenset[Ability]: ...

    async def append(
        self,
        events: Sequence[Event],
        *,
        durability: Durability.ValueType = DURABILITY_UNSPECIFIED,
        expected: Expected = ANYTHING,
        succession: Succession | None = None,
        wait: bool = False,
    ) -> list[Appended]:
        """Appends a batch that was validated: all or none, adjacent, in order; one answer an event.

        Returns when the batch is as safe as asked for and after the commit listeners heard of it.
        An event whose source and id are within the idempotency window is answered with its first
        sequence and the rest of the batch is stored. A batch of nothing but duplicates succeeds
        whatever is `expected`, so that a repeat is answered like the first try.

        A batch of a `succession` that waits behind one of the same that fails is not stored.

        `wait`: while the write queue is full the call waits for room instead of being refused; such
        batches are let in in the order of their calls, so a succession keeps its order. The queue's
        bound does not count them: whoever sets it has a bound of its own (a publish stream: the
        batches that it reads ahead). The time that may take is the caller's to limit.

        Cancelling the caller changes nothing for the others; the batch may or may not be stored.
        Raised: FailedPrecondition WRONG_LAST_SEQUENCE (metadata `actual`) or
        DURABILITY_UNSUPPORTED; ResourceExhausted WRITE_QUEUE_FULL (never with `wait`) or DISK_FULL,
        with a time to wait; Unavailable LOG_CLOSED or LOG_IO_ERROR. After an error nothing of the
        batch is seen by readers of this process, reads go on, and the next append tries again. Only
        after LOG_IO_ERROR and a crash may the batch be found stored.
        Without Ability.EMBEDDED also Unavailable LOG_UNREACHABLE: nobody answered, and the batch
        may be found stored later.
        """
        ...

    def on_commit(self, listener: CommitListener) -> None:
        """Calls `listener` on the loop with the records of each commit: every record appended from
        now on, once, in order, before the append that brought it returns. What it raises is logged
        and swallowed; it must not block."""
        ...

    async def read(
        self,
        position: int,
        *,
        matches: Matches | None = None,
        exclude_sources: frozenset[str] = frozenset(),
        until: int | None = None,
        max_events: int = 1024,
        max_bytes: int = 2**20,
        backward: bool = False,
    ) -> ReadResult:
        """Events after `position`, oldest first; backward: those before it, newest first.

        `until` is the last sequence to look at (backward: the lowest). Unset `matches`: every
        subject. Looks at a bounded number of events and so may answer with none before the end is
        reached: go on at `ReadResult.position`. The first event fits whatever `max_bytes` says.
        Never shows what the commit listeners were not told. Raises DataLoss (metadata `sequence`)
        when the next event is damaged; those before it come first. Unavailable: closed, or the disk
        cannot be read.
        """
        ...

    async def newest(self, matches: Matches, *, after: int = 0) -> Newest:
        """Where the newest event of each matching subject stands, of those greater than `after`.

        Numbers only, 8 bytes each: the events themselves are fetched in pieces.
        """
        ...

    async def fetch(
        self, sequences: Sequence[int], *, exclude_sources: frozenset[str] = frozenset()
    ) -> ReadResult:
        """The events of these rising sequences, at most 4,096 of them; what is no longer held, and
        what has an excluded source, is left out. `position` is the last one asked for. Raises as
        `read`.

        Between `newest` and `fetch` the newest event of a subject may be superseded and then
        removed, so that the subject has no event in this answer although it always had one in the
        log. `ReadResult.gone` tells: whoever shows a state asks `newest(matches, after=position)`
        again when it is not empty and adds what that brings; a subject that is not in it either
        has lost its state.
        """
        ...

    async def index(self, position: int, *, max_events: int = 16_384) -> list[IndexEntry]:
        """What is held after `position`, in order, without the events themselves. Empty at the end.
        Ability REMOVE."""
        ...

    async def expired(self, time_ns: int, *, max_events: int = 16_384) -> list[int]:
        """Rising sequences of events held that are of no interest from `time_ns` on; those whose
        time ended first, if there are more. The log itself never removes them: retention does.
        Ability REMOVE."""
        ...

    async def tends(self) -> bool:
        """Whether retention is this node's task: of several nodes over one log one has it at a
        time, and counts of `info` are those of that moment. Asked before each sweep. False: another
        node sees to it. Raises Unavailable; `remove` and `trim` do so as well, with
        RETENTION_MOVED, once another node has taken over. Ability REMOVE."""
        ...

    async def sequence_at(self, time_ns: int) -> int:
        """The first sequence held that was recorded at this wall time or later; one past the last
        where there is none. Right even where the clock jumped."""
        ...

    async def trim(self, before_sequence: int) -> None:
        """Removes all events below `before_sequence`, in small steps between the appends.

        Beyond the end it means all. What was removed stays in the idempotency window.
        """
        ...

    async def remove(self, sequences: Sequence[int]) -> int:
        """Removes single events, in small steps between the appends; answers how many were held.

        A subject that loses its newest event has no state until the next one, even where older
        events of it are held. What was removed stays in the idempotency window. Ability REMOVE.
        """
        ...

    def info(self) -> LogInfo:
        """Cheap; as of the newest commit that the listeners were told."""
        ...

    async def close(self) -> None:
        """Refuses further calls and the appends that wait for room, finishes those that are queued,
        and lets go of the storage. Safe to call again; cancelling it does not stop it."""
        ...
