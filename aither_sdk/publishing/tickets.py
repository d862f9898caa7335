"""Whose event it is, and what its publisher is told when it does not get through."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from google.protobuf.message import DecodeError

from aither.flux.v1.flux_service_pb2 import PublishResult
from aither_sdk.errors import AitherError, Internal
from aither_sdk.publishing.buffer import Entry
from aither_sdk.rpc_status import from_status


@dataclass(slots=True)
class Ticket:
    """Whose event it is: who is told, and how to name it to him."""

    future: asyncio.Future[Any]
    """Of its PublishResult, or of a list of them for a parcel."""
    subject: str
    event_id: str
    """The first one's, of a parcel."""
    traceparent: str
    timed: bool
    """Whether `ack_timeout_s` applies: it does for `publish`, not for `enqueue`."""
    index: int = 0
    """Of its first event among those that were given together."""


def named(entry: Entry[Ticket]) -> str:
    """How an error names it."""
    if entry.events > 1:
        return f'{entry.events} events on "{entry.ticket.subject}"'
    return f'event {entry.ticket.event_id} on "{entry.ticket.subject}"'


def answer_parcel(entry: Entry[Ticket], results: Sequence[PublishResult]) -> tuple[int, int]:
    """Tells whoever waits for a parcel; answers how many events were refused, and how many were
    there before."""
    refused = [i for i, result in enumerate(results) if result.HasField("error")]
    if refused:
        first = refusal(results[refused[0]])
        told = f"{len(refused)} of {named(entry)} were refused and the others are stored"
        which = f"payloads[{entry.ticket.index + refused[0]}]"
        fail(entry, like(first, f"{told}; {which}: {first.message}"))
    elif not entry.ticket.future.done():
        entry.ticket.future.set_result(results)
    return len(refused), sum(map(_duplicate, results))


_duplicate = attrgetter("duplicate")


def refusal(result: PublishResult) -> AitherError:
    """Why Flux refused this event alone."""
    try:
        return from_status(result.error)
    except DecodeError:  # details that are no protobuf; the message still says what it is
        return Internal(f"refused with unreadable details: {result.error.message}")


def like(error: AitherError, message: str) -> AitherError:
    """The same error with words for one of many.

    Each waiter gets an object of its own: raising one in many tasks would mix their tracebacks.
    """
    copy = AitherError.__new__(type(error))
    AitherError.__init__(
        copy,
        message,
        reason=error.reason,
        metadata=error.metadata,
        retry_after_s=error.retry_after_s,
        violations=error.violations,
    )
    return copy


def fail(entry: Entry[Ticket], error: AitherError) -> None:
    """Tells whoever waits, if he still does."""
    future = entry.ticket.future
    if not future.done():
        future.set_exception(error)
        future.exception()  # seen: a future nobody looks at must not be complained about
