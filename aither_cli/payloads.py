"""Payloads: which message types are known here, and any message as JSON, unknown ones included."""

from __future__ import annotations

import base64
import json
import re
from functools import cache
from typing import Any

from google.protobuf import descriptor_pool, json_format, message_factory
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.struct_pb2 import Struct, Value

from aither_sdk.vocabulary import register_types

_MARK = "\0any"
"""Key of a stand-in for an Any; no JSON that a person wrote has it."""
_PREFIX = "type.googleapis.com/"
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""What could move the cursor, recolour the terminal or reorder the line: payloads are strangers."""

_Unreadable = (DecodeError, TypeError, ValueError, RecursionError, json_format.Error)
"""What protobuf raises for an unknown nested type, damaged bytes or a time out of range."""


@cache
def message_class(full_name: str) -> type[Message] | None:
    """The class of a known message type, or None."""
    register_types()
    try:
        descriptor = descriptor_pool.Default().FindMessageTypeByName(full_name)
    except KeyError:
        return None
    return message_factory.GetMessageClass(descriptor)


def type_of(payload: AnyMessage) -> str:
    """Full name of the type inside."""
    return payload.type_url.rpartition("/")[2]


def unpacked(payload: AnyMessage) -> Message | None:
    """The message inside, or None when its type is unknown or its bytes are not of that type."""
    known = message_class(type_of(payload))
    if known is None:
        return None
    try:
        return known.FromString(payload.value)
    except DecodeError:
        return None


def as_json(message: Message, *, proto_names: bool = False) -> Any:
    """The message as ProtoJSON; nothing raises, whatever a stranger has put in.

    An Any of an unknown type becomes `{"@type": ..., "value": base64}`, however deep it stands.
    """
    if isinstance(message, AnyMessage):
        return _any_as_json(message, proto_names=proto_names)
    try:
        return json_format.MessageToDict(message, preserving_proto_field_name=proto_names)
    except _Unreadable:
        pass
    try:
        readable = type(message)()
        readable.CopyFrom(message)
        _replace_unknown(readable)
        shown = json_format.MessageToDict(readable, preserving_proto_field_name=proto_names)
        return _restored(shown)
    except _Unreadable:
        return _opaque(_PREFIX + message.DESCRIPTOR.full_name, message.SerializeToString())


def compact(value: Any, limit: int | None = None) -> str:
    """JSON in one line, without what could steer a terminal, cut to `limit` characters."""
    text = printable(json.dumps(_short(value), ensure_ascii=False, separators=(",", ":")))
    return text if limit is None or len(text) <= limit else text[: limit - 1] + "…"


def printable(text: str) -> str:
    """The text with control characters shown instead of obeyed."""
    return _CONTROL.sub(lambda match: f"\\u{ord(match.group()):04x}", text)


def _short(value: Any) -> Any:
    """1 instead of 1.0: all numbers of a Struct are doubles, and JSON has only one kind anyway."""
    if isinstance(value, float) and value.is_integer() and abs(value) <= 2**53:
        return int(value)
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    return [_short(item) for item in value] if isinstance(value, list) else value


def _any_as_json(payload: AnyMessage, *, proto_names: bool) -> Any:
    inner = unpacked(payload)
    if inner is None:
        return _opaque(payload.type_url, payload.value)
    value = as_json(inner, proto_names=proto_names)
    if inner.DESCRIPTOR.full_name.startswith("google.protobuf.") or not isinstance(value, dict):
        return {"@type": payload.type_url, "value": value}
    return {"@type": payload.type_url, **value}


def _opaque(type_url: str, value: bytes) -> dict[str, str]:
    return {"@type": type_url, "value": base64.b64encode(value).decode("ascii")}


def _replace_unknown(message: Message) -> None:
    """Every Any inside becomes a Struct that holds its JSON: MessageToDict knows no other way to
    get past an unknown one."""
    for field, value in message.ListFields():
        for child in _messages(field, value):
            if not isinstance(child, AnyMessage):
                _replace_unknown(child)
                continue
            shown = Struct()
            shown[_MARK] = json.dumps(_any_as_json(child, proto_names=False))
            child.Pack(shown)


def _restored(value: Any) -> Any:
    """What `_replace_unknown` put in place of an Any, as what it stands for."""
    if isinstance(value, list):
        return [_restored(item) for item in value]
    if not isinstance(value, dict):
        return value
    inner = value.get("value")
    if isinstance(inner, dict) and inner.keys() == {_MARK}:
        return json.loads(inner[_MARK])
    return {key: _restored(item) for key, item in value.items()}


def _messages(field: FieldDescriptor, value: Any) -> list[Message]:
    if field.type != FieldDescriptor.TYPE_MESSAGE or isinstance(value, Struct | Value):
        return []
    inner: Descriptor | None = field.message_type
    if inner is not None and inner.GetOptions().map_entry:
        return [item for item in value.values() if isinstance(item, Message)]
    return [value] if isinstance(value, Message) else list(value)
