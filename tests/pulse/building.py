"""What the tests of Pulse build with."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from aither.flux.v1.event_pb2 import Event
from aither.flux.v1.flux_service_pb2 import PublishResult
from aither.pulse.v1.target_pb2 import Check, CheckResult, HeartbeatCheck, Target
from aither_sdk.publishing.publisher import PublisherStatistics
from pulse_svc.board import Board
from pulse_svc.checks.base import REFUSED, bad, good
from pulse_svc.fleet import filled
from pulse_svc.news import News
from pulse_svc.spans import duration_of_s
from pulse_svc.watchers import Watchers
from tests.clock import FakeClock

GOOD: CheckResult = good("fine")
BAD: CheckResult = bad(REFUSED, "nobody there")


def target(
    name: str,
    *,
    rise: int = 2,
    fall: int = 2,
    interval_s: float = 1.0,
    timeout_s: float | None = None,
    depends_on: Sequence[str] = (),
    check: Check | None = None,
) -> Target:
    made = Target(
        name=name,
        check=check or Check(heartbeat=HeartbeatCheck()),
        interval=duration_of_s(interval_s),
        rise=rise,
        fall=fall,
        depends_on=depends_on,
    )
    if timeout_s is not None:
        made.timeout.CopyFrom(duration_of_s(timeout_s))
    return filled(made)


class BoardKit:
    """A board on a fake clock, with what it tells."""

    def __init__(self, *targets: Target) -> None:
        self.clock = FakeClock()
        self.news = News()
        self.watchers = Watchers()
        self.board = Board(self.clock, self.news, self.watchers)
        for each in targets:
            self.board.put(each, from_fleet=True)

    def record(self, name: str, *results: CheckResult) -> None:
        for result in results:
            self.clock.advance(1.0)
            self.board.record(name, result)


class RecordingOutlet:
    """In the place of a Publisher: takes everything, answers when told."""

    def __init__(self) -> None:
        self.source = "pulse"
        self.events: list[Event] = []
        self.connected = False
        self.buffered = 0
        self.futures: list[asyncio.Future[PublishResult]] = []

    def enqueue(self, event: Event) -> asyncio.Future[PublishResult]:
        self.events.append(event)
        future: asyncio.Future[PublishResult] = asyncio.get_running_loop().create_future()
        self.futures.append(future)
        return future

    def statistics(self) -> PublisherStatistics:
        return PublisherStatistics(0, 0, 0, 0, 0, self.buffered, 0, 0, self.connected)

    def subjects(self) -> list[str]:
        return [event.subject for event in self.events]
