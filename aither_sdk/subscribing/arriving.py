"""What a subscriber's stream brings, decoded as far as somebody looks.

A message of a thousand events is cut into events by one pass over their lengths; what is in them is
decoded when the first of them is asked for, all in one go. So who only counts, takes the newest of
a batch, or hands it on, does not pay for the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast, overload

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from aither.flux.v1.event_pb2 import Event
from aither.flux.v1.flux_service_pb2 import SubscribeResponse
from aither_sdk.errors import DataLoss

_SEQUENCE_TAG = b"\x08"


class Events(Sequence[Event]):
    """The events of one message; equal to any sequence of the same events."""

    __slots__ = ("_bodies", "_decoded", "_encoded")

    def __init__(self, encoded: bytes, bodies: Sequence[bytes]) -> None:
        """`encoded` is the message that has `bodies` as its encoded events; both are let go when
        it is decoded."""
        self._encoded = encoded
        self._bodies = bodies
        self._decoded: Sequence[Event] | None = None

    def __len__(self) -> int:
        return len(self._bodies if self._decoded is None else self._decoded)

    @overload
    def __getitem__(self, index: int) -> Event: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Event]: ...

    def __getitem__(self, index: int | slice) -> Event | Sequence[Event]:
        return self._all()[index]

    def __iter__(self) -> Iterator[Event]:
        return iter(self._all())

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, Sequence) else NotImplemented

    def __repr__(self) -> str:
        return f"<{len(self)} events>"

    def sequence_at(self, index: int) -> int:
        """`self[index].sequence`, without decoding the event."""
        if self._decoded is not None:
            return self._decoded[index].sequence
        body = self._bodies[index]
        if body[:1] != _SEQUENCE_TAG:  # Flux puts it first
            return Event.FromString(body).sequence
        sequence = shift = 0
        for byte in body[1:11]:
            sequence |= (byte & 0x7F) << shift
            if byte < 0x80:
                break
            shift += 7
        return sequence

    def _all(self) -> Sequence[Event]:
        """Raises DataLoss, each time it is asked, where a body is no event."""
        if self._decoded is None:
            try:
                self._decoded = SubscribeResponse.FromString(self._encoded).events
            except DecodeError as error:
                told = f"{len(self)} events came, and the bytes of one are none: {error}"
                raise DataLoss(told) from error
            self._encoded, self._bodies = b"", ()
        return self._decoded


class Arriving:
    """One message of a stream. Raises DecodeError for bytes that are none."""

    __slots__ = ("events", "message")

    def __init__(self, encoded: bytes) -> None:
        whole = _Shallow.FromString(encoded)
        self.message = cast(SubscribeResponse, whole)
        """For what else it says: its own `events` are bytes."""
        self.events: Sequence[Event] = Events(encoded, whole.events) if whole.events else ()


def _shallow_type() -> Any:
    """SubscribeResponse, but with its events as bytes: to the wire that is the same."""
    file = descriptor_pb2.FileDescriptorProto(
        name="aither_sdk/arriving.proto",
        package="aither_sdk",
        syntax="proto3",
        dependency=[SubscribeResponse.DESCRIPTOR.file.name],
    )
    shallow = file.message_type.add()
    SubscribeResponse.DESCRIPTOR.CopyToProto(shallow)
    shallow.name = "ShallowSubscribeResponse"
    (events,) = [field for field in shallow.field if field.name == "events"]
    events.type = descriptor_pb2.FieldDescriptorProto.TYPE_BYTES
    events.ClearField("type_name")
    pool = descriptor_pool.Default()
    pool.Add(file)
    descriptor = pool.FindMessageTypeByName(f"{file.package}.{shallow.name}")
    return message_factory.GetMessageClass(descriptor)


_Shallow = _shallow_type()
