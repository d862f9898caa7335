"""The gRPC health protocol (Check, Watch and List) over a board that anybody may turn.

https://github.com/grpc/grpc/blob/master/doc/health-checking.md; the Python library's own servicers
start SERVING, have no List and let a watcher that does not read delay `set`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any, TypeAlias

from grpc_health.v1 import health_pb2, health_pb2_grpc

from aither_sdk.errors import NotFound

ServingStatus: TypeAlias = health_pb2.HealthCheckResponse.ServingStatus.ValueType
Context: TypeAlias = Any
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN

OVERALL, LIVENESS, READINESS, STARTUP = "", "liveness", "readiness", "startup"
_LIST_LIMIT = 100


class HealthBoard:
    """Status by service name. Starts NOT_SERVING throughout; owned by one event loop.

    `""` and every full service name say the same as readiness; `readiness/<fact>` says of one
    named condition of it whether it holds.
    """

    def __init__(
        self, services: Iterable[str] = (), refresh: Callable[[HealthBoard], None] | None = None
    ) -> None:
        """`refresh` is called before each answer and may `set` what it knows better by then."""
        self._refresh = refresh
        self._ready_names = (OVERALL, READINESS, *services)
        self._statuses: dict[str, ServingStatus] = dict.fromkeys(
            (*self._ready_names, LIVENESS, STARTUP), NOT_SERVING
        )
        self._facts: dict[str, bool] = {}
        self._watchers: set[asyncio.Event] = set()

    def status(self, service: str) -> ServingStatus | None:
        """None for a name that nobody has heard of."""
        self.refresh()
        return self._statuses.get(service)

    def statuses(self) -> dict[str, ServingStatus]:
        self.refresh()
        return dict(self._statuses)

    def refresh(self) -> None:
        if self._refresh is not None:
            self._refresh(self)

    @property
    def watched(self) -> bool:
        """Whether anybody waits to be told of a change."""
        return bool(self._watchers)

    def set(
        self,
        *,
        live: bool,
        started: bool,
        ready: bool,
        facts: Mapping[str, bool] | None = None,
    ) -> None:
        """Turns the board and wakes every watcher. Never waits for one. `facts`: the named
        conditions of readiness; None leaves them as they are."""
        if facts is not None:
            self._facts = dict(facts)
        turned = dict.fromkeys(self._ready_names, SERVING if ready else NOT_SERVING)
        turned[LIVENESS] = SERVING if live else NOT_SERVING
        turned[STARTUP] = SERVING if started else NOT_SERVING
        for fact, holds in self._facts.items():
            turned[f"{READINESS}/{fact}"] = SERVING if holds else NOT_SERVING
        if turned != self._statuses:
            self._statuses = turned
            self.wake()

    def wake(self) -> None:
        """Has each watcher look whether there is news, or an end."""
        for watcher in self._watchers:
            watcher.set()

    async def watch(
        self, service: str, over: Callable[[], bool] = lambda: False
    ) -> AsyncIterator[ServingStatus]:
        """The status now, then each other status; one that lasted too briefly may be left out. Ends
        when it is woken and `over`."""
        self.refresh()  # who is the first to watch must not be told what was known to the last
        changed = asyncio.Event()
        self._watchers.add(changed)
        try:
            told: ServingStatus | None = None
            while not over():
                changed.clear()
                current = self._statuses.get(service, SERVICE_UNKNOWN)
                if current != told:
                    told = current
                    yield current
                else:
                    await changed.wait()
        finally:
            self._watchers.discard(changed)


class HealthServicer(health_pb2_grpc.HealthServicer):
    """Answers `grpc.health.v1.Health` from a board."""

    def __init__(self, board: HealthBoard) -> None:
        self._board = board
        self._over = False

    def end_watches(self) -> None:
        """Before the server stops, which would wait for them and then cancel them, and gRPC prints
        a traceback for each."""
        self._over = True
        self._board.wake()

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> health_pb2.HealthCheckResponse:
        """NOT_FOUND for a name that nobody has heard of."""
        status = self._board.status(request.service)
        if status is None:
            known = ", ".join(f'"{name}"' for name in sorted(self._board.statuses()))
            raise NotFound(f'no service "{request.service}" here; ask for one of {known}')
        return health_pb2.HealthCheckResponse(status=status)

    async def List(
        self, request: health_pb2.HealthListRequest, context: Context
    ) -> health_pb2.HealthListResponse:
        """Every name with its status."""
        response = health_pb2.HealthListResponse()
        for name, status in sorted(self._board.statuses().items())[:_LIST_LIMIT]:
            response.statuses[name].status = status
        return response

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """SERVICE_UNKNOWN, and the stream stays open, for a name that nobody has heard of. It ends
        when the server stops; who still wants to know asks again."""
        async for status in self._board.watch(request.service, lambda: self._over):
            yield health_pb2.HealthCheckResponse(status=status)
