from __future__ import annotations

import asyncio

import pytest

from aither_sdk.errors import ResourceExhausted
from aither_sdk.tasks import BoundedTasks


async def test_what_does_not_fit_is_refused_and_counted() -> None:
    gate = asyncio.Event()
    async with BoundedTasks("owner", 2) as tasks:
        tasks.spawn("a", gate.wait)
        tasks.spawn("b", gate.wait)
        with pytest.raises(ResourceExhausted, match="full"):
            tasks.spawn("c", gate.wait)
        assert tasks.try_spawn("d", gate.wait) is None
        assert tasks.statistics().dropped == 2
        gate.set()
    assert tasks.statistics().completed == 2


async def test_room_is_free_again_when_work_has_ended() -> None:
    async def nothing() -> None:
        return

    async with BoundedTasks("owner", 1) as tasks:
        for _ in range(3):
            await tasks.spawn("work", nothing)


async def test_a_task_that_fails_ends_alone() -> None:
    async def fail() -> None:
        raise RuntimeError("on purpose")

    async def succeed() -> int:
        return 7

    async with BoundedTasks("owner", 4) as tasks:
        failed = tasks.spawn("fails", fail)
        fine = tasks.spawn("succeeds", succeed)
        assert await fine == 7
        with pytest.raises(RuntimeError):
            await failed
    assert tasks.statistics().failed == 1


async def test_what_outlives_its_owner_is_cancelled_and_named() -> None:
    async with BoundedTasks("owner", 4, close_timeout_s=0.01) as tasks:
        tasks.spawn("endless", asyncio.Event().wait)
    assert tasks.cancelled_at_close == ("owner:endless",)
    assert tasks.statistics().cancelled == 1


async def test_a_closed_owner_takes_no_work() -> None:
    tasks = BoundedTasks("owner", 4)
    await tasks.aclose()
    with pytest.raises(ResourceExhausted, match="closed"):
        tasks.spawn("late", asyncio.Event().wait)


async def test_closing_can_itself_be_cancelled_and_still_cancels_the_work() -> None:
    tasks = BoundedTasks("owner", 1, close_timeout_s=60)
    work = tasks.spawn("endless", asyncio.Event().wait)
    closing = asyncio.create_task(tasks.aclose())
    await asyncio.sleep(0)
    closing.cancel()
    await asyncio.wait([closing, work])
    assert closing.cancelled()
    assert work.cancelled()
