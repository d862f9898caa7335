"""What the watchdog has seen of a stall, and the stall that this makes. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from aither_sdk.beat import BEAT_INTERVAL_NS, Mark
from aither_sdk.stalls.causes import Reading, judge_cause
from aither_sdk.stalls.gauges import ThreadState
from aither_sdk.stalls.record import Call, Sample, SpanRef, Stall, StallId
from aither_sdk.stalls.sampling import Seen
from aither_sdk.stalls.stacks import Frame, Stack, Territory, find_culprit_in_dump, heaviest


@dataclass(frozen=True, slots=True)
class Identity:
    """Whose loop it is."""

    service: str
    instance_id: str


@dataclass(frozen=True, slots=True)
class Witnessed:
    """Stacks that the witness obtained without the GIL."""

    stall_id: str
    stack: Stack
    """Of the loop."""
    other_stacks: tuple[Stack, ...]
    """Of who held the GIL, where that was another thread."""
    interrupted: SpanRef | None


@dataclass(slots=True)
class Observed:
    """A stall that is being followed: what was seen of it so far."""

    mark: Mark
    number: int
    begin_unix_ns: int
    late_ns: int = 0
    starved_ns: int = 0
    """The watchdog waited for a CPU."""
    asked_ns: int = 0
    """The watchdog asked for the GIL."""
    looks: list[tuple[Seen, Frame | None, int]] = field(default_factory=list)
    """What was seen, whose line it is, and the time that the look stands for."""
    looked_ns: int = 0
    states: list[ThreadState] = field(default_factory=list)
    """Of the loop's thread, read while the stall was open; its end says nothing of it."""
    runnable: int = 0
    """How often another thread of the process could have run while the loop waited."""
    told: bool = False
    """Whether it was told while it was open."""
    tasks: tuple[tuple[str, int], ...] = ()
    others: tuple[Stack, ...] = ()

    @property
    def begin_ns(self) -> int:
        return self.mark.at_ns + BEAT_INTERVAL_NS

    @property
    def state(self) -> ThreadState:
        """What it was most of the time."""
        return Counter(self.states).most_common(1)[0][0] if self.states else ThreadState()


def stall_of(
    seen: Observed,
    reading: Reading,
    identity: Identity,
    calls: Sequence[Call],
    *,
    ended: bool,
) -> Stall:
    """The stall as far as this process saw it. `calls`: the RPCs that are in flight."""
    culprit = heaviest([(frame, weight) for _, frame, weight in seen.looks if frame])
    blamed = next((one for one, frame, _ in seen.looks if frame == culprit), None)
    span = blamed.span if blamed is not None else None
    return Stall(
        stall_id=StallId(identity.instance_id, seen.mark.sequence),
        number=seen.number,
        service=identity.service,
        begin_ns=seen.begin_ns,
        begin_unix_ns=seen.begin_unix_ns,
        reading=reading,
        cause=judge_cause(reading),
        ended=ended,
        detected_in_time=seen.told,
        expected_ns=BEAT_INTERVAL_NS,
        culprit=culprit,
        stack=blamed.stack if blamed is not None else (),
        task_name=blamed.task_name if blamed is not None else "",
        coroutine=blamed.coroutine if blamed is not None else "",
        interrupted=(
            SpanRef(span.trace_id, span.span_id, span.trace_flags.sampled)
            if span is not None
            else None
        ),
        samples=tuple(Sample(frame, weight, one.coroutine) for one, frame, weight in seen.looks),
        tasks=seen.tasks,
        calls=tuple(calls),
        other_stacks=seen.others if reading.handles == 0 else (),
    )


def with_witnessed(stall: Stall, found: Witnessed | None, territory: Territory) -> Stall:
    """The stall with what the witness saw of it, where this process was blind: looks that came late
    show where the thread stood when the GIL was free again."""
    reading = stall.reading
    blind = stall.culprit is None or reading.watchdog_late_ns * 2 >= reading.lag_ns
    if not blind or found is None or found.stall_id != stall.stall_id.text:
        return stall
    blamed = found.other_stacks[0] if found.other_stacks else found.stack
    culprit = find_culprit_in_dump(blamed, territory)
    known = stall.culprit
    if culprit is not None and known is not None and known.is_qualified_of(culprit):
        culprit = replace(culprit, function=known.function)
    return replace(
        stall,
        culprit=culprit or known,
        stack=found.stack or stall.stack,
        other_stacks=found.other_stacks or stall.other_stacks,
        interrupted=stall.interrupted or found.interrupted,
    )
