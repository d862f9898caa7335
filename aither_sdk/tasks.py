"""Background work with a name, an owner, a bound and an end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

from aither_sdk.errors import ResourceExhausted
from aither_sdk.losses import FULL, SHUTDOWN, Losses
from aither_sdk.words import Words

T = TypeVar("T")
_log = Words("aither_sdk")


@dataclass(frozen=True, slots=True)
class TaskStatistics:
    """Counts since the owner was made."""

    running: int
    completed: int
    failed: int
    cancelled: int
    dropped: int


class BoundedTasks:
    """Owns at most `limit` tasks; what does not fit is refused and counted, never queued.

    Takes coroutine functions, not coroutines, so that refused work leaves nothing un-awaited. A
    task that fails is logged with its name and ends alone. Leaving the `async with` gives running
    tasks `close_timeout_s`, then cancels them and names them in `cancelled_at_close`.
    """

    def __init__(
        self,
        name: str,
        limit: int,
        *,
        close_timeout_s: float = 2.0,
        losses: Losses | None = None,
    ) -> None:
        """`losses`: is told of what is dropped; `Life.bounded_tasks` gives its own."""
        self.name = name
        self.limit = limit
        self.cancelled_at_close: tuple[str, ...] = ()
        self._close_timeout_s = close_timeout_s
        self._losses = losses
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False
        self._completed = self._failed = self._cancelled = self._dropped = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    def spawn(self, name: str, work: Callable[[], Coroutine[Any, Any, T]]) -> asyncio.Task[T]:
        """Starts `work()` as a task. Raises ResourceExhausted when full or closed; counts that."""
        task = self.try_spawn(name, work)
        if task is None:
            why = "closed" if self._closed else f"full ({self.limit} tasks)"
            raise ResourceExhausted(
                f"{self.name} is {why} and refused {name}; let running work end first",
                reason="TASKS_FULL",
            )
        return task

    def try_spawn(
        self, name: str, work: Callable[[], Coroutine[Any, Any, T]]
    ) -> asyncio.Task[T] | None:
        """As `spawn`, but answers None where that would raise."""
        if not self.has_room:
            self.drop(name)
            return None
        task = asyncio.get_running_loop().create_task(work(), name=f"{self.name}:{name}")
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    @property
    def has_room(self) -> bool:
        """Whether one more would be taken; for an owner that can let work wait elsewhere."""
        return not self._closed and len(self._tasks) < self.limit

    def drop(self, name: str) -> None:
        """Counts work that is given up: by this, or by an owner whose own queue was full."""
        self._dropped += 1
        if self._losses is not None:
            self._losses.note(self.name, name, SHUTDOWN if self._closed else FULL)

    def statistics(self) -> TaskStatistics:
        return TaskStatistics(
            running=len(self._tasks),
            completed=self._completed,
            failed=self._failed,
            cancelled=self._cancelled,
            dropped=self._dropped,
        )

    async def aclose(self, timeout_s: float | None = None) -> None:
        """Takes no more work, waits for what runs, then cancels it. Safe to call again."""
        self._closed = True
        wait_s = self._close_timeout_s if timeout_s is None else timeout_s
        try:
            if self._tasks:
                await asyncio.wait(set(self._tasks), timeout=wait_s)
        finally:
            left = set(self._tasks)
            for task in left:
                task.cancel()
        if left:
            self.cancelled_at_close = tuple(sorted(task.get_name() for task in left))
            if self._losses is not None:
                self._losses.outlived(self.cancelled_at_close)
            _log.warning("tasks.cancelled", owner=self.name, tasks=self.cancelled_at_close)
            await asyncio.wait(left, timeout=self._close_timeout_s)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            self._cancelled += 1
        elif (error := task.exception()) is not None:
            self._failed += 1
            _log.error("task.failed", owner=self.name, task=task.get_name(), exc_info=error)
        else:
            self._completed += 1
