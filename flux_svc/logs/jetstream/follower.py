"""The tail of the stream, read by an ordered consumer: every message once, in order.

The consumer is a push consumer without acknowledgements whose messages are numbered. Where a number
is missing, a heartbeat tells of more than was heard, or nothing comes at all, it is thrown away and
another one begins behind what was heard. Flow control is the server's: it waits until what it sent
was taken, so that what waits here is bounded.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import structlog

from flux_svc.logs.jetstream.faults import NO_MESSAGE, StreamRefused
from flux_svc.logs.jetstream.ledger import Heard
from flux_svc.logs.jetstream.messages import (
    ID,
    expire_ns_in,
    place_of,
    record_of_message,
    size_on_disk,
)
from flux_svc.logs.jetstream.wire import Message, Wire

logger = structlog.get_logger()

HEARTBEAT_S = 1.0
_SILENCE_S = 2.5 * HEARTBEAT_S
"""A consumer that is silent so long is gone. Where it was the loop that stood still, another one
costs two messages."""
_QUIET_S = 0.5
_QUIET_TIMES = 20
"""A survey that hears nothing for so long asks whether there is more, and so many times."""
_SURVEYS = 20
_BEHIND_S = 0.1
"""Between two of them: together 2 s, in which a replica that was behind has caught up."""
_NS = 1_000_000_000


class Follower:
    """Follows over one connection after the other. `position` goes on from one to the next."""

    def __init__(self, stream: str, position: int, hear: Callable[[Sequence[Heard]], None]) -> None:
        self.position = position
        """The last sequence taken."""
        self._stream = stream
        self._skip = len(stream) + 1
        self._hear = hear
        self._taken: list[Heard] = []
        """What came in this step of the loop; told together."""

    async def follow(self, wire: Wire) -> None:
        """Until one consumer is of no use any more. Raises StreamRefused and Unavailable
        LOG_UNREACHABLE when it cannot be made."""
        consumer = Consumer(wire, self._take)
        try:
            await consumer.start(
                self._stream,
                {"deliver_policy": "by_start_sequence", "opt_start_seq": self.position + 1},
            )
            await consumer.until_broken()
        finally:
            await consumer.stop()

    def _take(self, message: Message) -> None:
        place = place_of(message.reply)
        if place.sequence <= self.position:
            return
        self.position = place.sequence
        headers = message.headers or {}
        subject = message.subject
        record = record_of_message(
            place.sequence, place.recorded_ns, subject[self._skip :], headers, message.data
        )
        if not self._taken:
            # Messages that came together are handed over one after the other without a pause.
            asyncio.get_running_loop().call_soon(self._tell)
        size = size_on_disk(subject, headers, message.data)
        self._taken.append(Heard(record, headers.get(ID, ""), size, expire_ns_in(headers)))

    def _tell(self) -> None:
        taken, self._taken = self._taken, []
        self._hear(taken)


async def survey(
    wire: Wire, stream: str, which: Mapping[str, Any], last: int, take: Callable[[Message], None]
) -> None:
    """Reads the headers of what is held up to `last`, as chosen by a consumer's configuration.

    Where that consumer breaks, or stands on a replica that lacks some of it, another one begins
    anew and `take` is given everything again. Raises as `Follower.follow`.
    """
    for _ in range(_SURVEYS):
        seen = await _surveyed(wire, stream, which, last, take)
        if seen is not None and (
            "filter_subjects" in which  # who asks for several subjects looks himself
            or await _nothing_held(wire, stream, which, seen + 1, last)
        ):
            return
        logger.warning("jetstream.survey_broken", stream=stream)
        await asyncio.sleep(_BEHIND_S)
    raise StreamRefused(0, f"the survey of the stream broke off {_SURVEYS} times")


async def _nothing_held(
    wire: Wire, stream: str, which: Mapping[str, Any], first: int, last: int
) -> bool:
    """Whether the stream's leader has nothing of it in a range; of several subjects it is not
    asked."""
    if first > last:
        return True
    if "filter_subjects" in which:
        return False
    subject = which.get("filter_subject", f"{stream}.>")
    try:
        answer = await wire.ask(f"STREAM.MSG.GET.{stream}", {"seq": first, "next_by_subj": subject})
    except StreamRefused as refused:
        if refused.code == NO_MESSAGE:
            return True
        raise
    return int(answer["message"]["seq"]) > last


async def _surveyed(
    wire: Wire, stream: str, which: Mapping[str, Any], last: int, take: Callable[[Message], None]
) -> int | None:
    """The last sequence that it told; None: it did not get to its end."""
    done = asyncio.Event()
    seen = int(which.get("opt_start_seq", 1)) - 1

    def heed(message: Message) -> None:
        nonlocal seen
        take(message)
        place = place_of(message.reply)
        seen = place.sequence
        if place.pending == 0 or place.sequence >= last:
            done.set()

    consumer = Consumer(wire, heed)
    try:
        if not await consumer.start(stream, {**which, "headers_only": True}):
            return seen
        broken = asyncio.ensure_future(consumer.until_broken())
        finished = asyncio.ensure_future(done.wait())
        try:
            quiet = 0
            while quiet < _QUIET_TIMES:
                before = seen
                ended, _ = await asyncio.wait(
                    (broken, finished), timeout=_QUIET_S, return_when=asyncio.FIRST_COMPLETED
                )
                if ended:
                    break
                quiet = quiet + 1 if seen == before else 0
                # What was announced may be removed meanwhile, and then nothing more comes.
                if quiet and await _nothing_held(wire, stream, which, seen + 1, last):
                    return seen
        finally:
            broken.cancel()
            finished.cancel()
        return seen if done.is_set() else None
    finally:
        await consumer.stop()


class Consumer:
    """One consumer on the server, and the subscription that hears it."""

    def __init__(self, wire: Wire, take: Callable[[Message], None]) -> None:
        self._wire = wire
        self._take = take
        self._name = f"flux-{uuid.uuid4().hex[:12]}"
        self._stream = ""
        self._heard = 0
        """Messages; each has its number."""
        self._heard_s = 0.0
        """When the last of anything came, by the loop's clock."""
        self._broken = asyncio.Event()
        self._subscription: Any = None

    async def start(self, stream: str, which: Mapping[str, Any]) -> int:
        """How many messages it will bring at once."""
        inbox, self._subscription = await self._wire.subscribe(self._message)
        config = {
            "ack_policy": "none",
            "deliver_subject": inbox,
            "flow_control": True,
            "idle_heartbeat": int(HEARTBEAT_S * _NS),
            "inactive_threshold": int(10 * _NS),
            "max_deliver": 1,
            "mem_storage": True,
            "num_replicas": 1,
            **which,
        }
        request = {"stream_name": stream, "config": config, "action": "create"}
        answer = await self._wire.ask(f"CONSUMER.CREATE.{stream}.{self._name}", request)
        self._stream = stream
        return int(answer.get("num_pending", 0))

    async def until_broken(self) -> None:
        loop = asyncio.get_running_loop()
        waits = [
            asyncio.ensure_future(self._broken.wait()),
            asyncio.ensure_future(self._wire.lost.wait()),
        ]
        try:
            self._heard_s = loop.time()
            while (left_s := self._heard_s + _SILENCE_S - loop.time()) > 0:
                done, _ = await asyncio.wait(
                    waits, timeout=left_s, return_when=asyncio.FIRST_COMPLETED
                )
                if done:
                    return
            logger.warning("jetstream.consumer_silent", consumer=self._name)
        finally:
            for wait in waits:
                wait.cancel()

    async def stop(self) -> None:
        """Lets go of both ends; the server forgets a consumer that nobody hears by itself."""
        self._broken.set()
        if self._subscription is None or self._wire.lost.is_set():
            return
        try:
            await self._subscription.unsubscribe()
            if self._stream:
                await self._wire.send(f"$JS.API.CONSUMER.DELETE.{self._stream}.{self._name}")
        except Exception as error:  # the connection goes; so does the consumer
            logger.debug("jetstream.consumer_not_deleted", error=str(error))

    async def _message(self, message: Message) -> None:
        if self._broken.is_set():
            return
        self._heard_s = asyncio.get_running_loop().time()
        headers = message.headers or {}
        if "Status" in headers:
            await self._control(message, headers)
            return
        number = place_of(message.reply).consumer_sequence
        if number != self._heard + 1:
            logger.warning("jetstream.messages_missed", heard=self._heard, got=number)
            self._broken.set()
            return
        self._heard = number
        self._take(message)

    async def _control(self, message: Message, headers: Mapping[str, str]) -> None:
        """Heartbeats and flow control; anything else (409) says that the consumer is gone."""
        if headers["Status"] != "100":
            self._broken.set()
            return
        last = headers.get("Nats-Last-Consumer")
        if last is not None and int(last) != self._heard:
            self._broken.set()
            return
        reply = message.reply or headers.get("Nats-Consumer-Stalled", "")
        if reply:
            await self._wire.send(reply)
