"""What the failures of NATS are called on the bus, and what to do about each."""

from __future__ import annotations

import re
from collections.abc import Sequence

from aither_sdk.errors import (
    AitherError,
    FailedPrecondition,
    ResourceExhausted,
    Unavailable,
)

# Error codes of JetStream's API: nats-server, server/errors.json.
NO_RESPONDERS = 503
IN_PROCESS = 10164
"""Whether it is wrong is not known yet: something else that bears on the condition is on its way to
the replicas. nats-server says "wrong last sequence" to that as well."""
WRONG_LAST_SEQUENCE = frozenset({10071, IN_PROCESS})
NAME_TAKEN = 10058
NO_STREAM = 10059
NO_MESSAGE = 10037
NOT_FOUND = frozenset({NO_MESSAGE, 10043, 10057})
"""Of a single message, told of one that is gone and of one that never was."""
DUPLICATE_IN_BATCH = 10201
DUPLICATE_IN_FLIGHT = 10158
WRONG_LAST_ID = 10070
TOO_MANY_BATCHES = frozenset({10210, 10211})
_BATCH_TOO_LARGE = 10199
_NO_BATCHES = 10174
_NO_IDS_IN_BATCHES = 10177
_NO_CLUSTER = 10074
_FULL = frozenset({10023, 10028, 10047, 10077, 10110, 10120, 10167})
_TOO_LARGE = frozenset({10054, 10097})


class StreamRefused(Exception):
    """What JetStream answered instead of doing it. Never leaves the log: see `fault_of`."""

    def __init__(self, code: int, description: str) -> None:
        super().__init__(f"{description} ({code})")
        self.code = code
        self.description = description

    @property
    def actual(self) -> int | None:
        """The sequence that a wrong expectation is answered with; a cluster may leave it out."""
        found = re.search(r"wrong last sequence: (\d+)", self.description)
        return int(found[1]) if found else None


def unreachable(url: str, why: str) -> Unavailable:
    return Unavailable(
        f"NATS at {url} cannot be reached: {why}; repeat with the same ids, what was sent may be "
        "found stored",
        reason="LOG_UNREACHABLE",
        metadata={"why": why},
        retry_after_s=0.25,
    )


def unanswered(url: str) -> Unavailable:
    return Unavailable(
        f"NATS at {url} answers, but not to what it is to store: its disk may be full or sick, see "
        "its log; make room and restart it, reading goes on meanwhile; repeat with the same ids",
        reason="LOG_IO_ERROR",
        retry_after_s=1.0,
    )


def tail_behind() -> Unavailable:
    return Unavailable(
        "what was stored was not heard on this node yet; repeat in a moment, with the same ids",
        reason="LOG_BEHIND",
        retry_after_s=0.5,
    )


def fault_of(refused: StreamRefused, stream: str) -> AitherError:
    """The error family of a refusal that nothing here mends."""
    told = f'the stream "{stream}" refused: {refused}'
    if refused.code == _BATCH_TOO_LARGE:
        return ResourceExhausted(
            f"{told}; send smaller batches, or set jetstream.limits.batch.max_msgs of nats-server "
            "to 4096",
            reason="BATCH_TOO_LARGE",
        )
    if refused.code in _TOO_LARGE:
        return _too_large(told)
    if refused.code in _FULL:
        return ResourceExhausted(
            f"{told}; give nats-server more room, reading goes on meanwhile",
            reason="DISK_FULL",
            retry_after_s=5.0,
        )
    if refused.code == _NO_CLUSTER:
        return FailedPrecondition(
            f"{told}; set flux.nats_replicas to 1, or run a cluster of nats-server",
            reason="NO_CLUSTER",
        )
    if refused.code == _NO_BATCHES:
        return FailedPrecondition(
            f"{told}; set allow_atomic on it (nats-server 2.12.1 and up)",
            reason="STREAM_NOT_OURS",
        )
    if refused.code == _NO_IDS_IN_BATCHES:
        return too_old()
    return Unavailable(
        f"{told}; repeat with the same ids",
        reason="LOG_UNREACHABLE" if refused.code == NO_RESPONDERS else "LOG_IO_ERROR",
        retry_after_s=0.25 if refused.code == NO_RESPONDERS else 1.0,
    )


def event_too_large(size: int, limit: int) -> ResourceExhausted:
    return _too_large(f"an event of {size} bytes with its headers; nats-server takes {limit}")


def _too_large(told: str) -> ResourceExhausted:
    return ResourceExhausted(
        f"{told}; raise max_payload of nats-server to 2MB or send less", reason="EVENT_TOO_LARGE"
    )


def wrong_last(actual: int, expected: int, subject: str | None = None) -> FailedPrecondition:
    what = "the log" if subject is None else f'"{subject}"'
    metadata = {"actual": str(actual), "expected": str(expected)}
    if subject is not None:
        metadata["subject"] = subject
    return FailedPrecondition(
        f"{what} ends at {actual}, not at {expected} as expected; read what came in between and "
        "decide again",
        reason="WRONG_LAST_SEQUENCE",
        metadata=metadata,
    )


def contended(tries: int) -> Unavailable:
    return Unavailable(
        f"others appended in between {tries} times; repeat with the same ids",
        reason="CONTENDED",
        retry_after_s=0.05,
    )


def replaced(stream: str, ours: str, theirs: str) -> Unavailable:
    return Unavailable(
        f'the stream "{stream}" was replaced: its epoch is "{theirs}", not "{ours}"; this node '
        "ends, so that it begins anew on the stream that is there",
        reason="LOG_REPLACED",
        metadata={"epoch": theirs},
        retry_after_s=1.0,
    )


def not_the_stream(stream: str, stored: int, heard: int) -> Unavailable:
    return Unavailable(
        f'the stream "{stream}" stored an event at {stored} although it had {heard} already: it '
        "was replaced; repeat with the same ids once this node has begun anew",
        reason="LOG_REPLACED",
        retry_after_s=1.0,
    )


def rewound(stream: str, known: int, last: int) -> Unavailable:
    return Unavailable(
        f'the stream "{stream}" ends at {last}, but {known} was stored: nats-server lost events. '
        "It has a new epoch now and this node ends, so that nobody takes the new events for the "
        "lost ones. Run nats-server with sync_interval: always, or with 3 replicas",
        reason="LOG_REWOUND",
        metadata={"lost_from": str(last + 1), "lost_to": str(known)},
        retry_after_s=1.0,
    )


def foreign(stream: str, why: str) -> FailedPrecondition:
    return FailedPrecondition(
        f'the stream "{stream}" cannot be the log: {why}; mend it, or name another one in '
        "flux.nats_stream",
        reason="STREAM_NOT_OURS",
    )


def too_old(version: Sequence[int] = ()) -> FailedPrecondition:
    found = ".".join(map(str, version)) or "of the stream's leader"
    return FailedPrecondition(
        f"nats-server {found} is too old for the log: it cannot store batches of events with "
        "their ids whole; run 2.12.1 or newer, on every server of a cluster",
        reason="NATS_TOO_OLD",
        metadata={"version": found},
    )
