"""Commands as they arrive: typed messages, or JSON objects as `aither publish` sends them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from google.protobuf import json_format, struct_pb2
from google.protobuf.message import DecodeError

from aither.flux.v1 import event_pb2
from aither.genesis.v1 import commands_pb2

Request = commands_pb2.EnableAgent | commands_pb2.DisableAgent | commands_pb2.RunAction

ANSWERS = ("accepted", "rejected")
"""Last tokens of `genesis.command.*` that are no commands but Genesis's answers."""

_KINDS: dict[str, type[Request]] = {
    "enable": commands_pb2.EnableAgent,
    "disable": commands_pb2.DisableAgent,
    "run": commands_pb2.RunAction,
}
_EXAMPLES = {
    "enable": '{"agent": "herald"}',
    "disable": '{"agent": "herald"}',
    "run": '{"agent": "herald", "action_id": "summary"}',
}
_STRUCT_TYPE = "type.googleapis.com/google.protobuf.Struct"


@dataclass(frozen=True, slots=True)
class Command:
    """A command that is not answered yet."""

    key: str
    """ "source/id" of its event."""
    verb: str
    request: Request | None
    """None: it could not be read, and `fault` says why."""
    fault: str
    """What is wrong and what would be right; empty: nothing."""
    event: event_pb2.Event
    """Its envelope, to be named as the cause; the payload is left out."""

    @property
    def switches(self) -> tuple[str, bool] | None:
        """The agent that it switches, and whether on; None when it is no such command."""
        match self.request:
            case commands_pb2.EnableAgent(agent=agent):
                return agent, True
            case commands_pb2.DisableAgent(agent=agent):
                return agent, False
        return None


def read_command(event: event_pb2.Event) -> Command:
    """The command of a `genesis.command.<verb>` event. Never raises: faults are told in it."""
    verb = event.subject.rsplit(".", 1)[-1]
    request, fault = _read(verb, event)
    envelope = event_pb2.Event()
    envelope.CopyFrom(event)
    envelope.ClearField("payload")
    return Command(f"{event.source}/{event.id}", verb, request, fault, envelope)


def _read(verb: str, event: event_pb2.Event) -> tuple[Request | None, str]:
    kind = _KINDS.get(verb)
    if kind is None:
        return None, f'no command "{verb}"; use one of {", ".join(_KINDS)}'
    request = kind()
    example = f"use {kind.DESCRIPTOR.full_name} or a JSON object such as {_EXAMPLES[verb]}"
    struct = struct_pb2.Struct()
    try:
        if event.payload.Unpack(request):
            return request, ""
        if not event.payload.Unpack(struct):
            got = event.payload.TypeName() or "nothing"
            return None, f"the payload is {got}; {example}"
        json_format.ParseDict(_with_input_type(json_format.MessageToDict(struct)), request)
    except DecodeError:
        return None, f"the payload is broken; {example}"
    except (json_format.Error, ValueError, TypeError, RecursionError) as error:
        told = " ".join(str(error).split())[:300]
        return None, f"{told}; {example}"
    return request, ""


def _with_input_type(given: dict[str, Any]) -> dict[str, Any]:
    """`action.input` may be a plain JSON object: then it is a Struct."""
    action = given.get("action")
    if not isinstance(action, dict):
        return given
    inputs = action.get("input")
    if not isinstance(inputs, dict) or "@type" in inputs:
        return given
    return {**given, "action": {**action, "input": {"@type": _STRUCT_TYPE, "value": inputs}}}
