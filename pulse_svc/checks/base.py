"""The port of all checks, and how they word what they found."""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass
from typing import Protocol

import aiohttp

from aither.pulse.v1.target_pb2 import CheckFailure, CheckResult
from aither_sdk.clock import Clock
from pulse_svc.fleet import MAX_MESSAGE_BYTES
from pulse_svc.lag import LagMeter
from pulse_svc.threads import Threads

TIMEOUT = CheckFailure.CHECK_FAILURE_TIMEOUT
REFUSED = CheckFailure.CHECK_FAILURE_REFUSED
BAD_ANSWER = CheckFailure.CHECK_FAILURE_BAD_ANSWER
NOT_FOUND = CheckFailure.CHECK_FAILURE_NOT_FOUND
SILENT = CheckFailure.CHECK_FAILURE_SILENT
INTERNAL = CheckFailure.CHECK_FAILURE_INTERNAL


class Check(Protocol):
    """One way to look at one target, kept for as long as the target is watched.

    `probe` runs once at a time. It promises nothing about time: whoever calls it cancels it when
    the target's timeout is over, and it must end promptly then.
    """

    async def probe(self, timeout_s: float) -> CheckResult | None:
        """What there is to find, without latency and time, which the caller knows better.

        None: nothing can be said yet. Never raises but CancelledError; a check that cannot be
        carried out is a bad result with INTERNAL. `timeout_s` is for those that tell their peer.
        """
        ...

    async def aclose(self) -> None:
        """Lets go of connections. No probe runs or follows."""
        ...


@dataclass(frozen=True, slots=True)
class CheckTools:
    """What checks share."""

    clock: Clock
    lag: LagMeter
    session: aiohttp.ClientSession
    """For HTTP; keeps no connection."""
    names: Threads
    """For resolving names."""
    processes: Threads
    """For reading /proc."""


def good(message: str = "") -> CheckResult:
    return CheckResult(ok=True, message=clipped(message))


def bad(failure: CheckFailure.ValueType, message: str) -> CheckResult:
    return CheckResult(ok=False, failure=failure, message=clipped(message))


def clipped(message: str) -> str:
    """At most 512 bytes of valid UTF-8, on one line."""
    line = " ".join(message.encode(errors="replace").decode().split())
    return line.encode()[:MAX_MESSAGE_BYTES].decode(errors="ignore")


def told(error: BaseException) -> str:
    """An exception in words; asyncio's and aiohttp's own hide what the system said."""
    number = error.errno if isinstance(error, OSError) else None
    if number is not None and number > 0 and not isinstance(error, ssl.SSLError):
        return os.strerror(number)
    return str(error) or type(error).__name__
