"""The reading side of a subscriber: keeps one stream open, one message ahead of the consumer."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Protocol

import grpc

from aither.flux.v1.flux_service_pb2 import (
    CLOSING_REASON_STOP_REACHED,
    CLOSING_REASON_TOO_SLOW,
    SubscribeRequest,
)
from aither_sdk.backoff import MOST_S, FullJitter
from aither_sdk.dialling import Dialler
from aither_sdk.errors import AitherError, DataLoss, Internal, TooSlow, Unavailable
from aither_sdk.silence import Silence
from aither_sdk.stream_faults import Code, StreamEnd, end_of, is_own_cancellation
from aither_sdk.subscribing.arriving import Arriving
from aither_sdk.subscribing.cursor import EPOCH_MISMATCH, Cursor, Step
from aither_sdk.subscribing.subscription import OnNewEpoch, Subscription
from aither_sdk.words import Words

_log = Words("aither_sdk")

_METHOD = "/aither.flux.v1.FluxService/Subscribe"
_PATIENCE = 10
"""Streams in a row that other nodes may refuse because they do not hold the position yet."""
_AHEAD_STEPS = 8
"""Messages without events that may lie before the consumer; with events it is one."""

Call = grpc.aio.UnaryStreamCall[SubscribeRequest, Arriving]
Method = grpc.aio.UnaryStreamMultiCallable[SubscribeRequest, Arriving]


class Listener(Protocol):
    """Who is told at once whether there is a stream."""

    def connection(self, connected: bool, reason: str) -> None: ...


class SubscriberStream:
    """Runs streams one after another and puts what they say into `take`'s hands, in order."""

    def __init__(
        self,
        dialler: Dialler,
        subscription: Subscription,
        cursor: Cursor,
        listener: Listener,
        *,
        silence_s: float,
        on_new_epoch: OnNewEpoch,
    ) -> None:
        self.opened = 0
        """Streams that were `started`."""
        self.silence = Silence(silence_s)
        self._subscription = subscription
        self._cursor = cursor
        self._listener = listener
        self._on_new_epoch = on_new_epoch
        self._dialler = dialler
        self._steps: deque[Step] = deque()
        self._ready = asyncio.Event()  # set while there is a step, or the end
        self._room = asyncio.Event()  # set while one more message may be read
        self._room.set()
        self._started = asyncio.Event()  # set for good by the first `started`, or the end
        self._over = False
        self._error: AitherError | None = None
        self._backoff = FullJitter()
        self._breaks = 0
        self._unheard = False
        """Whether the last stream ended without a word."""

    def open(self) -> None:
        """Makes the channel. Raises SelfDialError."""
        self._dialler.open()

    async def aclose(self) -> None:
        """Ends the waiting of consumers and closes the channel; `run` has ended by then."""
        self._end(None)
        self._steps.clear()
        await self._dialler.aclose()

    # -- the consumer's side

    async def take(self) -> Step | None:
        """The next step; None at the end. Raises the error that ended it, each time it is asked."""
        while not self._steps:
            if self._over:
                self._raise_error()
                return None
            self._ready.clear()
            await self._ready.wait()
        step = self._steps.popleft()
        self._room.set()
        return step

    async def until_started(self) -> None:
        """Waits for the first stream. Raises what made it impossible, Unavailable when closed."""
        await self._started.wait()
        if not self.opened:
            self._raise_error()
            raise Unavailable("the subscriber was closed before Flux answered")

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error.with_traceback(None)

    # -- the reader's side

    async def run(self) -> None:
        """Ends when the stop sequence was passed or the subscription cannot go on."""
        error: AitherError | None = None
        try:
            while True:
                wait_s = await self._one_stream()
                if wait_s is None:
                    break
                await self._dialler.move_on(afresh=self._unheard)
                await asyncio.sleep(wait_s)
        except AitherError as permanent:
            error = permanent
        except Exception as defect:  # a stream that stops silently is the worst it could do
            _log.exception("subscriber.failed", address=self._dialler.address)
            error = Internal(f"the subscriber failed: {type(defect).__name__}: {defect}")
        finally:
            self._end(error)

    async def _one_stream(self) -> float | None:
        """Runs a stream to its end; returns the wait before the next one, None after the last."""
        method: Method = self._dialler.channel.unary_stream(
            _METHOD,
            request_serializer=_encoded,
            response_deserializer=Arriving,
        )
        call: Call = method(self._subscription.request(self._cursor.next_start()))
        opened_s = asyncio.get_running_loop().time()
        failure: BaseException | None = None
        last: Step | None = None
        try:
            with self.silence.over(call):
                await self._start(call)
                last = await self._read_all(call)
        except asyncio.CancelledError as error:
            if is_own_cancellation():
                raise
            failure = self.silence.error(self._dialler.address) or error
        except Exception as error:
            failure = error
        finally:
            call.cancel()
        if asyncio.get_running_loop().time() - opened_s > MOST_S:
            self._backoff.reset()  # one that is cut again at once has not proved itself
        if failure is None and last is not None and last.closing is not None:
            return self._closed(last)
        end = end_of(failure, self._dialler.address)
        self._unheard = end.unheard
        return self._broken(end)

    async def _start(self, call: Call) -> None:
        response = await self._read(call)
        if response is None or not response.message.HasField("started"):
            raise Unavailable(
                f"Flux at {self._dialler.address} did not begin the stream with `started`"
            )
        self._cursor.started(response.message.started)
        self.opened += 1
        self._started.set()
        if self._breaks:
            _log.info(
                "subscriber.resumed",
                address=self._dialler.address,
                filters=self._subscription.filters,
                after_sequence=self._cursor.position.sequence,
                attempts=self._breaks,
            )
        self._breaks = 0
        self._listener.connection(True, "")
        self._put(Step(self._cursor.position))

    async def _read_all(self, call: Call) -> Step | None:
        """Reads until Flux says good-bye, which is returned, or ends the stream without."""
        while True:
            await self._room.wait()
            response = await self._read(call)
            if response is None:
                return None
            step = self._cursor.take(response.message, response.events)
            self._put(step)
            if step.closing is not None:
                return step

    async def _read(self, call: Call) -> Arriving | None:
        self.silence.listen()
        response = await call.read()
        self.silence.heard()
        return response if isinstance(response, Arriving) else None

    def _put(self, step: Step) -> None:
        if self._steps and self._steps[-1].bookmark_only:
            self._steps.pop()
        self._steps.append(step)
        if step.events or len(self._steps) >= _AHEAD_STEPS:
            self._room.clear()
        self._ready.set()

    # -- how streams end

    def _closed(self, last: Step) -> float | None:
        if last.closing == CLOSING_REASON_STOP_REACHED:
            return None
        if last.closing == CLOSING_REASON_TOO_SLOW:
            epoch, sequence = last.position.epoch, last.position.sequence
            raise TooSlow(
                f"Flux ended the stream at {sequence} because events came faster than they were "
                "handled and the slow policy is DISCONNECT; resume with after(position), begin "
                "with NEW, or choose another policy",
                metadata={"epoch": epoch, "sequence": str(sequence)},
            )
        self._listener.connection(False, "Flux is draining")
        return self._backoff.short_s()

    def _broken(self, end: StreamEnd) -> float:
        self._listener.connection(False, str(end))
        if end.error.reason == EPOCH_MISMATCH and self._on_new_epoch == "restart":
            _log.warning(
                "subscriber.new_epoch",
                address=self._dialler.address,
                filters=self._subscription.filters,
                left=self._cursor.position.sequence,
                reason=end.error.message,
            )
            self._put(self._cursor.renew())
            return self._backoff.next_s()
        self._breaks += 1
        if end.permanent and not self._is_lagging_node(end):
            raise _damaged(end.error) if isinstance(end.error, DataLoss) else end.error
        if self._breaks == 1:
            _log.warning(
                "subscriber.disconnected",
                address=self._dialler.address,
                filters=self._subscription.filters,
                code=end.code.name,
                reason=end.error.message,
                position=self._cursor.position.sequence,
            )
        return self._backoff.next_s(end.error.retry_after_s)

    def _is_lagging_node(self, end: StreamEnd) -> bool:
        """Whether one of several nodes may only be late to hear of what another one delivered."""
        several = len(self._dialler.addresses) > 1 and self.opened > 0
        return several and end.code is Code.OUT_OF_RANGE and self._breaks <= _PATIENCE

    def _end(self, error: AitherError | None) -> None:
        if not self._over:
            self._over, self._error = True, error
            self._listener.connection(False, "closed" if error is None else error.message)
        self._ready.set()
        self._started.set()


def _damaged(error: DataLoss) -> DataLoss:
    return DataLoss(
        f"{error.message}. What comes before it was handed out. Take damaged records out with "
        "`aither flux verify` and `aither flux repair` (a gap will tell of them), or go on behind "
        "them with after(sequence)",
        reason=error.reason,
        metadata=error.metadata,
    )


def _encoded(request: SubscribeRequest) -> bytes:
    return request.SerializeToString()
