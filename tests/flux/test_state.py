"""The state as GetLast answers it, while others supersede, remove and expire."""

from __future__ import annotations

import pytest

from aither_sdk.errors import ResourceExhausted, Unavailable
from flux_svc.fanout.state import gather, pieces
from flux_svc.frames import event_of
from tests.conformance.log_house import event
from tests.flux.holed_log import HoledLog

ALL = 2**20


def anything(_subject: str) -> bool:
    return True


async def test_a_state_that_is_superseded_and_removed_meanwhile_is_answered_newer() -> None:
    log = HoledLog()
    await log.append([event("a"), event("b"), event("c")])

    async def supersede() -> None:
        await log.append([event("b"), event("c")])
        log.lose(2)

    log.before_fetch = supersede
    answer, position = await gather(log, anything, max_bytes=ALL)
    # "c" is the one that was newest at the position, too: one moment, not a mixture.
    assert answer == b"".join((await log.fetch([1, 4, 5])).frames)
    assert position == 5


async def test_a_state_that_ended_meanwhile_is_left_out() -> None:
    log = HoledLog()
    await log.append([event("a"), event("b")])

    async def expire() -> None:
        log.lose(1)

    log.before_fetch = expire
    answer, position = await gather(log, anything, max_bytes=ALL)
    assert (event_of(answer).subject, position) == ("b", 2)


async def test_a_state_too_large_is_refused_before_it_is_held() -> None:
    log = HoledLog()
    await log.append([event(f"s{n}", id="x" * 100 + str(n)) for n in range(1000)])
    with pytest.raises(ResourceExhausted) as refused:
        await gather(log, anything, max_bytes=50_000)
    assert refused.value.reason == "ANSWER_TOO_LARGE"


async def test_a_state_that_never_holds_still_is_refused_after_a_while() -> None:
    log = HoledLog()
    await log.append([event("a")])

    async def supersede() -> None:
        await log.append([event("a")])
        log.lose(log.info().last_sequence - 1)
        log.before_fetch = supersede

    log.before_fetch = supersede
    with pytest.raises(Unavailable) as refused:
        await gather(log, anything, max_bytes=ALL)
    assert refused.value.reason == "STATE_CHANGING"
    assert refused.value.retry_after_s


async def test_pieces_keep_to_events_and_bytes_and_a_large_event_goes_alone() -> None:
    log = HoledLog()
    sizes = [10, 10, 500, 10, 10, 10, 10]
    await log.append([event(f"s{n}", id=f"{n}" * size) for n, size in enumerate(sizes)])
    found = [p async for p in pieces(log, range(1, 8), max_events=3, max_bytes=300)]
    assert [(p.events, p.position) for p in found] == [(2, 2), (1, 3), (3, 6), (1, 7)]
    assert not any(p.gone for p in found)
    log.lose(2)
    found = [p async for p in pieces(log, [1, 2, 3], max_events=3, max_bytes=300)]
    assert [(p.events, p.position, list(p.gone)) for p in found] == [(1, 2, [2]), (1, 3, [])]
