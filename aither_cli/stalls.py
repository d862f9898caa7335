"""`aither stalls`: which lines held up which loop, and what to do about them."""

from __future__ import annotations

import json as jsons
import linecache
import re
import sys
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aither_cli.failures import Failure
from aither_cli.options import Config, FluxAddress, PortBase, flux_address

if TYPE_CHECKING:
    import grpc

    from aither.flux.v1.event_pb2 import Event
    from aither.runtime.v1.runtime_events_pb2 import CallInFlight, Stall, StallSample

EPILOG = """\b
Examples:
  aither stalls                       the newest twenty
  aither stalls --service gateway     of one service
  aither stalls show 7f3a             its stack, and what to do about it
  aither stalls --json | jq .culprit
\b
They are read from Flux (`runtime.<service>.stall`). Exit: 0, also when there are none; 1 failed.
"""
_PAGE_EVENTS = 500
_LOOKED_AT_EVENTS = 100_000
"""Events of stalls searched for one that is asked for by its id."""
_SHOWN_ID = 8
_RUNS_A_HANDLE = re.compile(r'/asyncio/events\.py", line \d+, in (\S+\.)?_run$')

app = typer.Typer(rich_markup_mode=None)


@dataclass(frozen=True, slots=True)
class Told:
    """What the log says of one stall."""

    stall: Stall
    sequence: int
    """Of the event that says it."""
    ended: bool
    """False: nobody has said that it ended. It still lasts, or the service died in it."""


@app.callback(invoke_without_command=True, epilog=EPILOG)
def stalls(
    context: typer.Context,
    service: Annotated[
        str | None, typer.Option("--service", metavar="NAME", help="Only of this service.")
    ] = None,
    most: Annotated[
        int, typer.Option("--max", min=1, max=10_000, metavar="N", help="So many, newest first.")
    ] = 20,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    flux: FluxAddress = None,
    config: Config = None,
    port_base: PortBase = None,
) -> None:
    """List what held up event loops: cause, culprit, how long, in which trace."""
    if context.invoked_subcommand is not None:
        return
    address = flux_address(flux, config, port_base)
    found = _read(address, _filter(service), most)
    if json:
        for told in found:
            typer.echo(jsons.dumps(as_json(told)))
        return
    if not found:
        whose = f" of {service}" if service else ""
        sys.stderr.write(f"aither: no stall{whose} stands in the log\n")
        return
    _show_table(found)


@app.command()
def show(
    stall_id: Annotated[str, typer.Argument(metavar="ID", help="The id, or how it begins.")],
    json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    flux: FluxAddress = None,
    config: Config = None,
    port_base: PortBase = None,
) -> None:
    """Tell one stall in full: the stack, the figures, and what to do about this kind."""
    found = _read(flux_address(flux, config, port_base), _filter(None), 2, stall_id)
    if not found:
        raise Failure(f'no stall with an id that begins with "{stall_id}"; see `aither stalls`')
    if len(found) > 1:
        raise Failure(
            f'more than one stall has an id that begins with "{stall_id}"; write more of it'
        )
    if json:
        typer.echo(jsons.dumps(as_json(found[0])))
        return
    for line in in_full(found[0]):
        typer.echo(line)


def fold(events: Iterable[Event], begins: str = "") -> list[Told]:
    """The stalls that events tell of, newest first; `events` come newest first, too.

    The end of a stall and its detection are one stall, and its end counts.
    """
    from aither.runtime.v1.runtime_events_pb2 import LoopStallDetected, LoopStalled
    from aither_cli.payloads import unpacked

    found: dict[str, Told] = {}
    for event in events:
        news = unpacked(event.payload)
        if isinstance(news, LoopStalled | LoopStallDetected):
            stall = news.stall
            if stall.stall_id.startswith(begins):
                told = Told(stall, event.sequence, isinstance(news, LoopStalled))
                known = found.setdefault(stall.stall_id, told)
                if told.ended and not known.ended:
                    found[stall.stall_id] = told
    return list(found.values())


def as_json(told: Told) -> dict[str, Any]:
    """For programs: the message as ProtoJSON and what the log adds."""
    from aither_cli.payloads import as_json as proto_json

    return {
        **proto_json(told.stall, proto_names=True),
        "trace_id": trace_id(told.stall),
        "ended": told.ended,
        "sequence": told.sequence,
    }


def in_full(told: Told) -> list[str]:
    """`aither stalls show`."""
    from aither_cli.payloads import printable
    from aither_cli.rendering import seconds
    from aither_cli.stall_advice import advice

    stall = told.stall
    at = stall.culprit
    figures = [f"blocked for {_lasted(told)}"]
    for name, duration in (
        ("CPU of the loop", stall.loop_cpu_duration),
        ("of the process", stall.process_cpu_duration),
        ("garbage collection", stall.gc_duration),
    ):
        figures.append(f"{name} {seconds(duration)}")
    if stall.wchan:
        figures.append(f"the kernel says {stall.wchan}")
    source = linecache.getline(at.file_path, at.line_number).strip() if at.file_path else ""
    rows = [
        ("stall", stall.stall_id),
        ("when", _moment(stall)),
        ("service", stall.service),
        ("cause", _cause(stall)),
        ("culprit", f"{_place(stall)}{f'   {source}' if source else ''}"),
        ("task", stall.task_name or _without_task(stall)),
        ("trace", trace_id(stall) or _own_trace(stall)),
        ("figures", "; ".join(figures)),
    ]
    lines = [f"{name:<8} {printable(value)}" for name, value in rows]
    lines += _stack("Stack, innermost last:", stall.stacktrace)
    for other in stall.other_stacktraces:
        lines += _stack("Stack of another thread that ran meanwhile:", other)
    lines += _part("Seen at:", _places(stall.samples))
    lines += _part("Calls that waited:", [_spell_call(call) for call in stall.calls_in_flight])
    tasks = [f"{one.tasks:>6} {printable(one.coroutine)}" for one in stall.running_tasks]
    lines += _part("Tasks of the loop:", tasks)
    lines += ["", "What to do:"]
    lines += [f"  {sentence}" for sentence in advice(stall, source)]
    return lines


def _without_task(stall: Stall) -> str:
    return f"none; a bare callback, {stall.coroutine}" if stall.coroutine else "not known"


def _stack(title: str, stacktrace: str) -> list[str]:
    """Without the frames of the loop itself, which are the same in every stall."""
    from aither_cli.payloads import printable

    frames = [line.strip() for line in stacktrace.splitlines() if line.startswith("  File ")]
    of_loop = [n for n, frame in enumerate(frames) if _RUNS_A_HANDLE.search(frame)]
    begin = of_loop[-1] + 1 if of_loop and of_loop[-1] + 1 < len(frames) else 0
    return _part(title, [printable(frame) for frame in frames[begin:]])


def _part(title: str, lines: list[str]) -> list[str]:
    return ["", title, *(f"  {line}" for line in lines)] if lines else []


def _places(samples: Iterable[StallSample]) -> list[str]:
    """Where it was seen, each place with the time that the looks stand for."""
    from aither_cli.payloads import printable

    weights_ns: dict[str, int] = {}
    for sample in samples:
        at = sample.location
        place = (
            f"{at.function_name} ({at.file_path}:{at.line_number})" if at.file_path else "the loop"
        )
        weight_ns = sample.weight_duration.ToNanoseconds()
        weights_ns[place] = weights_ns.get(place, 0) + weight_ns
    return [f"{ns / 1e6:>8,.0f} ms {printable(place)}" for place, ns in weights_ns.items()]


def _spell_call(call: CallInFlight) -> str:
    from aither_cli.payloads import printable
    from aither_cli.rendering import seconds

    trace = call.traceparent.split("-")[1:2]
    of = f", trace {trace[0]}" if trace else ""
    return printable(f"{call.method}, running for {seconds(call.running_duration)}{of}")


def trace_id(stall: Stall) -> str:
    """Of the trace that it interrupted; empty where there was none."""
    return _trace_of(stall.traceparent)


def _own_trace(stall: Stall) -> str:
    own = _trace_of(stall.stall_traceparent)
    return f"none was open; its own is {own}" if own else "none was open"


def _trace_of(traceparent: str) -> str:
    parts = traceparent.split("-")
    return parts[1] if len(parts) == 4 else ""


def _read(address: str, subject: str, most: int, begins: str = "") -> list[Told]:
    from aither_cli.dialing import ask, quiet_logs
    from aither_cli.interrupts import run_interruptible

    quiet_logs()

    async def look(channel: grpc.aio.Channel) -> list[Told]:
        events = []
        async for event in _newest_first(channel, subject):
            events.append(event)
            if len(events) % _PAGE_EVENTS == 0 and len(fold(events, begins)) > most:
                break
        return fold(events, begins)[:most]

    return run_interruptible(ask(address, look))


async def _newest_first(channel: grpc.aio.Channel, subject: str) -> AsyncIterator[Event]:
    from aither.flux.v1 import flux_service_pb2 as pb
    from aither.flux.v1.flux_service_pb2_grpc import FluxServiceStub

    stub = FluxServiceStub(channel)
    begin, looked_at = 0, 0
    while looked_at < _LOOKED_AT_EVENTS:
        page = await stub.Read(
            pb.ReadRequest(
                filters=[subject],
                direction=pb.READ_DIRECTION_BACKWARD,
                from_sequence=begin,
                max_events=_PAGE_EVENTS,
            )
        )
        for event in page.events:
            yield event
        looked_at += len(page.events)
        begin = page.next_sequence
        if page.end_reached or not begin:
            return


def _filter(service: str | None) -> str:
    return f"runtime.{service or '*'}.stall"


def _show_table(found: list[Told]) -> None:
    from aither_cli.payloads import printable
    from aither_cli.teller import columns, rich_table

    head = ("when", "service", "cause", "blocked", "culprit", "trace", "id")
    rows = [
        tuple(
            printable(cell)
            for cell in (
                _moment(told.stall),
                told.stall.service,
                _cause(told.stall),
                _lasted(told),
                _place(told.stall),
                trace_id(told.stall) or _trace_of(told.stall.stall_traceparent) or "-",
                told.stall.stall_id[:_SHOWN_ID],
            )
        )
        for told in found
    ]
    if sys.stdout.isatty():
        from rich.console import Console

        Console(highlight=False).print(rich_table(head, rows))
    else:
        typer.echo("\n".join(columns([head, *rows])))


def _lasted(told: Told) -> str:
    from aither_cli.rendering import seconds

    lasted = seconds(told.stall.stall_duration)
    return lasted if told.ended else f"over {lasted}, no end told"


def _moment(stall: Stall) -> str:
    from datetime import UTC

    try:
        return stall.start_time.ToDatetime(tzinfo=UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError):
        return f"{stall.start_time.seconds}s"


def _cause(stall: Stall) -> str:
    from aither.runtime.v1 import runtime_events_pb2
    from aither_cli.rendering import plain_name

    name = plain_name(runtime_events_pb2.StallCause, stall.cause).lower()
    return "unknown" if name == "unspecified" else name


def _place(stall: Stall) -> str:
    at = stall.culprit
    if not at.file_path:
        return at.function_name or "no user code"
    return f"{at.function_name} ({at.file_path}:{at.line_number})"
