"""Blocking calls in a bounded number of threads, counted until the thread ends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")


class Threads:
    """At most `limit` calls at once; further callers wait their turn, within their own deadline.

    A call that hangs in the kernel (a dead NFS mount, a name server) keeps its thread after its
    caller gave up, so it goes on counting against the limit: it can use up these threads and no
    others. They are daemons, so that it cannot hold the end of the process up, either.
    """

    def __init__(self, name: str, limit: int) -> None:
        self.name = name
        self._room = asyncio.Semaphore(limit)

    async def run(self, work: Callable[[], T]) -> T:
        """The result of `work()`, or what it raised. Cancellation gives up the answer, not the
        thread; callers must be bounded in number, for those who wait are not."""
        await self._room.acquire()
        loop = asyncio.get_running_loop()
        answer: Future[T] = Future()

        def work_and_leave() -> None:
            _answer(answer, work)
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(self._room.release)

        name = f"pulse:{self.name}"
        try:
            threading.Thread(target=work_and_leave, name=name, daemon=True).start()
        except RuntimeError:  # the system has no thread left
            self._room.release()
            raise
        return await asyncio.wrap_future(answer)


def _answer(answer: Future[T], work: Callable[[], T]) -> None:
    if not answer.set_running_or_notify_cancel():
        return
    try:
        result = work()
    except BaseException as error:
        answer.set_exception(error)
    else:
        answer.set_result(result)
