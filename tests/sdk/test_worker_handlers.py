"""The handlers of a worker, without Flux."""

from __future__ import annotations

import asyncio

import pytest

from aither.flux.v1.event_pb2 import Event
from aither.flux.v1.flux_service_pb2 import Delivery
from aither_sdk.working.handlers import Handlers
from aither_sdk.working.leases import Lease
from aither_sdk.working.verdicts import Verdict


async def test_a_handler_that_is_cancelled_before_its_first_step_gives_its_place_back() -> None:
    ended: list[tuple[int, Verdict | None]] = []
    handled: list[int] = []

    async def handle(event: Event) -> None:
        handled.append(event.sequence)

    handlers = Handlers(
        "work",
        handle,
        1,
        (),
        None,
        lambda _: True,
        lambda lease, verdict: ended.append((lease.sequence, verdict)),
    )
    handlers.open()
    first, second = lease(1), lease(2)
    handlers.add(first, 0.0)
    first.lost = "taken back at once"
    handlers.end(first)
    handlers.add(second, 0.0)
    async with asyncio.timeout(5):
        while not ended:
            await asyncio.sleep(0)
        handlers.begin(0.0)
        while len(ended) < 2:
            await asyncio.sleep(0)
    assert handled == [2]
    assert ended == [(1, None), (2, Verdict("ack"))]
    assert (handlers.running, handlers.waiting) == (0, 0)


class Abort(BaseException):
    """As some libraries leave a task."""


@pytest.mark.parametrize("raised", [Abort("enough"), BaseExceptionGroup("some", [Abort("enough")])])
async def test_a_handler_that_raises_what_is_no_exception_gives_its_event_back(
    raised: BaseException,
) -> None:
    ended: list[tuple[int, Verdict | None]] = []

    async def handle(event: Event) -> None:
        raise raised

    handlers = Handlers(
        "work",
        handle,
        1,
        (),
        None,
        lambda _: True,
        lambda lease, verdict: ended.append((lease.sequence, verdict)),
    )
    handlers.open()
    handlers.add(lease(1), 0.0)
    async with asyncio.timeout(5):
        while handlers.running:
            await asyncio.sleep(0)
    told = f"{type(raised).__name__}: {raised}"
    assert ended == [(1, Verdict("retry", reason=told))]


def lease(sequence: int) -> Lease:
    delivery = Delivery(ack_id=f"{sequence}", event=Event(sequence=sequence), attempt=1)
    return Lease(delivery, 1, 30.0, 30.0, 0.0, 10.0)
