"""What is known of a stall, and how it reads: as a span's attributes, as an event, as a log line.

Pure. The same stall has the same ids in the service and in its witness, so that what one of them
tells is found beside what the other tells.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from aither.runtime.v1 import runtime_events_pb2 as pb
from aither_sdk.stalls.causes import EXCUSED, Cause, Reading
from aither_sdk.stalls.stacks import Frame, Stack, spell_stack

Attribute = str | int | float | bool | Sequence[str]
MAX_SAMPLES = 24
MAX_CALLS = 16
DETECTED, STALL, EXITED = "event_loop.stall.detected", "event_loop.stall", "service.exited"
"""Names of spans."""


@dataclass(frozen=True, slots=True)
class SpanRef:
    """A span by its ids."""

    trace_id: int
    span_id: int
    sampled: bool = True

    @property
    def traceparent(self) -> str:
        return f"00-{self.trace_id:032x}-{self.span_id:016x}-{'01' if self.sampled else '00'}"


@dataclass(frozen=True, slots=True)
class Sample:
    """One look at the loop."""

    location: Frame | None
    weight_ns: int
    """The time from the look before, for which it stands."""
    coroutine: str = ""


@dataclass(frozen=True, slots=True)
class Call:
    """An RPC in flight."""

    method: str
    span: SpanRef | None
    running_ns: int


@dataclass(frozen=True, slots=True)
class StallId:
    """Identifies a stall by the beat that it followed; made alike wherever it is seen."""

    instance_id: str
    beat_sequence: int

    @property
    def text(self) -> str:
        return self._digest("id")[:32]

    @property
    def own_trace_id(self) -> int:
        """For a stall that interrupted no sampled span."""
        return int(self._digest("trace")[:32], 16) or 1

    def span_id(self, name: str) -> int:
        return int(self._digest(name)[:16], 16) or 1

    def _digest(self, purpose: str) -> str:
        text = f"{self.instance_id}/{self.beat_sequence}/{purpose}"
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class Stall:
    """All that is known at one moment."""

    stall_id: StallId
    number: int
    """1 and up in this run; 0: the witness tells, who does not count."""
    service: str
    begin_ns: int
    """CLOCK_MONOTONIC when the beat that did not come was due."""
    begin_unix_ns: int
    reading: Reading
    """Its lag is how long the stall has lasted."""
    cause: Cause
    ended: bool
    expected_ns: int
    """Between two beats."""
    detected_in_time: bool = True
    """Whether it was seen while it was open."""
    witness: bool = False
    """Told by the witness, because the process itself could not."""
    again: bool = False
    """The witness told of it before it knew the line."""
    culprit: Frame | None = None
    stack: Stack = ()
    task_name: str = ""
    coroutine: str = ""
    interrupted: SpanRef | None = None
    """The span that was open in the code to blame."""
    samples: tuple[Sample, ...] = ()
    tasks: tuple[tuple[str, int], ...] = ()
    calls: tuple[Call, ...] = ()
    other_stacks: tuple[Stack, ...] = ()
    suppressed: int = 0

    @property
    def lag_ns(self) -> int:
        return self.reading.lag_ns

    @property
    def trace_id(self) -> int:
        """The interrupted trace where that is kept, else one of its own."""
        if self.interrupted is not None and self.interrupted.sampled:
            return self.interrupted.trace_id
        return self.stall_id.own_trace_id

    @property
    def span(self) -> SpanRef:
        """The span that tells of it now."""
        name = "stall" if self.ended else "detected"
        name += "/witness" if self.witness else ""
        name += "/again" if self.again else ""
        return SpanRef(self.trace_id, self.stall_id.span_id(name))


@dataclass(frozen=True, slots=True)
class FinishedSpan:
    """A span to export."""

    name: str
    span: SpanRef
    parent_span_id: int
    """0: it is the root of its trace."""
    begin_unix_ns: int
    end_unix_ns: int
    attributes: Mapping[str, Attribute]
    links: Sequence[SpanRef] = ()
    error: str = ""
    """Set: the span's status is an error, for this reason."""


def attributes_of(stall: Stall) -> dict[str, Attribute]:
    """For a span. `code.*` as OpenTelemetry names it, all else under `event_loop.stall.`"""
    reading = stall.reading
    told: dict[str, Attribute] = {
        "id": stall.stall_id.text,
        "cause": stall.cause.value,
        "ended": stall.ended,
        "seen_while_open": stall.detected_in_time,
        "evidence": "witness" if stall.witness else "watchdog",
        "blocked_ms": stall.lag_ns / 1e6,
        "total_ms": (stall.lag_ns + stall.expected_ns) / 1e6,
        "watchdog_late_ms": reading.watchdog_late_ns / 1e6,
        "gc_ms": reading.gc_ns / 1e6,
    }
    optional: dict[str, Attribute | None] = {
        "loop_cpu_ms": _ms(reading.loop_cpu_ns),
        "process_cpu_ms": _ms(reading.process_cpu_ns),
        "run_wait_ms": _ms(reading.run_wait_ns),
        "watchdog_wait_ms": _ms(reading.watchdog_wait_ns or None),
        "throttled_ms": _ms(reading.throttled_ns or None),
        "suspended_ms": _ms(reading.suspended_ns or None),
        "thread_state": reading.state,
        "wchan": reading.wchan,
        "task": stall.task_name,
        "coroutine": stall.coroutine,
        "samples": [_spell_sample(sample) for sample in stall.samples],
        "running_tasks": [f"{count} x {name}" for name, count in stall.tasks],
        "in_flight": [f"{call.method} {call.running_ns / 1e6:.0f}ms" for call in stall.calls],
        "other_stacks": [spell_stack(stack) for stack in stall.other_stacks],
        "number": stall.number,
        "suppressed": stall.suppressed,
    }
    told.update((key, value) for key, value in optional.items() if value)
    attributes = {f"event_loop.stall.{key}": value for key, value in told.items()}
    if stall.culprit is not None:
        attributes["code.function.name"] = stall.culprit.function
        attributes["code.file.path"] = stall.culprit.file
        attributes["code.line.number"] = stall.culprit.line
    if stall.stack:
        attributes["code.stacktrace"] = spell_stack(stall.stack)
    return attributes


def note_of(stall: Stall, most_bytes: int) -> bytes:
    """For the beat cell: what the witness tells if the process dies in this stall. Outer frames are
    left out where there is no room."""
    stack, culprit = stall.stack, stall.culprit
    while True:
        told = {
            "sequence": stall.stall_id.beat_sequence,
            "cause": stall.cause.value,
            "culprit": _row(culprit) if culprit is not None else None,
            "stack": [_row(frame) for frame in stack],
            "task": stall.task_name,
        }
        note = json.dumps(told).encode()
        if len(note) <= most_bytes:
            return note
        if not stack:
            return b""
        stack = stack[1 + len(stack) // 4 :]


def with_note(stall: Stall, note: bytes | None) -> Stall:
    """The stall with what `note_of` told of it; as it is where the note is of another, or none."""
    try:
        told = json.loads(note or b"{}")
        if told.get("sequence") != stall.stall_id.beat_sequence:
            return stall
        stack = tuple(Frame(*frame) for frame in told["stack"])
        return replace(
            stall,
            cause=Cause(told["cause"]),
            culprit=Frame(*told["culprit"]) if told["culprit"] is not None else None,
            stack=stack,
            task_name=told["task"],
        )
    except (ValueError, TypeError, LookupError, AttributeError):
        return stall  # memory of a process that died while it wrote


def _row(frame: Frame) -> tuple[str, str, int]:
    return frame.function, frame.file, frame.line


def links_of(stall: Stall) -> list[SpanRef]:
    """The culprit's span first, then those of the calls that waited."""
    refs = [stall.interrupted, *(call.span for call in stall.calls)]
    return list(dict.fromkeys(ref for ref in refs if ref is not None))


def span_of(name: str, stall: Stall, error_after_ns: int) -> FinishedSpan:
    """Back-dated over the time of the stall so far."""
    interrupted = stall.interrupted
    kept = interrupted is not None and interrupted.sampled
    severe = stall.lag_ns >= error_after_ns and stall.cause not in EXCUSED
    return FinishedSpan(
        name=name,
        span=stall.span,
        parent_span_id=interrupted.span_id if interrupted is not None and kept else 0,
        begin_unix_ns=stall.begin_unix_ns,
        end_unix_ns=stall.begin_unix_ns + stall.lag_ns,
        attributes=attributes_of(stall),
        links=links_of(stall),
        error=line_of(stall) if severe else "",
    )


def line_of(stall: Stall) -> str:
    """`EVENT LOOP STALL #33: blocked for 29.5s beyond expected 5.0s (total=34.5s) ...`"""
    total_ns = stall.lag_ns + stall.expected_ns
    number = f" #{stall.number}" if stall.number else ""
    text = (
        f"EVENT LOOP STALL{number}: blocked for {_spell(stall.lag_ns)} beyond expected "
        f"{_spell(stall.expected_ns)} (total={_spell(total_ns)}) {stall.cause}"
    )
    if stall.culprit is not None:
        culprit = stall.culprit
        text += f" in {culprit.function} ({culprit.file}:{culprit.line})"
    if not stall.ended:
        text += "; still blocked"
    if stall.suppressed:
        text += f"; {stall.suppressed} stalls before it were not told"
    return text


def message_of(stall: Stall) -> pb.Stall:
    """The event's payload."""
    reading = stall.reading
    message = pb.Stall(
        stall_id=stall.stall_id.text,
        service=stall.service,
        instance_id=stall.stall_id.instance_id,
        cause=pb.StallCause.Value(f"STALL_CAUSE_{stall.cause.upper()}"),
        culprit=_location(stall.culprit),
        stacktrace=spell_stack(stall.stack) if stall.stack else "",
        task_name=stall.task_name,
        coroutine=stall.coroutine,
        traceparent=stall.interrupted.traceparent if stall.interrupted is not None else "",
        wchan=reading.wchan,
        thread_state=reading.state,
        suppressed_stalls=stall.suppressed,
        running_tasks=[pb.CoroutineCount(coroutine=n, tasks=c) for n, c in stall.tasks],
        other_stacktraces=[spell_stack(stack) for stack in stall.other_stacks],
        stall_traceparent=stall.span.traceparent,
    )
    message.start_time.FromNanoseconds(stall.begin_unix_ns)
    message.stall_duration.FromNanoseconds(stall.lag_ns)
    message.gc_duration.FromNanoseconds(reading.gc_ns)
    for name, value in (
        ("loop_cpu_duration", reading.loop_cpu_ns),
        ("process_cpu_duration", reading.process_cpu_ns),
        ("run_wait_duration", reading.run_wait_ns),
    ):
        if value is not None:
            getattr(message, name).FromNanoseconds(max(0, value))
    for sample in stall.samples:
        one = message.samples.add(location=_location(sample.location), coroutine=sample.coroutine)
        one.weight_duration.FromNanoseconds(sample.weight_ns)
    for call in stall.calls:
        traceparent = call.span.traceparent if call.span is not None else ""
        waiting = message.calls_in_flight.add(method=call.method, traceparent=traceparent)
        waiting.running_duration.FromNanoseconds(call.running_ns)
    return message


def _location(frame: Frame | None) -> pb.CodeLocation | None:
    if frame is None:
        return None
    return pb.CodeLocation(
        function_name=frame.function, file_path=frame.file, line_number=frame.line
    )


def _spell_sample(sample: Sample) -> str:
    where = sample.location
    spelled = f"{where.function} ({where.file}:{where.line})" if where is not None else "the loop"
    return f"{sample.weight_ns / 1e6:.0f}ms {spelled}"


def _spell(span_ns: int) -> str:
    seconds = span_ns / 1e9
    return f"{seconds:.1f}s" if seconds >= 1 else f"{seconds:.3g}s"


def _ms(span_ns: int | None) -> float | None:
    return None if span_ns is None else span_ns / 1e6
