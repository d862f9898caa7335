"""Events that were accepted and have no place yet, and the quick way to them: by their bytes.

A publisher's events are stored as they came. For nearly all of them the few fields that Flux asks
about lie where every protobuf library writes them, so they are read from the bytes, a fifth of what
objects cost; an event that looks different in any way is looked at as an object.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache, partial
from typing import Any, NamedTuple, TypeVar, overload

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError, Message

from aither.flux.v1 import flux_service_pb2 as pb
from aither.flux.v1.event_pb2 import Event
from aither_sdk.decoding import unreadable
from aither_sdk.errors import FieldViolation, InvalidArgument
from aither_sdk.event_rules import (
    MAX_BATCH_EVENTS,
    MAX_EVENT_BYTES,
    TRACEPARENT_BYTES,
    is_plain,
    too_many_events,
)
from flux_svc.frames import encode_body, expire_ns_of

M = TypeVar("M", bound=Message)
_FAR_TOO_MANY = 16 * MAX_BATCH_EVENTS
_COUNTED_FIRST_BYTES = 256 * 1024
"""A smaller request of Publish is decoded in some milliseconds, whatever is in it."""


class Draft(NamedTuple):
    """An event that was accepted and has no place yet."""

    source: str
    id: str
    subject: str
    body: bytes
    expire_ns: int = 0
    """Wall time from which it is of no interest; 0: never."""


_draft = partial(tuple.__new__, Draft)
"""Takes the fields in their order as one tuple; the class's own call takes 0.2 us more."""


def draft(events: Iterable[Event], arrival_ns: int) -> list[Draft]:
    """Encodes events; they may change or be reused afterwards."""
    if isinstance(events, Arrived):
        return events.drafts(arrival_ns)
    return [
        _draft(
            (
                event.source,
                event.id,
                event.subject,
                encode_body(event, arrival_ns),
                expire_ns_of(event),
            )
        )
        for event in events
    ]


def publish_request(encoded: bytes) -> pb.PublishRequest:
    """A request of Publish. Raises InvalidArgument for bytes that are none."""
    if len(encoded) > _COUNTED_FIRST_BYTES:
        _bodies(encoded, pb.PublishRequest)
    return _decoded(encoded, pb.PublishRequest)


def _bodies(encoded: bytes, expected: type[Message]) -> Sequence[bytes]:
    """The events of a request as they came. Raises InvalidArgument where there are far too many: to
    decode two million empty ones takes half a second, to count them a tenth of that."""
    try:
        events: Sequence[bytes] = _Bodies.FromString(encoded).events
    except DecodeError as error:
        raise unreadable(encoded, expected.DESCRIPTOR.full_name, error) from error
    if len(events) > _FAR_TOO_MANY:
        raise InvalidArgument.of([FieldViolation("events", too_many_events(len(events)))])
    return events


def _decoded(encoded: bytes, expected: type[M]) -> M:
    try:
        return expected.FromString(encoded)
    except DecodeError as error:
        raise unreadable(encoded, expected.DESCRIPTOR.full_name, error) from error


class Arrival:
    """One request of a publish stream. Raises InvalidArgument for bytes that are none."""

    __slots__ = ("bodies", "request", "size")

    def __init__(self, encoded: bytes) -> None:
        self.bodies: Sequence[bytes] = _bodies(encoded, pb.PublishStreamRequest)
        """Its events as they came."""
        self.request = _decoded(encoded, pb.PublishStreamRequest)
        """Decoded, and with it checked to the last field; but nothing is made of an event until
        somebody looks."""
        self.size = len(encoded)


class Arrived(Sequence[Event]):
    """The events of one request: as bytes, and as objects for whoever looks at one."""

    def __init__(self, bodies: Sequence[bytes]) -> None:
        """`bodies` are encoded events."""
        self._bodies = bodies

    @property
    def doubtful(self) -> list[int]:
        """By index, those that need a closer look. The others keep the contract."""
        return self._recognised[1]

    def __len__(self) -> int:
        return len(self._bodies)

    @overload
    def __getitem__(self, index: int) -> Event: ...

    @overload
    def __getitem__(self, index: slice) -> list[Event]: ...

    def __getitem__(self, index: int | slice) -> Event | list[Event]:
        if isinstance(index, slice):
            return [Event.FromString(body) for body in self._bodies[index]]
        return Event.FromString(self._bodies[index])

    def drafts(self, arrival_ns: int) -> list[Draft]:
        """What is to be stored."""
        drafts, doubtful = self._recognised
        for i in doubtful:
            (drafts[i],) = draft((self[i],), arrival_ns)
        return drafts

    @cached_property
    def _recognised(self) -> tuple[list[Draft], list[int]]:
        # When somebody asks: a message has room for four million empty events, a second of work.
        return _recognise(self._bodies)


def _bodies_type() -> Any:
    """A message like PublishStreamRequest, whose events it leaves as bytes: to the wire a message
    and a string of bytes are the same."""
    file = descriptor_pb2.FileDescriptorProto(
        name="flux_svc/bodies.proto", package="flux_svc", syntax="proto3"
    )
    field = pb.PublishStreamRequest.DESCRIPTOR.fields_by_name["events"]
    file.message_type.add(name="Bodies").field.add(
        name=field.name,
        number=field.number,
        label=descriptor_pb2.FieldDescriptorProto.LABEL_REPEATED,
        type=descriptor_pb2.FieldDescriptorProto.TYPE_BYTES,
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("flux_svc.Bodies"))


_Bodies = _bodies_type()

_ID, _SOURCE, _SUBJECT, _PAYLOAD = 0x12, 0x1A, 0x22, 0x3A
"""Tags of the fields 2, 3, 4 and 7 of an Event."""
_TRACEPARENT = b"\x42\x37"
"""Tag of field 8, and its length, 55."""
_MORE = 0x80
"""Set in every byte of a length but its last."""
_SECONDS = rb"\x08[\x80-\xff]{4}[\x00-\x7f]"
_TIME_AND_PAYLOAD = re.compile(
    # Field 5: a time from 1970 to 3058 with nanoseconds that are less than a second, by how many
    # bytes those take.
    rb"\x2a(?:"
    rb"\x0c" + _SECONDS + rb"\x10(?:[\x80-\xff]{4}[\x01-\x02]|[\x80-\xff]{3}[\x80-\xdb]\x03)"
    rb"|\x0b" + _SECONDS + rb"\x10[\x80-\xff]{3}[\x00-\x7f]"
    rb"|\x0a" + _SECONDS + rb"\x10[\x80-\xff]{2}[\x00-\x7f]"
    rb"|\x09" + _SECONDS + rb"\x10[\x80-\xff][\x00-\x7f]"
    rb"|\x08" + _SECONDS + rb"\x10[\x00-\x7f]"
    rb"|\x06" + _SECONDS + rb")"
    # Field 7, up to its length.
    rb"(\x3a(?:[\x00-\x7f]|[\x80-\xff][\x00-\x7f]|[\x80-\xff]{2}[\x00-\x7f])|)"
).match
_LEFT_OUT = Draft("", "", "", b"")


def _recognise(bodies: Iterable[bytes]) -> tuple[list[Draft], list[int]]:
    """Drafts of valid encoded events, and the indexes of those that need a closer look: in their
    places stands none.

    Recognised is an event that has id, source, subject, time, payload and traceparent in this
    order, the last two perhaps missing, and nothing else, that is plain as `event_rules.is_plain`
    has it and no larger than an event may be.
    """
    drafts: list[Draft] = []
    doubtful: list[int] = []
    names, source, subject, head, payload_bytes = b"", "", "", b"", 0
    """Of the event before: mostly the same."""
    for i, body in enumerate(bodies):
        try:
            end = 2 + body[1]
            id = body[2:end]
            if body[0] == _ID and 2 < end < 2 + _MORE and id.isascii():
                if not (names and body.startswith(names, end)):
                    following = end + 2 + body[end + 1]
                    names = body[end : following + 2 + body[following + 1]]
                    source, subject = _names(names)
                found = _TIME_AND_PAYLOAD(body, end + len(names))
                if found is not None and source:
                    if found[1] != head:
                        head = found[1]
                        payload_bytes = _length(head)
                    size = len(body)
                    left = size - found.end() - payload_bytes
                    if size <= MAX_EVENT_BYTES and (not left or _is_traceparent(body, left)):
                        drafts.append(_draft((source, id.decode(), subject, body, 0)))
                        continue
        except IndexError:
            names = b""
        doubtful.append(i)
        drafts.append(_LEFT_OUT)
    return drafts, doubtful


@lru_cache(maxsize=4096)
def _names(encoded: bytes) -> tuple[str, str]:
    """What these two fields of an event say, if they are source and subject and plain; else
    nothing. Raises IndexError where there are not two."""
    # Services publish on few subjects; at 400 bytes each the memo stays below 4 MB.
    following = 2 + encoded[1]
    if encoded[0] != _SOURCE or encoded[following] != _SUBJECT:
        return "", ""
    if encoded[1] >= _MORE or encoded[following + 1] >= _MORE:
        return "", ""
    event = Event.FromString(b"\x12\x01-" + encoded)
    return (event.source, event.subject) if is_plain(event) else ("", "")


def _length(head: bytes) -> int:
    """What the head of a payload says of its length; 0 where there is no payload."""
    length = 0
    for place, byte in enumerate(head[1:]):
        length |= (byte & ~_MORE) << 7 * place
    return length


def _is_traceparent(body: bytes, left: int) -> bool:
    """Whether what is left of an event is that and nothing else."""
    return (
        left == 2 + TRACEPARENT_BYTES
        and body.startswith(_TRACEPARENT, -left)
        and body[-left:].isascii()
    )
