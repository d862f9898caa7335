"""`aither consumers`: the consumer groups of Flux, looked at and mended."""

from __future__ import annotations

import asyncio
import json as jsons
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from aither_cli.asking import Yes, agree
from aither_cli.failures import USAGE, Failure
from aither_cli.moments import EXAMPLE, moment_of
from aither_cli.options import Config, FluxAddress, PortBase, flux_address

if TYPE_CHECKING:
    from google.protobuf.duration_pb2 import Duration

    from aither.flux.v1 import consumer_service_pb2 as pb
    from aither_sdk.consumers import Consumers

EPILOG = """\b
Examples:
  aither consumers list                         every group, with lag and what is parked
  aither consumers show indexer                 settings, position and members
  aither consumers parked indexer               what was put aside, and why
  aither consumers replay indexer 17 23         deliver these again; without numbers: all
  aither consumers delete-parked indexer --all  forget all that was put aside; asks first
  aither consumers seek indexer --after 1000    go on behind sequence 1000
\b
What cannot be undone is asked about first; --yes answers for a script.
Exit: 0 done, 1 failed, 2 asked wrongly.
"""
Answer = TypeVar("Answer")
Name = Annotated[str, typer.Argument(metavar="NAME", help="The group.")]
Json = Annotated[bool, typer.Option("--json", help="JSON, one object a line.")]
Sequences = Annotated[
    list[int] | None, typer.Argument(metavar="[SEQ]...", help="Sequences of parked events.")
]

Epoch = Annotated[
    str,
    typer.Option(
        "--epoch", metavar="LOG", help="The log that SEQ belong to, if not the group's own."
    ),
]

app = typer.Typer(
    help="Look at consumer groups and mend them.", epilog=EPILOG, rich_markup_mode=None
)


@app.command("list")
def list_groups(
    json: Json = False,
    flux: FluxAddress = None,
    config: Config = None,
    port_base: PortBase = None,
) -> None:
    """List the groups: how far behind each is, and what waits."""
    from aither_cli.teller import columns

    found = _call(flux_address(flux, config, port_base), _all_groups)
    if json:
        for group in found:
            typer.echo(_json(group))
        return
    if not found:
        typer.echo("no consumer groups")
        return
    head = ["group", "checkpoint", "lag", "out", "retrying", "parked", "members"]
    typer.echo("\n".join(columns([head, *map(_row, found)])))


@app.command()
def show(
    name: Name,
    json: Json = False,
    flux: FluxAddress = None,
    config: Config = None,
    port_base: PortBase = None,
) -> None:
    """Show one group: its settings, how it stands, and its members."""
    group = _call(flux_address(flux, config, port_base), lambda groups: groups.get(name))
    typer.echo(_json(group) if json else "\n".join(_shown(group)))


@app.command()
def parked(
    name: Name,
    json: Json = False,
    flux: FluxAddress = None,
    config: Config = None,
    port_base: PortBase = None,
) -> None:
    """List the events that were put aside, oldest first, with the reason."""

    async def ask(groups: Consumers) -> tuple[list[pb.ParkedEvent], str]:
        group = await groups.get(name)
        return [one async for one in groups.parked(name)], group.state.epoch

    found, epoch = _call(flux_address(flux, config, port_base), ask)
    for one in found:
        typer.echo(_json(one) if json else _parked_line(one, epoch))
    if not found and not json:
        typer.echo(f"nothing is parked in {name}")


@app.command()
def replay(
    name: Name,
    sequences: Sequences = None,
    epoch: Epoch = "",
    flux: FluxAddress = None,
    config: Config = None,
    port_base: PortBase = None,
) -> None:
    """Hand parked events to the group again; without SEQ all of them."""
    which = _checked(sequences)
    replayed = _call(
        flux_address(flux, config, port_base),
        lambda groups: groups.replay_parked(name, which, epoch=epoch),
    )
    _tell_count(replayed, "replayed", sequences)


@app.command("delete-parked")
def delete_parked(
    name: Name,
    sequences: Sequences = None,
    everything: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
    epoch: Epoch = "",
    yes: Yes = False,
    flux: FluxAddress = None,
    config: Config = None,
    port_base: PortBase = None,
) -> None:
    """Forget parked events; the log keeps what it holds of them. With --all it asks first."""
    if bool(sequences) == everything:
        raise Failure("say which: sequences, or --all", exit_code=USAGE)
    which = _checked(sequences)
    address = flux_address(flux, config, port_base)
    if everything and not yes:
        count = _call(address, lambda groups: groups.get(name)).state.parked_events
        if count:
            of = f" of the log {epoch}" if epoch else ""
            told = f"all parked events{of} are forgotten, with their copies; {name} has {count}"
            agree(told, yes=yes)
    deleted = _call(address, lambda groups: groups.delete_parked(name, which, epoch=epoch))
    _tell_count(deleted, "deleted", sequences)


@app.command()
def seek(
    name: Name,
    after: Annotated[
        int | None, typer.Option("--after", min=0, metavar="N", help="Go on behind sequence N.")
    ] = None,
    at: Annotated[
        str | None,
        typer.Option("--at", metavar="TIME", help=f"From the first event of {EXAMPLE} or later."),
    ] = None,
    flux: FluxAddress = None,
    config: Config = None,
    port_base: PortBase = None,
) -> None:
    """Move a group; what it has out is taken back and delivered again where it lies ahead."""
    if (after is None) == (at is None):
        raise Failure("say where to: --after N or --at TIME", exit_code=USAGE)
    _checked(None if after is None else [after])
    moment = None if at is None else moment_of(at)
    if at is not None and moment is None:
        told = f'--at "{at}" is no time; write it as {EXAMPLE}'
        raise Failure(told, exit_code=USAGE)
    checkpoint = _call(
        flux_address(flux, config, port_base),
        lambda groups: groups.seek(name, after=after, at=moment),
    )
    typer.echo(f"{name} goes on behind {checkpoint}")


@app.command()
def delete(
    name: Name,
    yes: Yes = False,
    flux: FluxAddress = None,
    config: Config = None,
    port_base: PortBase = None,
) -> None:
    """Delete a group with its position and its parked events; its members' streams end. Asks."""
    address = flux_address(flux, config, port_base)
    if not yes:
        agree(_lost_with(_call(address, lambda groups: groups.get(name))), yes=yes)
    _call(address, lambda groups: groups.delete(name))
    typer.echo(f"deleted {name}")


def _call(address: str, work: Callable[[Consumers], Awaitable[Answer]]) -> Answer:
    """The answer of the groups of Flux at `address` to `work`."""
    from aither_cli.dialing import explained, quiet_logs
    from aither_sdk.consumers import Consumers

    quiet_logs()

    async def asked() -> Answer:
        async with Consumers(address) as groups:
            return await work(groups)

    return asyncio.run(explained(asked(), address))


async def _all_groups(groups: Consumers) -> list[pb.GetConsumerResponse]:
    from aither_sdk.errors import NotFound

    found = []
    async for group in groups.list():
        with suppress(NotFound):  # deleted meanwhile
            found.append(await groups.get(group.name))
    return found


def _checked(sequences: list[int] | None) -> list[int]:
    for sequence in sequences or []:
        if not 0 <= sequence < 2**63:
            raise Failure(f"{sequence} is no sequence of a log", exit_code=USAGE)
    return sequences or []


def _tell_count(count: int, done: str, sequences: list[int] | None) -> None:
    if sequences and count < len(set(sequences)):
        missing = len(set(sequences)) - count
        are = "is" if missing == 1 else "are"
        typer.echo(f"{done} {count}; {missing} of those you named {are} not parked")
    else:
        typer.echo(f"{done} {count}")


def _lost_with(group: pb.GetConsumerResponse) -> str:
    state = group.state
    parked = f"{state.parked_events} parked event{'' if state.parked_events == 1 else 's'}"
    members = len(state.members)
    ended = f", and ends the stream{'' if members == 1 else 's'} of {members}" if members else ""
    return (
        f"deleting {group.consumer.name} forgets its checkpoint {state.checkpoint_sequence} "
        f"({state.lag_events} behind the end) and {parked}{ended}"
    )


def _row(group: pb.GetConsumerResponse) -> list[str]:
    state = group.state
    return [
        group.consumer.name,
        str(state.checkpoint_sequence),
        str(state.lag_events),
        str(state.outstanding_events),
        str(state.retrying_events),
        str(state.parked_events),
        str(len(state.members)),
    ]


def _shown(group: pb.GetConsumerResponse) -> list[str]:
    from aither_cli.teller import columns

    consumer, state = group.consumer, group.state
    waits = ", ".join(map(_span, consumer.backoff_durations))
    rows = [
        ["group", consumer.name + (" (exclusive)" if consumer.exclusive else "")],
        ["takes", ", ".join(consumer.filters) or "everything"],
        ["checkpoint", f"{state.checkpoint_sequence}, {state.lag_events} behind the end"],
        [
            "events",
            f"{state.outstanding_events} out, {state.retrying_events} retrying, "
            f"{state.parked_events} parked, {state.missed_events} missed",
        ],
        [
            "so far",
            f"{state.delivered_events} deliveries, {state.acknowledged_events} acknowledged",
        ],
        [
            "rules",
            f"{_span(consumer.ack_deadline_duration)} to acknowledge, "
            f"{consumer.max_deliveries} deliveries, waits {waits}, "
            f"{consumer.max_outstanding_events} out at most",
        ],
    ]
    if consumer.exclusive:
        lease = _span(consumer.lease_duration)
        rows.append(["leader", f"epoch {state.leader_epoch}, lease {lease}"])
    for member in state.members:
        role = "active" if member.active else "standing by"
        rows.append(["member", f"{member.name}: {member.outstanding_events} out, {role}"])
    return columns(rows)


def _span(duration: Duration) -> str:
    return f"{duration.seconds + duration.nanos / 1e9:g} s"


def _parked_line(one: pb.ParkedEvent, epoch: str) -> str:
    """`epoch` is that of the group's log."""
    from aither_cli.rendering import event_line

    deliveries = "delivery" if one.attempts == 1 else "deliveries"
    told = f"{event_line(one.event)}\n    {one.attempts} {deliveries}: {one.reason}"
    if one.epoch != epoch:
        told += f"\n    of another log: --epoch {one.epoch}"
    return told


def _json(message: Any) -> str:
    from aither_cli.payloads import as_json

    return jsons.dumps(as_json(message))
