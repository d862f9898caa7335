"""Events as lines for people; pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, tzinfo
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from aither.flux.v1.event_pb2 import Event
from aither.flux.v1.flux_service_pb2 import Gap, GapReason
from aither.genesis.v1 import commands_pb2, decision_pb2, task_pb2
from aither.pulse.v1 import pulse_events_pb2, target_pb2
from aither.runtime.v1 import runtime_events_pb2
from aither.sense.v1 import anomaly_pb2
from aither_cli.payloads import as_json, compact, message_class, printable, type_of, unpacked

PAYLOAD_CHARACTERS = 200
"""Longer payloads are cut in readable lines; `--json` has all of it."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of `aither up`."""

    who: str
    text: str
    bad: bool = False


def event_line(event: Event, zone: tzinfo | None = None) -> str:
    """`12:03:04.567 #42 demo.hello gateway {"a":1}`, in the local time zone unless one is given."""
    who = printable(event.source) or "-"
    return f"{clock_of(event, zone)} #{event.sequence} {event.subject} {who} {_payload(event)}"


def gap_words(gap: Gap) -> str:
    """`event 8 is missing (unreadable)`, `3 of the events 2 to 10 are missing (compacted)`."""
    first, last, gone = gap.from_sequence, gap.to_sequence, gap.missing_events
    why = plain_name(GapReason, gap.reason).lower()
    if first == last:
        return f"event {first} is missing ({why})"
    some = f"{gone} of the events" if 0 < gone <= last - first else "events"
    verb = "is" if gone == 1 else "are"
    return f"{some} {first} to {last} {verb} missing ({why})"


def clock_of(event: Event, zone: tzinfo | None = None) -> str:
    """When it happened, as `12:03:04.567`; when it was recorded if nobody said."""
    instant = event.time if event.HasField("time") else event.recorded_time
    try:
        moment = instant.ToDatetime(tzinfo=UTC)
        return moment.astimezone(zone).strftime("%H:%M:%S.") + f"{moment.microsecond // 1000:03d}"
    except (ValueError, OverflowError):
        return f"{instant.seconds}s"


def event_json(event: Event) -> str:
    """The event as one line of ProtoJSON; a payload of an unknown type as base64."""
    return compact(as_json(event))


def live_line(event: Event) -> Line | None:
    """What `aither up` says about an event; None where it keeps quiet."""
    message = unpacked(event.payload)
    sentence = None if message is None else _SENTENCES.get(type(message))
    line = sentence(message, event) if sentence is not None else None
    return line and Line(printable(line.who), printable(line.text), line.bad)


def seconds(duration: Duration | float) -> str:
    """`12 ms`, `3.4 s`, `5 min 12 s`, `2 h 5 min`."""
    value = duration if isinstance(duration, float) else duration.seconds + duration.nanos / 1e9
    if value < 1.0:
        return f"{value * 1000:.0f} ms"
    if value < 60.0:
        return f"{value:.1f} s"
    if value < 3600.0:
        return f"{value // 60:.0f} min {value % 60:.0f} s"
    return f"{value // 3600:.0f} h {value % 3600 // 60:.0f} min"


def plain_name(enum: Any, value: int) -> str:
    """`DOWN` of TARGET_STATE_DOWN; the number where the value is not known here."""
    descriptor = enum.DESCRIPTOR
    known = descriptor.values_by_number.get(value)
    if known is None:
        return str(value)
    prefix = descriptor.values_by_number[0].name.removesuffix("UNSPECIFIED")
    return str(known.name.removeprefix(prefix))


def _payload(event: Event) -> str:
    if not event.HasField("payload"):
        return "(no payload)"
    payload = event.payload
    name = type_of(payload)
    message = unpacked(payload)
    if message is None:
        why = "unknown here" if message_class(name) is None else "damaged"
        return f"{printable(name) or '(no type)'} ({len(payload.value)} bytes, {why})"
    shown = compact(as_json(message, proto_names=True), PAYLOAD_CHARACTERS)
    return shown if name.startswith("google.protobuf.") else f"{name.rpartition('.')[2]} {shown}"


def _target_changed(change: Any, _event: Event) -> Line | None:
    after = plain_name(target_pb2.TargetState, change.to_state)
    before = plain_name(target_pb2.TargetState, change.from_state)
    if (before, after) == ("UNREACHABLE", "UNKNOWN"):
        return None  # its root cause went by, which is told; what it comes to is told next
    told = f"{change.name} is {after}"
    if before not in ("UNKNOWN", "UNSPECIFIED"):
        lasted = f" for {seconds(change.previous_duration)}" if change.previous_duration else ""
        told += f", was {before}{lasted}"
    if change.root_cause:
        told += f", because of {change.root_cause}"
    if change.HasField("result") and not change.result.ok:
        told += f": {_why(change.result)}"
    return Line("pulse", told, bad=after in ("DOWN", "UNREACHABLE"))


def _why(result: target_pb2.CheckResult) -> str:
    """In the words of the check; "internal" says that Pulse, not the target, is to blame."""
    failure = plain_name(target_pb2.CheckFailure, result.failure).lower().replace("_", " ")
    if result.failure == target_pb2.CHECK_FAILURE_INTERNAL:
        return f"could not be checked, {result.message}"
    return result.message or failure


def _fleet_changed(change: Any, _event: Event) -> Line:
    if change.faults:
        told = "; ".join(change.faults)
        return Line("pulse", f"the fleet file was refused, the old fleet goes on: {told}", bad=True)
    parts = [
        f"{word} {', '.join(names)}"
        for word, names in (
            ("added", change.added),
            ("removed", change.removed),
            ("updated", change.updated),
        )
        if names
    ]
    return Line("pulse", f"fleet: {'; '.join(parts) or 'nothing changed'}")


def _started(news: Any, _event: Event) -> Line:
    where = f", {news.address}" if news.address else ""
    took = seconds(news.startup_duration)
    return Line(news.service, f"started {news.version} (pid {news.pid}{where}) in {took}")


def _stopped(news: Any, _event: Event) -> Line:
    cut = f"; cut off: {', '.join(news.cancelled_tasks)}" if news.cancelled_tasks else ""
    told = f"stopped ({news.reason}), drained in {seconds(news.drain_duration)}{cut}"
    return Line(news.service, told, bad=bool(cut))


def _stall_open(news: Any, _event: Event) -> Line:
    told = f"event loop blocked for {seconds(news.stall.stall_duration)} and still is"
    return Line(news.stall.service, told + _culprit(news.stall), bad=True)


def _stalled(news: Any, _event: Event) -> Line:
    told = f"event loop was blocked for {seconds(news.stall.stall_duration)} (#{news.number})"
    return Line(news.stall.service, told + _culprit(news.stall), bad=True)


def _culprit(stall: runtime_events_pb2.Stall) -> str:
    cause = plain_name(runtime_events_pb2.StallCause, stall.cause).lower()
    told = "" if cause == "unspecified" else f": {cause}"
    at = stall.culprit
    where = f" in {at.function_name} ({at.file_path}:{at.line_number})" if at.file_path else ""
    return told + where


def _task_dropped(news: Any, _event: Event) -> Line:
    more = f" ({news.dropped_tasks} in all)" if news.dropped_tasks > 1 else ""
    told = f"{news.owner} dropped {news.task_name}: {news.reason}{more}"
    return Line(news.service, told, bad=True)


def _loop_refused(news: Any, _event: Event) -> Line:
    told = f"refused {news.subject} of {news.source}: {news.hops} hops, {news.max_hops} at most"
    chain = f"; chain: {' <- '.join(news.chain)}" if news.chain else ""
    return Line("flux", f"feedback loop: {told}{chain}", bad=True)


def _decision(news: Any, _event: Event) -> Line | None:
    by = plain_name(decision_pb2.Decider, news.decider).lower()
    if news.HasField("action"):
        return Line("genesis", f"{news.agent} decided {news.action.action_id} ({by})")
    block = decision_pb2.GATE_VERDICT_BLOCK
    step = next((s for s in news.gates if s.verdict == block), None)
    if step is not None and step.gate in _ORDINARY_GATES:
        return None
    why = f" by {step.gate}: {step.reason}" if step else ""
    return Line("genesis", f"{news.agent} was held back{why}")


def _task_completed(news: Any, event: Event) -> Line:
    told = f"task {_kind(event)} {news.task_id[:8]} completed in {seconds(news.run_duration)}"
    return Line("genesis", told)


def _task_failed(news: Any, event: Event) -> Line:
    then = "; it will be tried again" if news.will_retry else ""
    told = f"task {_kind(event)} {news.task_id[:8]} failed: {news.error}{then}"
    return Line("genesis", told, bad=True)


def _task_dead(news: Any, event: Event) -> Line:
    told = f"task {_kind(event)} {news.task_id[:8]} given up after {news.attempts} tries"
    return Line("genesis", f"{told}: {news.error}", bad=True)


def _kind(event: Event) -> str:
    tokens = event.subject.split(".")
    return tokens[2] if len(tokens) > 2 else "?"


def _accepted(news: Any, _event: Event) -> Line:
    task = f" as task {news.task_id[:8]}" if news.task_id else ""
    return Line("genesis", f"command {news.verb} accepted{task}")


def _rejected(news: Any, _event: Event) -> Line:
    return Line("genesis", f"command {news.verb} rejected: {news.reason}", bad=True)


def _anomaly(news: Any, _event: Event) -> Line:
    told = f"{news.target} {news.metric} is {news.value:g}, usual is {news.expected:g}"
    return Line("sense", f"{told} (score {news.score:.1f})", bad=True)


_ORDINARY_GATES = ("idle", "rate_limit")
"""They hold every agent back between two of its decisions."""

_SENTENCES: dict[type[Message], Callable[[Any, Event], Line | None]] = {
    pulse_events_pb2.TargetChanged: _target_changed,
    pulse_events_pb2.FleetChanged: _fleet_changed,
    runtime_events_pb2.ServiceStarted: _started,
    runtime_events_pb2.ServiceStopped: _stopped,
    runtime_events_pb2.LoopStallDetected: _stall_open,
    runtime_events_pb2.LoopStalled: _stalled,
    runtime_events_pb2.TaskDropped: _task_dropped,
    runtime_events_pb2.FeedbackLoopRefused: _loop_refused,
    decision_pb2.DecisionMade: _decision,
    task_pb2.TaskCompleted: _task_completed,
    task_pb2.TaskFailed: _task_failed,
    task_pb2.TaskDead: _task_dead,
    commands_pb2.CommandAccepted: _accepted,
    commands_pb2.CommandRejected: _rejected,
    anomaly_pb2.Anomaly: _anomaly,
}
