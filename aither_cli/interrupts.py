"""Ctrl-C: a command ends in good order, and within END_LIMIT_S in any case.

SIGINT is taken whatever was inherited: a shell without job control starts what runs in the
background (`aither tail ... &` in a script) with SIGINT ignored, Python then leaves it ignored, and
a command that follows events would have no end.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Coroutine
from types import FrameType
from typing import Any, TypeVar

END_LIMIT_S = 2.0
"""From Ctrl-C to the end where good order does not come about: a terminal that was paused, a reader
that does not read."""
_INTERRUPTED = 130
T = TypeVar("T")


def run_interruptible(work: Coroutine[Any, Any, T], *, exit_code: int = _INTERRUPTED) -> T:
    """`asyncio.run(work)` that SIGINT cancels. Call it on the main thread.

    Raises KeyboardInterrupt once the cancelled work has cleaned up after itself. After END_LIMIT_S,
    or with a second SIGINT, the process ends with `exit_code` wherever it stands.
    """
    task: asyncio.Task[T] | None = None
    interrupted = False

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        nonlocal interrupted
        if interrupted or task is None:
            os._exit(exit_code)  # asked twice, or nothing is under way yet
        interrupted = True
        # No thread is started and no lock is taken: this runs between any two lines of the loop.
        signal.setitimer(signal.ITIMER_REAL, END_LIMIT_S)
        if not task.done():
            task.cancel()
            task.get_loop().call_soon_threadsafe(_wake)

    async def whole() -> T:
        nonlocal task
        task = asyncio.current_task()
        return await work

    before = signal.signal(signal.SIGINT, interrupt)
    alarm = signal.signal(signal.SIGALRM, lambda *_: os._exit(exit_code))
    try:
        return asyncio.run(whole())
    except asyncio.CancelledError:
        if not interrupted:
            raise
        raise KeyboardInterrupt from None
    finally:
        work.close()  # where it never began
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, alarm)
        signal.signal(signal.SIGINT, before)


def _wake() -> None:
    """Lets the loop look at what was cancelled while it waited."""
