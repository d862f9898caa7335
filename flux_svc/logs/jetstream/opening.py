"""What a node does before it is one of them: finds NATS, makes the stream, learns what is in it."""

from __future__ import annotations

import asyncio

from aither_sdk.backoff import FullJitter
from aither_sdk.errors import AitherError, Unavailable
from flux_svc.logs.jetstream.faults import StreamRefused, fault_of
from flux_svc.logs.jetstream.follower import survey
from flux_svc.logs.jetstream.ledger import Ledger
from flux_svc.logs.jetstream.messages import ID, expire_ns_in, place_of
from flux_svc.logs.jetstream.stream import Stream, StreamPlan, StreamState
from flux_svc.logs.jetstream.wire import Dialler, Message, Wire
from flux_svc.sequencer import WINDOW_EVENTS

OPEN_S = 20.0
"""How long opening waits for nats-server to be there."""


async def first_connection(dialler: Dialler, stream: Stream) -> tuple[Wire, StreamState]:
    """A connection and the stream, tried until `OPEN_S` have gone by."""
    backoff = FullJitter()
    loop = asyncio.get_running_loop()
    # By the clock and not by a cancellation, which the library may swallow; every step is bounded.
    end_s = loop.time() + OPEN_S
    while True:
        try:
            wire = await dialler.dial()
            try:
                return wire, await stream.make(wire)
            except BaseException:
                await wire.close()
                raise
        except Unavailable as error:
            last: AitherError = error
        except StreamRefused as refused:
            last = fault_of(refused, stream.plan.name)
        if not isinstance(last, Unavailable) or loop.time() >= end_s:
            raise last
        await asyncio.sleep(backoff.next_s(0.05))


async def survey_events(wire: Wire, plan: StreamPlan, state: StreamState, ledger: Ledger) -> None:
    """The newest event of each subject, and of the newest events their ids and ends."""
    last = state.last_sequence
    keys: dict[int, str] = {}

    def take_subject(message: Message) -> None:
        subject = message.subject[len(plan.prefix) :]
        ledger.tail.subjects[subject] = place_of(message.reply).sequence

    def take_key(message: Message) -> None:
        headers, sequence = message.headers or {}, place_of(message.reply).sequence
        keys[sequence] = headers.get(ID, "")
        ledger.expiries.add(sequence, expire_ns_in(headers))

    newest = {"deliver_policy": "last_per_subject", "filter_subject": plan.prefix + ">"}
    await survey(wire, plan.name, newest, last, take_subject)
    start = max(state.first_sequence, last - WINDOW_EVENTS + 1)
    window = {"deliver_policy": "by_start_sequence", "opt_start_seq": start}
    await survey(wire, plan.name, window, last, take_key)
    ledger.remember((keys[sequence], sequence) for sequence in sorted(keys) if sequence <= last)
    ledger.expiries.known_from = start
