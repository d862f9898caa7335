"""Events as messages of a stream, and back; pure.

The subject is the event's behind the stream's name, the body is the event as its publisher sent it,
and headers tell what must be known without opening it. Place and time are the stream's.
"""

from __future__ import annotations

import calendar
import time
from base64 import urlsafe_b64encode
from collections.abc import Iterable, Mapping
from functools import lru_cache
from hashlib import blake2b
from typing import NamedTuple
from urllib.parse import quote, unquote

from aither.flux.v1.event_pb2 import Event
from flux_svc.frames import Record, encode_body, expire_ns_of, recorded_field, seal

ID = "Nats-Msg-Id"
SOURCE = "Aither-Source"
EXPIRE = "Aither-Expire"
"""When the event ends, ns since 1970. It is not left to nats-server's `Nats-TTL`: that removes the
newest event of a subject without a word, and no node could know then that the state has ended."""
TTL = "Nats-TTL"
EXPECTED_LAST = "Nats-Expected-Last-Sequence"
EXPECTED_SUBJECT = "Nats-Expected-Last-Subject-Sequence"
EXPECTED_LAST_ID = "Nats-Expected-Last-Msg-Id"
BATCH_ID = "Nats-Batch-Id"
BATCH_SEQUENCE = "Nats-Batch-Sequence"
BATCH_COMMIT = "Nats-Batch-Commit"

_NS = 1_000_000_000
_RECORD_BYTES = 22 + 8
"""Of the file store, around each message: length, sequence, time, subject's length; checksum."""
_HEADER_BYTES = 4


class Outgoing(NamedTuple):
    """An event on its way to the stream."""

    key: str
    subject: str
    body: bytes
    headers: dict[str, str]


def key_of(source: str, event_id: str) -> str:
    """Names an event in `Nats-Msg-Id`: 22 characters, whatever source and id are made of."""
    digest = blake2b(f"{source}\0{event_id}".encode(), digest_size=16).digest()
    return urlsafe_b64encode(digest)[:22].decode()


def outgoing(events: Iterable[Event], arrival_ns: int) -> list[Outgoing]:
    """Encodes events; they may change or be reused afterwards."""
    made = []
    for event in events:
        key = key_of(event.source, event.id)
        headers = {ID: key, SOURCE: _quoted(event.source)}
        if expire_ns := expire_ns_of(event):
            headers[EXPIRE] = str(expire_ns)
        made.append(Outgoing(key, event.subject, encode_body(event, arrival_ns), headers))
    return made


def record_of_message(
    sequence: int, recorded_ns: int, subject: str, headers: Mapping[str, str], body: bytes
) -> Record:
    """`subject` is the event's. A message that Flux did not write has no source."""
    frame = seal(body, sequence, recorded_field(recorded_ns))
    return Record(sequence, recorded_ns, subject, source_of(headers), frame)


def source_of(headers: Mapping[str, str]) -> str:
    return _unquoted(headers.get(SOURCE, ""))


def expire_ns_in(headers: Mapping[str, str]) -> int:
    """When the event ends; 0: never."""
    return int(headers[EXPIRE]) if EXPIRE in headers else 0


def size_on_disk(subject: str, headers: Mapping[str, str], body: bytes) -> int:
    """Bytes that the file store counts for a message; `subject` is the stream's."""
    return _RECORD_BYTES + _HEADER_BYTES + len(subject) + header_bytes(headers) + len(body)


def header_bytes(headers: Mapping[str, str]) -> int:
    """Of headers on the wire."""
    return 12 + sum(len(key) + len(value) + 4 for key, value in headers.items())


def time_ns(text: str) -> int:
    """`2026-11-21T08:02:25.2974874Z` in nanoseconds since 1970: the server's times are in UTC and
    leave out the zeros at the end."""
    second, _, fraction = text.removesuffix("Z").partition(".")
    return _second(second) * _NS + int(fraction.ljust(9, "0") or "0")


def time_text(at_ns: int) -> str:
    """The same way back."""
    seconds, nanos = divmod(at_ns, _NS)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{nanos:09d}Z"


class Place(NamedTuple):
    """What the reply subject of a consumer's message says of it."""

    sequence: int
    consumer_sequence: int
    recorded_ns: int
    pending: int


def place_of(reply: str) -> Place:
    """`$JS.ACK.[<domain>.<account>.]<stream>.<consumer>.<delivered>.<sequence>.<consumer
    sequence>.<time>.<pending>[.<random>]`: the long form has two tokens more before and one
    behind."""
    tokens = reply.split(".")
    if len(tokens) > 9:
        tokens = tokens[:11]
    sequence, consumer_sequence, recorded_ns, pending = map(int, tokens[-4:])
    return Place(sequence, consumer_sequence, recorded_ns, pending)


@lru_cache(1024)
def _quoted(source: str) -> str:
    """Headers are ASCII on one line."""
    return quote(source, safe="/:@!$&'()*+,;=~")


@lru_cache(1024)
def _unquoted(header: str) -> str:
    return unquote(header)


@lru_cache(64)
def _second(text: str) -> int:
    return calendar.timegm(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
