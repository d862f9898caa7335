from __future__ import annotations

import asyncio

import pytest

from aither_sdk.dependency import Dependency
from aither_sdk.errors import DeadlineExceeded, Unavailable
from aither_sdk.losses import BREAKER_OPEN, FULL, SHUTDOWN, TIMEOUT, Loss, Losses
from aither_sdk.tasks import BoundedTasks


def told(losses: Losses) -> list[Loss]:
    found = []
    while (loss := losses.pop()) is not None:
        found.append(loss)
    return found


def test_losses_of_an_owner_are_one_word_with_a_count_and_the_newest_name() -> None:
    losses = Losses()
    for task in ("a", "b", "c"):
        losses.note("part", task, FULL)
    losses.note("part", "d", SHUTDOWN)
    assert told(losses) == [Loss("part", FULL, "c", 3), Loss("part", SHUTDOWN, "d", 1)]
    assert told(losses) == []
    assert losses.total == 4


def test_what_could_not_be_told_is_counted_by_the_next_word() -> None:
    losses = Losses()
    losses.note("part", "a", FULL)
    loss = losses.pop()
    assert loss is not None
    losses.note("part", "b", FULL)
    losses.put_back(loss)
    assert told(losses) == [Loss("part", FULL, "b", 2)]


def test_owners_beyond_the_bound_share_a_name() -> None:
    losses = Losses()
    for number in range(1_000):
        losses.note(f"owner {number}", "x", FULL)
    found = told(losses)
    assert len(found) == 65
    assert found[-1] == Loss("other", FULL, "x", 936)


async def test_bounded_tasks_say_what_they_drop_and_who_outlived_them() -> None:
    losses = Losses()
    async with BoundedTasks("part", 1, close_timeout_s=0.01, losses=losses) as tasks:
        tasks.spawn("stays", asyncio.Event().wait)
        assert not tasks.has_room
        assert tasks.try_spawn("late", asyncio.Event().wait) is None
    assert tasks.try_spawn("after", asyncio.Event().wait) is None
    assert told(losses) == [Loss("part", FULL, "late", 1), Loss("part", SHUTDOWN, "after", 1)]
    assert list(losses.outlived_tasks) == ["part:stays"]


async def test_a_dependency_says_what_it_refused_and_gave_up() -> None:
    losses = Losses()
    flux = Dependency("flux", deadline_s=0.01, limit=1, losses=losses)
    for _ in range(7):
        with pytest.raises((DeadlineExceeded, Unavailable)):
            await flux.call(asyncio.Event().wait)
    assert told(losses) == [
        Loss("flux", TIMEOUT, "call", 5),
        Loss("flux", BREAKER_OPEN, "call", 2),
    ]
