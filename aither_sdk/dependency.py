"""Something outside that may be slow, full or dead: every call of it has a deadline, a place in a
bulkhead and a breaker's leave."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import grpc
from opentelemetry import metrics

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
    ResourceExhausted,
    Unavailable,
    Unimplemented,
)
from aither_sdk.losses import BREAKER_OPEN, FULL, TIMEOUT, Losses
from aither_sdk.rpc_status import from_rpc_error
from aither_sdk.words import Words

T = TypeVar("T")
_log = Words("aither_sdk")

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
    told = from_rpc_error(error) if isinstance(error, grpc.RpcError) else error
    return not isinstance(told, _CALLERS_FAULT)


_STATES = {BreakerState.CLOSED: 0, BreakerState.HALF_OPEN: 1, BreakerState.OPEN: 2}
"""As the metric spells them."""


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
        fair_s: float | None = None,
        failure: Callable[[Exception], bool] = is_failure,
        clock: Clock | None = None,
        losses: Losses | None = None,
    ) -> None:
        """`fair_s`: a call that was given less time than this and ran out of it says nothing
        against the dependency, only of its caller's haste; unset: `deadline_s`. `losses` is told of
        what is refused or given up; `Life.dependency` gives its own."""
        self.name = name
        self.deadline_s = deadline_s
        """Seconds for the answer, and as many again for a place in the bulkhead."""
        self._bulkhead = Bulkhead(name, limit=limit, waiting=waiting, wait_s=deadline_s)
        self._breaker = Breaker(rules)
        self._fair_s = deadline_s if fair_s is None else fair_s
        self._is_failure = failure
        self._clock = clock or SystemClock()
        self._losses = losses
        meter = metrics.get_meter("aither_sdk")
        self._calls = meter.create_counter(
            "aither.dependency.calls", unit="{call}", description="Calls of a dependency by outcome"
        )
        self._state = meter.create_gauge(
            "aither.dependency.state",
            description="Breaker of a dependency: 0 closed, 1 half open (one probe), 2 open",
        )
        self._state.set(0, {"dependency": name})
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
                limit_s = self.deadline_s if deadline_s is None else deadline_s
                return await self._made(work, permit, min(limit_s, self.deadline_s))
        except asyncio.CancelledError:
            self._cancelled += 1
            self._count("cancelled")
            raise
        except ResourceExhausted as error:
            if error.reason == "BULKHEAD_FULL" and error.metadata.get("dependency") == self.name:
                self._lost("refused_full", FULL)
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
        if permit.is_probe:
            self._tell_state()
        try:
            async with deadline:
                answer = await work()
        except Exception as error:
            if isinstance(error, TimeoutError) and deadline.expired():
                self._timed_out += 1
                self._lost("timed_out", TIMEOUT)
                self._told(permit, error, hasty=deadline_s < self._fair_s)
                raise DeadlineExceeded(
                    f"{self.name} did not answer within {deadline_s:g} s; what was asked may or "
                    "may not have happened",
                    metadata={"dependency": self.name},
                ) from None
            if self._is_failure(error):
                self._count("failed")
            self._told(permit, error, hasty=_is_late(error) and deadline_s < self._fair_s)
            raise
        except BaseException:
            self._breaker.released(permit)
            self._tell_state()
            raise
        self._well(permit)
        return answer

    def _well(self, permit: Permit) -> None:
        self._succeeded += 1
        self._count("succeeded")
        self._breaker.succeeded(permit)
        if permit.is_probe:
            self._tell_state()
            _log.info("dependency.closed", dependency=self.name)

    def _told(self, permit: Permit, error: Exception, *, hasty: bool = False) -> None:
        """Takes in an error of a call that was made. `hasty`: its caller gave it too little time
        for the error to mean anything."""
        if not self._is_failure(error):
            self._well(permit)
            return
        self._failed += 1
        if hasty:
            self._breaker.released(permit)
            self._tell_state()
            return
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
            self._tell_state()

    def _check_breaker(self) -> None:
        if self._breaker.wait_s(self._clock.monotonic()) is not None:
            raise self._open()

    def _open(self) -> AitherError:
        self._refused_open += 1
        self._lost("refused_open", BREAKER_OPEN)
        wait_s = self._breaker.wait_s(self._clock.monotonic()) or 0.0
        return Unavailable(
            f"{self.name} has failed {self._breaker.rules.failures} times in a row and is left "
            f"alone for another {wait_s:.1f} s",
            reason="BREAKER_OPEN",
            metadata={"dependency": self.name},
            retry_after_s=max(wait_s, 0.001),
        )

    def _lost(self, outcome: str, reason: str) -> None:
        self._count(outcome)
        if self._losses is not None:
            self._losses.note(self.name, "call", reason)

    def _count(self, outcome: str) -> None:
        self._calls.add(1, {"dependency": self.name, "outcome": outcome})

    def _tell_state(self) -> None:
        state = self._breaker.state(self._clock.monotonic())
        self._state.set(_STATES[state], {"dependency": self.name})


def _is_late(error: Exception) -> bool:
    """Whether it says that the time was up, in whichever layer."""
    told = from_rpc_error(error) if isinstance(error, grpc.RpcError) else error
    return isinstance(told, TimeoutError | DeadlineExceeded)
