"""A small honest Flux that misbehaves on command, over real gRPC."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Self

import grpc

from aither.flux.v1 import flux_service_pb2_grpc
from aither.flux.v1.event_pb2 import Event
from aither.flux.v1.flux_service_pb2 import (
    CaughtUp,
    Progress,
    PublishRequest,
    PublishResponse,
    PublishResult,
    PublishStreamRequest,
    PublishStreamResponse,
    SnapshotEnd,
    Started,
    SubscribeRequest,
    SubscribeResponse,
)
from aither_sdk.errors import AitherError, FailedPrecondition, Unavailable
from aither_sdk.rpc_status import to_status
from aither_sdk.subjects import FilterSet
from tests.ports import free_ports

Scene = Callable[[SubscribeRequest], AsyncIterator[SubscribeResponse]]


@dataclass(frozen=True)
class Obey:
    """Store the batch and answer it."""


@dataclass(frozen=True)
class Break:
    """End the stream with an error at this batch, before or after storing it."""

    stored: bool = False
    error: AitherError = field(default_factory=lambda: Unavailable("the stub was told to break"))
    code: grpc.StatusCode | None = None
    """A bare code without details instead of `error`."""


@dataclass(frozen=True)
class Hang:
    """Say nothing more on this stream."""

    stored: bool = False


@dataclass(frozen=True)
class Misanswer:
    """Answer with this many results too many."""

    extra: int = 1


@dataclass(frozen=True)
class HalfClose:
    """End the stream with OK though there is more to answer."""


class FluxStub(flux_service_pb2_grpc.FluxServiceServicer):
    """`publish_script` has an act for each batch to come, `scenes` one for each subscription.

    Where they are empty it behaves: one log in memory with the idempotency of the real one.
    """

    def __init__(self) -> None:
        (self.port,) = free_ports(1)
        self.epoch = "epoch-1"
        self.log: list[Event] = []
        self.batches: list[list[str]] = []
        """Ids of each batch received, stored or not, in order over all streams."""
        self.subscribe_requests: list[SubscribeRequest] = []
        self.publish_script: deque[Any] = deque()
        self.refusals: dict[str, AitherError] = {}
        """By event id: refused alone, in its result."""
        self.garbled: set[str] = set()
        """Ids refused with details that are no protobuf."""
        self.scenes: deque[Scene] = deque()
        self.publish_streams = 0
        self.keep_log = True
        self.gate = asyncio.Event()
        """While it is not set, batches are stored and not answered."""
        self.gate.set()
        self.received = asyncio.Event()
        """Set whenever a batch comes; tests clear it."""
        self.closed_by_client = 0
        """Publish streams that the client half-closed."""
        self._sequences: dict[tuple[str, str], int] = {}
        self._grown = asyncio.Condition()
        self._server: grpc.aio.Server | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def ids(self) -> list[str]:
        return [event.id for event in self.log]

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listens, on the port of before if there was one."""
        self._server = grpc.aio.server(options=[("grpc.max_receive_message_length", 8 * 2**20)])
        self.register(self._server)
        self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    def register(self, server: grpc.aio.Server) -> None:
        flux_service_pb2_grpc.add_FluxServiceServicer_to_server(self, server)

    async def stop(self) -> None:
        """Breaks every stream at once, as a killed process does."""
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    async def append(self, *events: Event) -> None:
        """Puts events into the log, as if somebody published them."""
        for event in events:
            self._store(event)
        await self._tell()

    def wipe(self, epoch: str) -> None:
        """Another log in the place of the old one."""
        self.log.clear()
        self._sequences.clear()
        self.epoch = epoch

    # -- publishing

    async def Publish(
        self,
        request: PublishRequest,
        context: Any,
    ) -> PublishResponse:
        results = self._store_all(PublishStreamRequest(events=request.events)).results
        await self._tell()
        return PublishResponse(results=results, epoch=self.epoch)

    async def PublishStream(
        self,
        request_iterator: AsyncIterator[PublishStreamRequest],
        context: Any,
    ) -> AsyncIterator[PublishStreamResponse]:
        self.publish_streams += 1
        async for request in request_iterator:
            self.batches.append([event.id for event in request.events])
            self.received.set()
            act = self.publish_script.popleft() if self.publish_script else Obey()
            if isinstance(act, HalfClose):
                return
            response = PublishStreamResponse()
            if isinstance(act, Obey | Misanswer) or act.stored:
                response = self._store_all(request)
                await self._tell()
            if isinstance(act, Break):
                await self._abort(context, act)
            if isinstance(act, Hang):
                await asyncio.Event().wait()
            await self.gate.wait()
            if isinstance(act, Misanswer):
                response.results.extend([PublishResult()] * act.extra)
            yield response
        self.closed_by_client += 1

    async def _abort(self, context: Any, act: Break) -> None:
        if act.code is not None:
            await context.abort(act.code, "the stub was told to break")
        status = to_status(act.error)
        metadata = (("grpc-status-details-bin", status.SerializeToString()),)
        await context.abort(act.error.code, act.error.message, metadata)

    def _store_all(self, request: PublishStreamRequest) -> PublishStreamResponse:
        response = PublishStreamResponse(epoch=self.epoch)
        for event in request.events:
            refusal = self.refusals.get(event.id)
            if refusal is not None:
                response.results.add(error=to_status(refusal))
                continue
            if event.id in self.garbled:
                error = response.results.add().error
                error.code, error.message = 13, "garbled"
                error.details.add(
                    type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff\xff"
                )
                continue
            known = self._sequences.get((event.source, event.id))
            sequence = known or self._store(event)
            response.results.add(sequence=sequence, duplicate=known is not None)
        return response

    def _store(self, event: Event) -> int:
        sequence = (self.log[-1].sequence if self.log else 0) + 1
        self._sequences[event.source, event.id] = sequence
        if self.keep_log:
            event.sequence = sequence
            self.log.append(event)
        return sequence

    async def _tell(self) -> None:
        async with self._grown:
            self._grown.notify_all()

    # -- the rest

    async def _unimplemented(self, request: Any, context: Any) -> Any:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "the stub has no such thing")

    Read = GetLast = GetStreamInfo = _unimplemented

    async def Consume(self, request_iterator: Any, context: Any) -> AsyncIterator[Any]:
        yield await self._unimplemented(request_iterator, context)

    # -- subscribing

    async def Subscribe(
        self,
        request: SubscribeRequest,
        context: Any,
    ) -> AsyncIterator[SubscribeResponse]:
        self.subscribe_requests.append(request)
        scene = self.scenes.popleft() if self.scenes else self.follow
        try:
            async for response in scene(request):
                yield response
        except AitherError as error:
            await self._abort(context, Break(error=error))

    async def follow(self, request: SubscribeRequest) -> AsyncIterator[SubscribeResponse]:
        """What an honest Flux does."""
        if request.resume_epoch and request.resume_epoch != self.epoch:
            raise FailedPrecondition("another log", reason="EPOCH_MISMATCH")
        last = self.log[-1].sequence if self.log else 0
        position = last
        if request.WhichOneof("start") in ("earliest", "last_per_subject", "after_sequence"):
            position = request.after_sequence
        yield self.started(position)
        filters = FilterSet(request.filters)
        if request.HasField("last_per_subject"):
            newest = {event.subject: event for event in self.log if filters.matches(event.subject)}
            events = sorted(newest.values(), key=lambda event: event.sequence)
            yield SubscribeResponse(events=events, snapshot_end=SnapshotEnd(sequence=last))
            position = last
        heartbeat_s = request.heartbeat_interval.ToTimedelta().total_seconds() or 15.0
        caught_up = False
        while True:
            # Sequences of the stub have no gaps: the sequence after n stands at index n.
            piece = self.log[position : position + 256]
            position += len(piece)
            if found := [event for event in piece if filters.matches(event.subject)]:
                yield SubscribeResponse(events=found)
            if position < len(self.log):
                continue
            if not caught_up:
                caught_up = True
                yield SubscribeResponse(caught_up=CaughtUp(sequence=position))
                continue
            try:
                async with asyncio.timeout(heartbeat_s), self._grown:
                    await self._grown.wait_for(lambda: len(self.log) > position)  # noqa: B023
            except TimeoutError:
                yield SubscribeResponse(progress=Progress(sequence=position))

    def started(self, position: int = 0) -> SubscribeResponse:
        """The first message of a stream."""
        first = self.log[0].sequence if self.log else 0
        last = self.log[-1].sequence if self.log else 0
        return SubscribeResponse(
            started=Started(
                epoch=self.epoch, first_sequence=first, last_sequence=last, position=position
            )
        )


def scene(*acts: SubscribeResponse | AitherError | asyncio.Event) -> Scene:
    """A subscription that says exactly this; an Event waits for it, an error ends the stream, and
    otherwise nothing more is said after the last act."""

    async def play(_: SubscribeRequest) -> AsyncIterator[SubscribeResponse]:
        for act in acts:
            if isinstance(act, AitherError):
                raise act
            if isinstance(act, asyncio.Event):
                await act.wait()
            else:
                yield act
        await asyncio.Event().wait()

    return play


_numbers = itertools.count(1)


def made(subject: str = "test.subject", *, source: str = "test", id: str = "") -> Event:
    """An event with an id of its own."""
    return Event(id=id or f"e{next(_numbers)}", source=source, subject=subject)


def stored(*sequences: int, subject: str = "test.subject") -> list[Event]:
    """Events as a subscriber gets them."""
    return [Event(id=f"e{n}", source="test", subject=subject, sequence=n) for n in sequences]
