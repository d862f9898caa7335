"""`aither publish`: one event onto the bus."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aither_cli.failures import USAGE, Failure
from aither_cli.options import Config, FluxAddress, PortBase, flux_address

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from aither.flux.v1.event_pb2 import Event
    from aither.flux.v1.flux_service_pb2 import PublishResult

EPILOG = """\b
Examples:
  aither publish demo.hello '{"a": 1}'
  echo '{"big": true}' | aither publish demo.hello -
  aither publish demo.ping                           no payload: the subject is the news
  aither publish genesis.command.disable '{"agent": "gardener"}' \\
      --type aither.genesis.v1.DisableAgent
\b
Without --type the payload is a google.protobuf.Struct. Exit: 0 stored, 1 not stored, 2 asked
wrongly. Publishing the same --source and --id again stores nothing and is no error.
"""
_LARGEST_EXACT = 2**53


def publish(
    subject: Annotated[str, typer.Argument(metavar="SUBJECT", help="For example demo.hello.")],
    json: Annotated[
        str | None, typer.Argument(metavar="JSON", help="The payload; - reads stdin.")
    ] = None,
    type_name: Annotated[
        str | None,
        typer.Option("--type", metavar="FULL.TYPE.NAME", help="Send this message type instead."),
    ] = None,
    source: Annotated[str, typer.Option("--source", help="Who says it.")] = "aither-cli",
    event_id: Annotated[
        str | None, typer.Option("--id", help="Unique within the source. Unset: a random one.")
    ] = None,
    header: Annotated[
        list[str] | None, typer.Option("--header", metavar="KEY=VALUE", help="May be repeated.")
    ] = None,
    flux: FluxAddress = None,
    config: Config = None,
    port_base: PortBase = None,
) -> None:
    """Publish one event and print where it stands in the log."""
    address = flux_address(flux, config, port_base)
    from aither_cli.dialing import quiet_logs
    from aither_cli.interrupts import run_interruptible
    from aither_sdk.event_rules import check_event, check_event_size
    from aither_sdk.events import new_event

    quiet_logs()
    if event_id == "":
        told = "--id is empty; leave it out for a random one"
        raise Failure(f"{told}, which is stored each time anew", exit_code=USAGE)
    text = sys.stdin.read() if json == "-" else json
    if json == "-" and not (text or "").strip():
        raise Failure("nothing came on stdin; pipe a JSON object into it", exit_code=USAGE)
    payload = payload_of(text, type_name)
    event = new_event(subject, payload, source=source, id=event_id, headers=_headers(header or []))
    check_event(event)
    check_event_size(event.ByteSize())
    result = run_interruptible(_publish(address, event))
    if result.duplicate:
        typer.echo(f"{subject} was stored before as {result.sequence}: same source and id")
    else:
        typer.echo(f"published {subject} as {result.sequence}")


async def _publish(address: str, event: Event) -> PublishResult:
    from aither.flux.v1.flux_service_pb2 import PublishRequest
    from aither.flux.v1.flux_service_pb2_grpc import FluxServiceStub
    from aither_cli.dialing import ask

    request = PublishRequest(events=[event])
    response = await ask(address, lambda channel: FluxServiceStub(channel).Publish(request))
    return response.results[0]


def payload_of(text: str | None, type_name: str | None) -> Message | dict[str, Any] | None:
    """The payload that the JSON text stands for. Raises Failure saying what would be right."""
    if text is None and type_name is None:
        return None
    if type_name is not None:
        return _typed(text or "{}", type_name)
    value = _parsed(text or "")
    if not isinstance(value, dict):
        told = f"a JSON object is needed, this is {_kind(value)}"
        raise Failure(f"{told}; wrap it, for example '{{\"value\": 1}}'", exit_code=USAGE)
    return value


def _typed(text: str, type_name: str) -> Message:
    from google.protobuf import json_format

    from aither_cli.payloads import message_class
    from aither_sdk.vocabulary import register_types

    known = message_class(type_name)
    if known is None:
        from difflib import get_close_matches

        close = get_close_matches(type_name, register_types(), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else "use a full protobuf name"
        raise Failure(f'no message type "{type_name}" here; {hint}', exit_code=USAGE)
    try:
        return json_format.Parse(text, known())
    except (json_format.ParseError, RecursionError) as error:
        told = " ".join(str(error).split())
        raise Failure(f"the JSON is no {type_name}: {told}; correct it", exit_code=USAGE) from None


def _parsed(text: str) -> Any:
    import json

    def no_number(name: str) -> float:
        raise Failure(f"{name} is no JSON; use null or a string", exit_code=USAGE)

    try:
        return json.loads(
            text, parse_constant=no_number, parse_int=_exact, object_pairs_hook=_each_once
        )
    except (ValueError, RecursionError) as error:
        told = "too deeply nested" if isinstance(error, RecursionError) else str(error)
        told += "; quote it for the shell, for example '{\"a\": 1}'"
        raise Failure(f"the payload is no JSON: {told}", exit_code=USAGE) from None


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs; of a key that stands twice one value would be lost."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            told = f'"{key}" stands twice in one object; keep one of them'
            raise Failure(told, exit_code=USAGE)
        found[key] = value
    return found


def _exact(digits: str) -> int:
    number = int(digits)
    if abs(number) > _LARGEST_EXACT:
        told = f"{digits} would lose digits, for numbers here are doubles; write it as a string"
        raise Failure(told, exit_code=USAGE)
    return number


def _kind(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _headers(given: list[str]) -> dict[str, str]:
    headers = {}
    for item in given:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise Failure(f'--header "{item}" is not KEY=VALUE; for example a=b', exit_code=USAGE)
        headers[key] = value
    return headers
