from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aither_sdk.bulkhead import Bulkhead
from aither_sdk.errors import ResourceExhausted


async def _hold(bulkhead: Bulkhead, until: asyncio.Event) -> None:
    async with bulkhead:
        await until.wait()


async def _turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_what_finds_no_place_and_no_room_to_wait_is_refused_and_counted() -> None:
    bulkhead, done = Bulkhead("sense", limit=2, waiting=1), asyncio.Event()
    running = [asyncio.create_task(_hold(bulkhead, done)) for _ in range(3)]
    await _turns()
    assert (bulkhead.taken, bulkhead.queued) == (2, 1)
    with pytest.raises(ResourceExhausted, match="no more may wait") as refused:
        await _hold(bulkhead, done)
    assert (refused.value.reason, bulkhead.refused) == ("BULKHEAD_FULL", 1)
    done.set()
    await asyncio.gather(*running)
    assert (bulkhead.taken, bulkhead.queued) == (0, 0)


async def test_nobody_waits_longer_than_the_limit() -> None:
    bulkhead, done = Bulkhead("sense", limit=1, waiting=9, wait_s=0.01), asyncio.Event()
    running = asyncio.create_task(_hold(bulkhead, done))
    await _turns()
    with pytest.raises(ResourceExhausted, match="in vain"):
        await _hold(bulkhead, done)
    assert (bulkhead.taken, bulkhead.queued, bulkhead.refused) == (1, 0, 1)
    done.set()
    await running


async def test_a_place_given_to_a_waiter_that_is_cancelled_goes_to_the_next() -> None:
    bulkhead = Bulkhead("sense", limit=1, waiting=2)
    first, rest = asyncio.Event(), asyncio.Event()
    holder = asyncio.create_task(_hold(bulkhead, first))
    await _turns()
    cancelled = asyncio.create_task(_hold(bulkhead, rest))
    await _turns()
    heir = asyncio.create_task(_hold(bulkhead, rest))
    await _turns()
    first.set()
    await holder  # the place is the cancelled one's, which has not run yet
    cancelled.cancel()
    await _turns()
    assert (bulkhead.taken, bulkhead.queued) == (1, 0)
    rest.set()
    await heir
    assert bulkhead.taken == 0
    assert cancelled.cancelled()


@settings(max_examples=60)
@given(
    st.integers(1, 3),
    st.integers(0, 4),
    st.lists(st.tuples(st.sampled_from("ecl"), st.integers(0, 9)), max_size=60),
)
def test_places_are_never_lost_nor_given_twice(
    limit: int, waiting: int, steps: list[tuple[str, int]]
) -> None:
    """e: one more enters; c: the n-th is cancelled; l: the n-th may leave."""

    async def run() -> None:
        bulkhead = Bulkhead("sense", limit=limit, waiting=waiting, wait_s=60)
        all_of: list[tuple[asyncio.Task[None], asyncio.Event]] = []
        for turn, (step, n) in enumerate(steps):
            if step == "e":
                event = asyncio.Event()
                all_of.append((asyncio.create_task(_hold(bulkhead, event)), event))
            elif all_of:
                task, event = all_of[n % len(all_of)]
                if step == "c":
                    task.cancel()
                else:
                    event.set()
            if turn % 3:
                await asyncio.sleep(0)
            assert bulkhead.taken <= limit
            assert bulkhead.queued <= waiting
        for _, event in all_of:
            event.set()
        ends = await asyncio.gather(*(task for task, _ in all_of), return_exceptions=True)
        assert all(
            end is None or isinstance(end, asyncio.CancelledError | ResourceExhausted)
            for end in ends
        )
        assert (bulkhead.taken, bulkhead.queued) == (0, 0)

    asyncio.run(run())
