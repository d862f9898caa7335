"""Who goes with whom: appends wait in lines, and what waits together goes as one batch.

There is one line for each succession and one for all appends that belong to none. What comes while
the head of a line is on its way is the next batch: it costs one commit of nats-server and one
fsync. A line never has two batches on their way, for one that is lost must not be overtaken by
those behind it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from aither_sdk.errors import AitherError, Unavailable
from flux_svc.logs.base import ANYTHING, Appended, Expected, Succession
from flux_svc.logs.faults import log_closed
from flux_svc.logs.jetstream.messages import Outgoing
from flux_svc.logs.write_queue import WriteQueue

TOGETHER_EVENTS = 1000
"""Of appends that go together: what nats-server takes in one batch unless it is told otherwise."""
TOGETHER_BYTES = 2 * 2**20

Store = Callable[[Sequence[Outgoing], Expected], Awaitable[list[Appended]]]


@dataclass(slots=True)
class Job:
    """One append on its way."""

    sent: Sequence[Outgoing]
    bytes: int
    expected: Expected
    succession: Succession | None
    answer: asyncio.Future[list[Appended]]

    @property
    def events(self) -> int:
        return len(self.sent)

    @property
    def abandoned(self) -> bool:
        return self.answer.done()

    def refuse(self, error: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


class Lines:
    """Owns the appends from their call to their answer. Changed on the loop alone."""

    def __init__(self, store: Store, *, max_events: int, max_bytes: int) -> None:
        """`store` answers one result an event; after an error nothing of them is taken for
        stored."""
        self._store = store
        self._queue = WriteQueue(self._put, max_events=max_events, max_bytes=max_bytes)
        self._tasks: set[asyncio.Task[None]] = set()
        self._lines: dict[int, deque[Job]] = {}
        """Each succession by its identity; 0: what belongs to none."""

    def add(self, job: Job, *, wait: bool) -> None:
        """Raises ResourceExhausted WRITE_QUEUE_FULL (never with `wait`)."""
        self._queue.add(job, wait=wait)

    def refuse_waiting(self, error: AitherError) -> None:
        """Sends away what waits for room."""
        self._queue.refuse_waiting(error)

    async def finish(self, limit_s: float) -> None:
        """Waits for all appends, then cancels what is left."""
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=limit_s)
        left = set(self._tasks)
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=1.0)

    def _put(self, job: Job) -> None:
        # What expects something may have to be tried again and again, and holds up nobody.
        key = id(job) if job.expected != ANYTHING else 0
        key = key if job.succession is None else id(job.succession)
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = deque()
            # What is on its way cannot be called back, though its caller can: a task of its own.
            task = asyncio.get_running_loop().create_task(self._run(key, line), name="flux:append")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        line.append(job)

    async def _run(self, key: int, line: deque[Job]) -> None:
        """One line, until it is empty."""
        try:
            while line:
                await self._carry(_together(line))
        finally:
            del self._lines[key]
            for job in line:  # of a log that closes
                job.refuse(log_closed())
                self._queue.done(job)

    async def _carry(self, jobs: Sequence[Job]) -> None:
        try:
            error = await self._answer(jobs)
            if len(jobs) == 1 or isinstance(error, Unavailable):
                for job in jobs:
                    _fail(job, error)
            elif error is not None:
                # One of them is at fault: the others shall not suffer for it.
                for job in jobs:
                    _fail(job, await self._answer([job]))
        except Exception as defect:
            for job in jobs:
                job.refuse(defect)
        finally:
            for job in jobs:
                job.refuse(log_closed())  # of one that was cancelled
                self._queue.done(job)

    async def _answer(self, jobs: Sequence[Job]) -> AitherError | None:
        """What they failed with; None: they are answered."""
        succession = jobs[0].succession
        if succession is not None and succession.error is not None:
            return succession.error
        sent = [one for job in jobs for one in job.sent]
        try:
            results = await self._store(sent, jobs[0].expected)
        except AitherError as error:
            return error
        start = 0
        for job in jobs:
            if not job.abandoned:
                job.answer.set_result(results[start : start + job.events])
            start += job.events
        return None


def _together(line: deque[Job]) -> list[Job]:
    """Takes the head of a line, and what may go with it."""
    jobs = [line.popleft()]
    events, size = jobs[0].events, jobs[0].bytes
    while line and jobs[0].expected == line[0].expected == ANYTHING:
        events, size = events + line[0].events, size + line[0].bytes
        if events > TOGETHER_EVENTS or size > TOGETHER_BYTES:
            break
        jobs.append(line.popleft())
    return jobs


def _fail(job: Job, error: AitherError | None) -> None:
    """Whoever waits behind it in its succession fails as well."""
    if error is None:
        return
    if job.succession is not None:
        job.succession.error = job.succession.error or error
    job.refuse(error)
