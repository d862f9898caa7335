"""PulseService over gRPC: requests to the roster, answers from the board."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc

from aither.pulse.v1 import pulse_service_pb2 as pb
from aither.pulse.v1.pulse_service_pb2_grpc import (
    PulseServiceServicer,
    add_PulseServiceServicer_to_server,
)
from aither.pulse.v1.target_pb2 import TargetState
from aither_sdk.errors import FieldViolation, InvalidArgument
from pulse_svc.board import Board
from pulse_svc.emitter import Emitter
from pulse_svc.fleet import MAX_TARGETS
from pulse_svc.roster import Roster
from pulse_svc.vitals import VitalsReader
from pulse_svc.watchers import Watchers

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["PulseService"].full_name
Context = grpc.aio.ServicerContext[Any, Any]


class PulseServicer(PulseServiceServicer):
    """See the proto for the promises; errors are raised typed and become rich statuses."""

    def __init__(
        self,
        board: Board,
        roster: Roster,
        watchers: Watchers,
        vitals: VitalsReader,
        emitter: Emitter,
    ) -> None:
        self._board = board
        self._roster = roster
        self._watchers = watchers
        self._vitals = vitals
        self._emitter = emitter

    def register(self, server: grpc.aio.Server) -> None:
        """Adds this servicer to a server."""
        add_PulseServiceServicer_to_server(self, server)

    async def RegisterTarget(
        self, request: pb.RegisterTargetRequest, context: Context
    ) -> pb.RegisterTargetResponse:
        return pb.RegisterTargetResponse(status=self._roster.register(request.target))

    async def DeregisterTarget(
        self, request: pb.DeregisterTargetRequest, context: Context
    ) -> pb.DeregisterTargetResponse:
        self._roster.deregister(request.name)
        return pb.DeregisterTargetResponse()

    async def ListTargets(
        self, request: pb.ListTargetsRequest, context: Context
    ) -> pb.ListTargetsResponse:
        known = TargetState.values()
        _check_count("names", len(request.names), MAX_TARGETS)
        _check_count("states", len(request.states), len(known))
        violations = [
            FieldViolation(f"states[{i}]", f"{state} is no state of a target")
            for i, state in enumerate(request.states)
            if not state or state not in known
        ]
        if violations:
            raise InvalidArgument.of(violations)
        statuses = self._board.statuses(frozenset(request.names), frozenset(request.states))
        return pb.ListTargetsResponse(targets=statuses)

    async def WatchTargets(
        self, request: pb.WatchTargetsRequest, context: Context
    ) -> AsyncIterator[pb.WatchTargetsResponse]:
        _check_count("names", len(request.names), MAX_TARGETS)
        watcher = self._watchers.join(request.names)
        try:
            targets = 0
            for name in filter(watcher.wants, self._board.names()):
                status = self._board.status(name)
                if status is not None:
                    watcher.told(name)
                    targets += 1
                    yield pb.WatchTargetsResponse(status=status)
            end = pb.TargetSnapshotEnd(targets=targets)
            yield pb.WatchTargetsResponse(snapshot_end=end)
            while True:
                name, left_out = await watcher.next()
                news = pb.WatchTargetsResponse(coalesced_updates=left_out)
                status = self._board.status(name)
                if status is None:
                    news.removed = name
                else:
                    news.status.CopyFrom(status)
                yield news
        finally:
            self._watchers.leave(watcher)

    async def Beat(self, request: pb.BeatRequest, context: Context) -> pb.BeatResponse:
        ok = request.ok if request.HasField("ok") else True
        self._roster.beat(request.name, ok, request.message)
        return pb.BeatResponse()

    async def Emit(self, request: pb.EmitRequest, context: Context) -> pb.EmitResponse:
        return await self._emitter.emit(request, context.time_remaining())

    async def GetVitals(
        self, request: pb.GetVitalsRequest, context: Context
    ) -> pb.GetVitalsResponse:
        return pb.GetVitalsResponse(host=self._vitals.newest)


def _check_count(field: str, count: int, most: int) -> None:
    if count > most:
        raise InvalidArgument.of([FieldViolation(field, f"{count} {field}; {most} at most")])
