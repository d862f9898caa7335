"""Something outside that may be slow, full or dead: every call of it has a deadline, a place in a
bulkhead and a breaker's leave."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import structlog

from aither_sdk.breaker import Breaker, BreakerRules, BreakerState, Permit
from aither_sdk.bulkhead import Bulkhead
from aither_sdk.clock import Clock, SystemClock
from aither_sdk.errors import (
    AitherError,
    AlreadyExists,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutOfRange,
    PermissionDenied,
    Unavailable,
    Unimplemented,
)

T = TypeVar("T")
_log = structlog.get_logger()

_CALLERS_FAULT = (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutOfRange,
    PermissionDenied,
    Unimplemented,
)
"""Answers of a dependency that is well."""


def is_failure(error: Exception) -> bool:
    """Whether an error speaks against the dependency rather than against what was asked of it."""
    return not isinstance(error, _CALLERS_FAULT)


@dataclass(frozen=True, slots=True)
class DependencyStatistics:
    """Counts since the start. Every call is counted once."""

    state: BreakerState
    running: int
    queued: int
    succeeded: int
    failed: int
    """Timed out included."""
    timed_out: int
    cancelled: int
    refused_open: int
    """Not made, because the breaker was open."""
    refused_full: int
    """Not made, because the bulkhead was full."""


class Dependency:
    """One per thing that is asked, shared by all who ask it. Owned by one loop.

        sense = Dependency("sense", deadline_s=2.0, limit=3)
        answer = await sense.call(lambda: stub.Observe(request))

    Takes a function that begins the call, not a coroutine, so that refused work leaves nothing
    un-awaited. Cancelling a call speaks neither for nor against the dependency.
    """

    def __init__(
        self,
        name: str,
        *,
        deadline_s: float,
        limit: int,
        waiting: int = 0,
        rules: BreakerRules | None = None,
        failure: Callable[[Exception], bool] = is_failure,
        clock: Clock | None = None,
    ) -> None:
        self.name = name
        self.deadline_s = deadline_s
        """Seconds for the answer, and as many again for a place in the bulkhead."""
        self._bulkhead = Bulkhead(name, limit=limit, waiting=waiting, wait_s=deadline_s)
        self._breaker = Breaker(rules)
        self._is_failure = failure
        self._clock = clock or SystemClock()
        self._succeeded = self._failed = self._timed_out = self._cancelled = self._refused_open = 0

    async def call(self, work: Callable[[], Awaitable[T]], *, deadline_s: float | None = None) -> T:
        """What `work()` answers, or what it raises.

        Raises Unavailable BREAKER_OPEN (with the time to wait), ResourceExhausted BULKHEAD_FULL, or
        DeadlineExceeded; of these only the last one was begun. `deadline_s` shortens this call's.
        """
        self._check_breaker()  # before the queue: nobody waits for a call that will not be made
        try:
            async with self._bulkhead:
                permit = self._breaker.admit(self._clock.monotonic())
                if permit is None:
                    raise self._open()
                return await self._made(
                    work, permit, min(deadline_s or self.deadline_s, self.deadline_s)
                )
        except asyncio.CancelledError:
            self._cancelled += 1
            raise

    def statistics(self) -> DependencyStatistics:
        return DependencyStatistics(
            state=self._breaker.state(self._clock.monotonic()),
            running=self._bulkhead.taken,
            queued=self._bulkhead.queued,
            succeeded=self._succeeded,
            failed=self._failed,
            timed_out=self._timed_out,
            cancelled=self._cancelled,
            refused_open=self._refused_open,
            refused_full=self._bulkhead.refused,
        )

    async def _made(self, work: Callable[[], Awaitable[T]], permit: Permit, deadline_s: float) -> T:
        deadline = asyncio.timeout(deadline_s)
        try:
            async with deadline:
                answer = await work()
        except Exception as error:
            if isinstance(error, TimeoutError) and deadline.expired():
                self._timed_out += 1
                self._told(permit, error)
                raise DeadlineExceeded(
                    f"{self.name} did not answer within {deadline_s:g} s; what was asked may or "
                    "may not have happened",
                    metadata={"dependency": self.name},
                ) from None
            self._told(permit, error)
            raise
        except BaseException:
            self._breaker.released(permit)
            raise
        self._succeeded += 1
        was_open = permit.is_probe
        self._breaker.succeeded(permit)
        if was_open:
            _log.info("dependency.closed", dependency=self.name)
        return answer

    def _told(self, permit: Permit, error: Exception) -> None:
        """Takes in an error of a call that was made."""
        if not self._is_failure(error):
            self._succeeded += 1
            self._breaker.succeeded(permit)
            return
        self._failed += 1
        before = self._breaker.opened
        now_s = self._clock.monotonic()
        self._breaker.failed(permit, now_s)
        if self._breaker.opened != before:
            _log.warning(
                "dependency.opened",
                dependency=self.name,
                wait_s=self._breaker.wait_s(now_s),
                error=str(error) or type(error).__name__,
            )

    def _check_breaker(self) -> None:
        if self._breaker.wait_s(self._clock.monotonic()) is not None:
            raise self._open()

    def _open(self) -> AitherError:
        self._refused_open += 1
        wait_s = self._breaker.wait_s(self._clock.monotonic()) or 0.0
        return Unavailable(
            f"{self.name} has failed {self._breaker.rules.failures} times in a row and is left "
            f"alone for another {wait_s:.1f} s",
            reason="BREAKER_OPEN",
            metadata={"dependency": self.name},
            retry_after_s=max(wait_s, 0.001),
        )
