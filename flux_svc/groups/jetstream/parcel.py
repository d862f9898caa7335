"""What two nodes say to each other: a few values and some blobs; pure."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from google.rpc.status_pb2 import Status

from aither_sdk.errors import AitherError
from aither_sdk.rpc_status import from_status, to_status

_COUNT = struct.Struct(">II")
_SIZE = struct.Struct(">I")
_PIECE = struct.Struct(">16sQB")
"""Session, number, whether more of the same parcel follows."""
PIECE_OVERHEAD = _PIECE.size


class Parcel(NamedTuple):
    values: dict[str, Any]
    blobs: Sequence[bytes] = ()


def pack(parcel: Parcel) -> bytes:
    values = json.dumps(parcel.values, separators=(",", ":")).encode()
    sizes = b"".join(_SIZE.pack(len(blob)) for blob in parcel.blobs)
    return b"".join(
        (_COUNT.pack(len(values), len(parcel.blobs)), sizes, values, *map(bytes, parcel.blobs))
    )


def unpack(data: bytes) -> Parcel:
    length, count = _COUNT.unpack_from(data)
    at = _COUNT.size
    sizes = [_SIZE.unpack_from(data, at + n * _SIZE.size)[0] for n in range(count)]
    at += count * _SIZE.size
    values = json.loads(data[at : at + length])
    at += length
    blobs = []
    for size in sizes:
        blobs.append(data[at : at + size])
        at += size
    return Parcel(values, blobs)


class Piece(NamedTuple):
    """As much of a parcel as fits in one message."""

    session: bytes
    number: int
    more: bool
    data: bytes


def pieces(session: bytes, number: int, data: bytes, size: int) -> Iterator[bytes]:
    """The messages of one parcel, numbered from `number` on."""
    for start in range(0, max(1, len(data)), size):
        more = start + size < len(data)
        yield _PIECE.pack(session, number, more) + data[start : start + size]
        number += 1


def piece_of(message: bytes) -> Piece:
    session, number, more = _PIECE.unpack_from(message)
    return Piece(session, number, bool(more), message[_PIECE.size :])


def packed_error(error: AitherError) -> bytes:
    return to_status(error).SerializeToString()


def error_of(data: bytes) -> AitherError:
    return from_status(Status.FromString(data))
