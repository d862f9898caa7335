"""`aither tail`: events as they come."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from aither_cli.failures import USAGE, Failure
from aither_cli.moments import EXAMPLE, moment_of
from aither_cli.options import Config, FluxAddress, PortBase, flux_address
from aither_cli.teller import let_go_of_stdout

if TYPE_CHECKING:
    from aither.flux.v1.flux_service_pb2 import Gap
    from aither_sdk.errors import OutOfRange
    from aither_sdk.subscribing.subscriber import Start, SubscriberState

EPILOG = """\b
Examples:
  aither tail 'pulse.>'                         everything of the heartbeat, from now on
  aither tail 'pulse.target.*.changed'          only changes
  aither tail 'genesis.>' --from last           the newest of each subject, then all after
  aither tail '>' --from earliest --max 10      the oldest ten, and done
  aither tail 'demo.>' --from 42 --json | jq    from sequence 42, one JSON object a line
\b
`*` stands for one token, a trailing `>` for the rest; quote them for the shell. Events go to
stdout; gaps and reconnects are told on stderr.
Exit: 0 after Ctrl-C or --max, 1 failed, 2 asked wrongly.
"""


def tail(
    subjects: Annotated[
        list[str], typer.Argument(metavar="SUBJECT...", help="For example 'pulse.>'.")
    ],
    begin: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="new|earliest|last|SEQ|TIME",
            help="Where to begin; TIME as 2031-01-31T12:00:00Z.",
        ),
    ] = "new",
    json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    most: Annotated[
        int | None, typer.Option("--max", min=1, metavar="N", help="End after so many events.")
    ] = None,
    flux: FluxAddress = None,
    config: Config = None,
    port_base: PortBase = None,
) -> None:
    """Print events, one a line, as they come."""
    address = flux_address(flux, config, port_base)
    from aither_cli.dialing import quiet_logs
    from aither_cli.interrupts import run_interruptible
    from aither_sdk.errors import OutOfRange
    from aither_sdk.subjects import FilterSet

    quiet_logs()
    FilterSet(subjects)
    try:
        run_interruptible(_tail(address, subjects, start_of(begin), json, most), exit_code=0)
    except KeyboardInterrupt:
        return  # the usual way out of an endless list
    except OutOfRange as error:
        if error.reason != "BEYOND_END":
            raise
        raise Failure(_beyond_end(begin, error)) from None
    except BrokenPipeError:
        let_go_of_stdout()


def start_of(text: str) -> Start:
    """Where `--from` says to begin. Raises Failure saying what may be written."""
    from aither_sdk.subscribing.subscriber import EARLIEST, LAST_PER_SUBJECT, NEW, after, at

    words = {"new": NEW, "earliest": EARLIEST, "last": LAST_PER_SUBJECT}
    if text in words:
        return words[text]
    if text.isdecimal() and len(text) < 20:
        sequence = int(text)
        return after(sequence - 1) if sequence > 1 else EARLIEST
    moment = moment_of(text)
    if moment is None:
        told = f'--from "{text}" is no place to begin'
        hint = f"use new, earliest, last, a sequence or a time such as {EXAMPLE}"
        raise Failure(f"{told}; {hint}", exit_code=USAGE)
    return at(moment)


def _beyond_end(begin: str, error: OutOfRange) -> str:
    told = f"--from {begin} lies beyond the end of the log"
    last = error.metadata.get("last_sequence", "")
    where = f", whose last event is {last}" if last != "0" else ", which is empty"
    return f"{told}{where}; use --from new to wait for what comes, or --from earliest"


async def _tail(
    address: str, subjects: list[str], start: Start, json: bool, most: int | None
) -> None:
    from aither_cli.rendering import event_json, event_line
    from aither_sdk.subscribing.subscriber import Subscriber

    await _check_flux(address)
    render = event_json if json else event_line
    stderr = _Stderr(address)
    subscriber = Subscriber(
        address,
        subjects,
        start=start,
        client_name="aither tail",
        max_batch_events=min(most or 0, 4096),
        # The memory log begins anew with every start of Flux; a person wants to go on seeing.
        on_new_epoch="restart",
        on_gap=stderr.gap,
        on_state=stderr.state,
    )
    left = most
    async with subscriber:
        try:
            async for events in subscriber.batches():
                shown = events if left is None else events[:left]
                # Blocks while the reader is slow or the terminal is paused, and is meant to:
                # nothing else runs here, and Flux keeps what is not read.
                sys.stdout.write("".join(f"{render(event)}\n" for event in shown))
                sys.stdout.flush()
                if left is not None:
                    left -= len(shown)
                    if left <= 0:
                        return
        finally:
            stderr.silence()  # that the stream ends now is no news


async def _check_flux(address: str) -> None:
    """Raises Failure when Flux is not there: a Subscriber would wait, a person wants to be told."""
    from aither.flux.v1.flux_service_pb2 import GetStreamInfoRequest
    from aither.flux.v1.flux_service_pb2_grpc import FluxServiceStub
    from aither_cli.dialing import ask

    await ask(
        address,
        lambda channel: FluxServiceStub(channel).GetStreamInfo(GetStreamInfoRequest()),
    )


class _Stderr:
    """What happens to the stream, beside its events."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._silent = False
        self._was_connected = False
        self._lost = False
        self._epoch = ""

    def state(self, state: SubscriberState) -> None:
        if state.connected and self._lost:
            self._say(f"following again from {self._address}")
            self._lost = False
        elif self._was_connected and not state.connected and not self._lost:
            self._lost = True
            self._say(f"lost the stream ({' '.join(state.reason.split())}); dialling again")
        self._was_connected = self._was_connected or state.connected
        if self._epoch and state.epoch != self._epoch:
            self._say("the log is another one; following it from its beginning")
        self._epoch = state.epoch or self._epoch

    def gap(self, gap: Gap) -> None:
        from aither_cli.rendering import gap_words

        self._say(gap_words(gap))

    def silence(self) -> None:
        self._silent = True

    def _say(self, text: str) -> None:
        if self._silent:
            return
        sys.stderr.write(f"aither: {text}\n")
        sys.stderr.flush()
