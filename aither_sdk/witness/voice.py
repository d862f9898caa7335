"""The witness's own voice: spans to the collector and lines on stderr, from a thread of its own."""

from __future__ import annotations

import json
import queue
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime

from aither_sdk.beat import Beat
from aither_sdk.stalls.causes import EXCUSED
from aither_sdk.stalls.otlp import Exporter
from aither_sdk.stalls.record import (
    DETECTED,
    EXITED,
    FinishedSpan,
    SpanRef,
    Stall,
    StallId,
    attributes_of,
    line_of,
    span_of,
)
from aither_sdk.stalls.stacks import spell_stack

_EXPORT_TIMEOUT_S = 2.0
_QUEUE = 16


@dataclass(frozen=True, slots=True)
class _Told:
    span: FinishedSpan
    line: dict[str, object]
    evidence: dict[str, object] | None = None
    """For the service."""


class Voice:
    """Tells in order; what finds no room is dropped and said so."""

    def __init__(self, exporter: Exporter | None, resource: dict[str, str]) -> None:
        self._exporter = exporter
        self._resource = resource
        self._queue: queue.Queue[_Told | None] = queue.Queue(_QUEUE)
        self._dropped = 0
        """Words for which there was no room, since the last one that was said."""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def tell_stall(self, stall: Stall) -> None:
        """What was found while loop and watchdog are silent."""
        level = "warning" if stall.cause in EXCUSED else "error"
        fields: dict[str, object] = {
            "event": line_of(stall),
            "level": level,
            "stall_id": stall.stall_id.text,
            "stall_trace_id": f"{stall.trace_id:032x}",
            "stack": spell_stack(stall.stack) if stall.stack else None,
        }
        # The service itself saw nothing; it is told what to say when it can speak again.
        stacks = (stall.stack, *stall.other_stacks)
        spelled = [[(f.function, f.file, f.line) for f in stack] for stack in stacks]
        span = stall.interrupted
        ids = [span.trace_id, span.span_id] if span is not None else None
        evidence: dict[str, object] = {"stall_id": stall.stall_id.text, "stacks": spelled}
        evidence["interrupted"] = ids
        self._put(_Told(span_of(DETECTED, stall, 0), fields, evidence))

    def tell_exit(self, how: str, beat: Beat, silent: Stall | None) -> None:
        """The service is gone without a farewell; `silent`: what is known of a stall that it died
        in."""
        now_ns = time.time_ns()
        attributes = attributes_of(silent) if silent is not None else {}
        attributes |= {
            "process.pid": beat.pid,
            "service.exit": how,
            "service.phase": beat.phase.name.lower(),
        }
        instance = self._resource.get("service.instance.id", "")
        own = StallId(instance, beat.sequence)
        trace_id = silent.trace_id if silent is not None else own.own_trace_id
        interrupted = silent.interrupted if silent is not None else None
        span = FinishedSpan(
            name=EXITED,
            span=SpanRef(trace_id, own.span_id("exit")),
            parent_span_id=interrupted.span_id if interrupted is not None else 0,
            begin_unix_ns=silent.begin_unix_ns if silent is not None else now_ns,
            end_unix_ns=now_ns,
            attributes=attributes,
            links=[interrupted] if interrupted is not None else [],
            error=f"the service ended without draining: {how}",
        )
        fields: dict[str, object] = {
            "event": "service.exited",
            "level": "error",
            "exit": how,
            "pid": beat.pid,
            "phase": beat.phase.name.lower(),
            "stall": line_of(silent) if silent is not None else None,
        }
        self._put(_Told(span, fields))

    def close(self) -> None:
        with suppress(queue.Full):  # it cannot speak; nobody waits for it
            self._queue.put(None, timeout=_EXPORT_TIMEOUT_S)
            self._thread.join(2 * _EXPORT_TIMEOUT_S)

    def _put(self, told: _Told) -> None:
        """Never waits: neither pipe may be read while the service stands still."""
        try:
            self._queue.put_nowait(told)
        except queue.Full:
            self._dropped += 1

    def _run(self) -> None:
        while (told := self._queue.get()) is not None:
            span, fields = told.span, told.line
            if told.evidence is not None:
                say(**told.evidence)
            if self._exporter is not None and not self._exporter.export([span], _EXPORT_TIMEOUT_S):
                fields["span_not_sent"] = self._exporter.last_failure
            _write(
                {
                    **{key: value for key, value in fields.items() if value is not None},
                    **self._take_dropped(),
                    "service": self._resource.get("service.name", ""),
                    "by": "witness",
                    "timestamp": datetime.now(UTC).isoformat(),
                }
            )
        if self._exporter is not None:
            self._exporter.close()

    def _take_dropped(self) -> dict[str, object]:
        dropped, self._dropped = self._dropped, 0
        return {"words_dropped": dropped} if dropped else {}


def say(**fields: object) -> None:
    """A line of JSON to the service, on stdout."""
    with suppress(OSError):  # it is gone
        sys.stdout.write(json.dumps(fields) + "\n")
        sys.stdout.flush()


def _write(fields: dict[str, object]) -> None:
    with suppress(OSError):  # the terminal went with the service
        sys.stderr.write(json.dumps(fields) + "\n")
        sys.stderr.flush()
