"""What callers ask of a group, done by its task between two turns, one after the other."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, cast

from aither_sdk.errors import AitherError

T = TypeVar("T")
Work = Callable[[], Awaitable[Any]]


class Commands:
    """Owned by its group. Bounded by the calls of ConsumerService that the server takes at once."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._waiting: deque[tuple[Work, asyncio.Future[Any]]] = deque()

    def __bool__(self) -> bool:
        return bool(self._waiting)

    async def ask(self, work: Callable[[], Awaitable[T]]) -> T:
        """Its result, or what it raises. Cancelling the caller does not stop it."""
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.append((work, cast("asyncio.Future[Any]", answer)))
        self._wake()
        return await answer

    async def obey_next(self) -> None:
        """By the group's task. There must be one."""
        work, answer = self._waiting.popleft()
        try:
            result = await work()
        except Exception as error:
            if not answer.done():
                answer.set_exception(error)
        except BaseException:
            answer.cancel()
            raise
        else:
            if not answer.done():
                answer.set_result(result)

    def refuse(self, error: AitherError) -> None:
        """What waits will never be done."""
        while self._waiting:
            _, answer = self._waiting.popleft()
            if not answer.done():
                answer.set_exception(error)
