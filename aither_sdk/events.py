"""Events as their publisher makes them: who says it, when, in which trace, and because of what."""

from __future__ import annotations

import os
import time as clocks
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar, Token
from datetime import UTC, datetime
from enum import Enum
from functools import lru_cache
from math import isfinite
from typing import Any, Final

from google.protobuf import descriptor_pool, json_format, message_factory
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError, Message
from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp
from opentelemetry import trace

from aither.flux.v1.event_pb2 import Event
from aither_sdk.errors import FieldViolation, InvalidArgument
from aither_sdk.vocabulary import register_types

Payload = Message | Mapping[str, Any] | None
"""A typed message, a mapping of JSON-like values (sent as google.protobuf.Struct), or nothing."""


class Cause(Enum):
    """Where an event takes its cause from when none is named."""

    CURRENT = "current"
    """The event that is being handled, if any."""


_TYPE_URL_PREFIX = "type.googleapis.com/"
_handled: ContextVar[Event | None] = ContextVar("aither_handled_event", default=None)
"""Set by `handling` and by a Subscriber's iteration; each task sees its own."""


def new_event(
    subject: str,
    payload: Payload = None,
    *,
    source: str,
    id: str | None = None,
    time: datetime | Timestamp | None = None,
    headers: Mapping[str, str] | None = None,
    correlation_id: str | None = None,
    expire_time: datetime | Timestamp | None = None,
    expire_after_s: float | None = None,
    cause: Event | Cause | None = Cause.CURRENT,
) -> Event:
    """An event ready to be published.

    Unset: `id` is random (128 bits), `time` is now, `correlation_id` is the cause's. The cause is
    the event being handled unless another one, or None, is given: it becomes `causation_id`, and
    `hops` is its hops + 1. `expire_after_s` counts from now, by this machine's wall clock: when it
    has passed the event leaves the log. `traceparent` is that of the current span, if there is one.
    A datetime without a time zone is taken as UTC. Raises InvalidArgument when a value does not fit
    its field; the rules of the contract (`event_rules`) are checked when it is published.
    """
    try:
        event = Event(id=id or new_event_id(), source=source, subject=subject)
        if payload is not None:
            pack(event.payload, payload)
        if headers:
            event.headers.update(headers)
        if correlation_id:
            event.correlation_id = correlation_id
        if time is None:
            set_time_now(event)
        else:
            _set_instant(event.time, time)
        if expire_time is not None:
            _set_instant(event.expire_time, expire_time)
        elif expire_after_s is not None:
            event.expire_time.FromNanoseconds(clocks.time_ns() + int(expire_after_s * 1e9))
    except (TypeError, ValueError) as error:
        field = "payload" if isinstance(payload, Mapping) else "event"
        told = f"a value does not fit: {error}"
        raise InvalidArgument.of([FieldViolation(field, told)]) from error
    span = trace.get_current_span().get_span_context()
    if span.is_valid:
        event.traceparent = f"00-{span.trace_id:032x}-{span.span_id:016x}-{span.trace_flags:02x}"
    because = _handled.get() if cause is Cause.CURRENT else cause
    if because is not None:
        set_cause(event, because)
    return event


def _set_instant(into: Timestamp, instant: datetime | Timestamp) -> None:
    if isinstance(instant, datetime):
        into.FromDatetime(instant if instant.tzinfo else instant.replace(tzinfo=UTC))
    else:
        into.CopyFrom(instant)


def new_event_id() -> str:
    """32 hexadecimal characters from the system's random source: a UUID without its dashes."""
    return os.urandom(16).hex()


def set_time_now(event: Event) -> None:
    """Sets `time` to the wall clock of this machine."""
    now = event.time
    now.seconds, now.nanos = divmod(clocks.time_ns(), 1_000_000_000)


def set_cause(event: Event, cause: Event) -> None:
    """Makes `event` a consequence of `cause`; a correlation that is already set is kept."""
    event.causation_id = f"{cause.source}/{cause.id}"
    event.hops = cause.hops + 1
    if not event.correlation_id:
        event.correlation_id = cause.correlation_id


def current_event() -> Event | None:
    """The event that this task is handling, or None."""
    return _handled.get()


def set_current_event(event: Event | None) -> Token[Event | None]:
    """For whoever hands out events one by one; everybody else uses `handling`."""
    return _handled.set(event)


@contextmanager
def handling(event: Event) -> Iterator[Event]:
    """Everything published inside is caused by `event`.

    A Subscriber's `async for` does this by itself; it is for `batches()` and for tasks that outlive
    the loop's turn.
    """
    token = _handled.set(event)
    try:
        yield event
    finally:
        _handled.reset(token)


def pack(into: AnyMessage, payload: Message | Mapping[str, Any]) -> None:
    if isinstance(payload, AnyMessage):
        into.CopyFrom(payload)
        return
    if isinstance(payload, Message):
        message = payload
    else:
        _refuse_no_numbers(payload)
        message = Struct()
        message.update(dict(payload))
    # What Any.Pack does, without its detour through Python.
    into.type_url = _TYPE_URL_PREFIX + message.DESCRIPTOR.full_name
    into.value = message.SerializeToString()


def _refuse_no_numbers(value: Any) -> None:
    """JSON has none of them: a reader that prints the event, grpcurl for one, would fail on it and
    on all that it was sent with."""
    if isinstance(value, float):
        if not isfinite(value):
            raise ValueError(f"{value} is no number of JSON; leave it out, or send text")
    elif isinstance(value, Mapping):
        for one in value.values():
            _refuse_no_numbers(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            _refuse_no_numbers(one)


FRAME_TAG: Final = b"\x0a"
"""Field 1, length-delimited: the tag of `repeated Event events = 1` wherever it appears."""


def event_frame(encoded: bytes) -> bytes:
    """An encoded event as a piece of any message whose field 1 is `repeated Event`.

    Protobuf merges by concatenation, so a batch is its frames joined: nothing is encoded twice.
    """
    return event_head(len(encoded)) + encoded


@lru_cache(maxsize=4096)
def event_head(size: int) -> bytes:
    """What stands before an encoded event of this size in its frame."""
    head = bytearray(FRAME_TAG)
    while size >= 0x80:
        head.append(size & 0x7F | 0x80)
        size >>= 7
    head.append(size)
    return bytes(head)


def fields_of(event: Event) -> dict[str, Any]:
    """The mapping that was published. Raises InvalidArgument when it is something else."""
    fields = payload_of(event)
    if not isinstance(fields, dict):
        name = event.payload.TypeName() or "nothing"
        raise InvalidArgument.of([FieldViolation("payload", f'"{name}"; a mapping is needed')])
    return fields


def payload_of(event: Event) -> Message | dict[str, Any] | None:
    """What is inside an event: a dict where a mapping was published, the typed message otherwise,
    None where there is nothing.

    A type of your own must be imported for it to be known. Raises InvalidArgument naming the type
    when it is not known here or the bytes are not of that type.
    """
    if not event.HasField("payload"):
        return None
    if event.payload.Is(Struct.DESCRIPTOR):
        struct = Struct()
        event.payload.Unpack(struct)
        return json_format.MessageToDict(struct)
    register_types()
    name = event.payload.TypeName()
    try:
        descriptor = descriptor_pool.Default().FindMessageTypeByName(name)
        message = message_factory.GetMessageClass(descriptor)()
        event.payload.Unpack(message)
    except (KeyError, DecodeError) as error:
        why = "its type is not imported here" if isinstance(error, KeyError) else "damaged bytes"
        raise InvalidArgument.of([FieldViolation("payload", f'"{name}": {why}')]) from error
    return message
