"""Whose event it is, and what its publisher is told when it does not get through."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from aither.flux.v1.flux_service_pb2 import PublishResult
from aither_sdk.errors import AitherError, Internal
from aither_sdk.publisher_buffer import Entry
from aither_sdk.rpc_status import from_status


@dataclass(slots=True)
class Ticket:
    """Whose event it is: who is told, and how to name it to him."""

    future: asyncio.Future[PublishResult]
    subject: str
    event_id: str
    traceparent: str
    timed: bool
    """Whether `ack_timeout_s` applies: it does for `publish`, not for `enqueue`."""


def named(entry: Entry[Ticket]) -> str:
    """How an error names it."""
    return f'event {entry.ticket.event_id} on "{entry.ticket.subject}"'


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
