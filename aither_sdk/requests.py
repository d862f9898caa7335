"""Questions and answers as events: whoever follows the subject may answer, and all of it is on the
log. For a question to one known service a gRPC call is shorter."""

from __future__ import annotations

import asyncio
import contextvars
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from google.rpc import status_pb2

from aither.flux.v1.event_pb2 import Event
from aither.flux.v1.flux_service_pb2 import PublishResult
from aither_sdk.dialling import Addresses
from aither_sdk.errors import (
    AitherError,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
)
from aither_sdk.events import Payload, new_event, new_event_id
from aither_sdk.publishing.publisher import Publisher
from aither_sdk.rpc_status import from_status, to_status
from aither_sdk.subjects import subject_fault
from aither_sdk.subscribing.subscriber import Subscriber

REPLY_TO = "reply-to"
"""The header of a question that names the subject of its answer."""
_ANSWER_LIVES_S = 60.0
"""An answer leaves the log after this long: nobody but its asker wants it."""
_STARTED_S = 10.0


@dataclass(frozen=True, slots=True)
class RequesterStatistics:
    """Counts since it was opened."""

    asked: int
    answered: int
    timed_out: int
    late: int
    """Answers that nobody waited for any more, and second answers."""
    outstanding: int


class Requester:
    """Asks with `request`; all answers come by one subscription, on a subject of this client alone.

        async with Requester(address, publisher) as requester:
            answer = await requester.request("stock.check", {"sku": 7}, timeout_s=2)

    A question is an event with a `reply-to` header and a conversation (`correlation_id`) of its
    own, so whatever is caused by it, also over several services, finds the way back. It expires
    with its timeout: a service that was away does not answer questions of yesterday. The first
    answer counts. A crash of the answering service is a timeout, and a question may be answered
    twice by it, as every event may be handled twice.
    """

    def __init__(
        self, address: Addresses, publisher: Publisher, *, max_outstanding: int = 1_000
    ) -> None:
        client = re.sub(r"[^a-z0-9_-]+", "-", publisher.source.lower())[:63] or "client"
        self.reply_subject = f"reply.{client}.{os.urandom(6).hex()}"
        self._publisher = publisher
        self._max_outstanding = max_outstanding
        self._waiting: dict[str, asyncio.Future[Event]] = {}
        self._subscriber = Subscriber(
            address, [self.reply_subject], client_name=f"{client} answers"
        )
        self._reader: asyncio.Task[None] | None = None
        self._error: AitherError | None = None
        self._asked = self._answered = self._timed_out = self._late = 0

    async def __aenter__(self) -> Self:
        """Waits until answers can come. Raises DeadlineExceeded when Flux is not there in 10 s."""
        await self._subscriber.__aenter__()
        try:
            await self._subscriber.until_started(_STARTED_S)
        except BaseException:
            await self._subscriber.aclose()
            raise
        self._reader = asyncio.get_running_loop().create_task(
            self._read(), name=f"requester {self.reply_subject}", context=contextvars.Context()
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Whoever still waits gets Unavailable."""
        await self._subscriber.aclose()
        if self._reader is not None:
            await asyncio.wait({self._reader})
        self._give_up(Unavailable("the requester was closed before the answer came"))

    async def request(
        self,
        subject: str,
        payload: Payload = None,
        *,
        timeout_s: float,
        headers: Mapping[str, str] | None = None,
    ) -> Event:
        """Publishes a question and waits for its first answer.

        Raises DeadlineExceeded (reason NO_ANSWER) after `timeout_s`, what the answering side gave
        to `refuse`, ResourceExhausted (REQUESTS_FULL) with too many questions open, and what
        `Publisher.publish` raises.
        """
        if self._reader is None or self._reader.done():
            state = "not open: use `async with`" if self._reader is None else "closed"
            raise self._error or FailedPrecondition(f"this requester is {state}")
        if len(self._waiting) >= self._max_outstanding:
            raise ResourceExhausted(
                f"{len(self._waiting)} questions wait for their answers; ask fewer at once",
                reason="REQUESTS_FULL",
            )
        id = new_event_id()
        question = new_event(
            subject,
            payload,
            source=self._publisher.source,
            id=id,
            correlation_id=id,
            headers={**(headers or {}), REPLY_TO: self.reply_subject},
            expire_after_s=timeout_s,
        )
        answer: asyncio.Future[Event] = asyncio.get_running_loop().create_future()
        self._waiting[id] = answer
        self._asked += 1
        try:
            async with asyncio.timeout(timeout_s):
                await self._publisher.publish_event(question)
                event = await answer
        except TimeoutError:
            self._timed_out += 1
            raise DeadlineExceeded(
                f'nobody answered "{subject}" within {timeout_s:g} s; it may or may not have been '
                "worked on",
                reason="NO_ANSWER",
                metadata={"correlation_id": id},
            ) from None
        finally:
            del self._waiting[id]
            if answer.done() and not answer.cancelled():
                answer.exception()  # seen, also where the publish failed first
        self._answered += 1
        status = status_pb2.Status()
        if event.payload.Unpack(status):
            raise from_status(status)
        return event

    def statistics(self) -> RequesterStatistics:
        return RequesterStatistics(
            self._asked, self._answered, self._timed_out, self._late, len(self._waiting)
        )

    async def _read(self) -> None:
        try:
            async for event in self._subscriber:
                answer = self._waiting.get(event.correlation_id)
                if answer is None or answer.done():
                    self._late += 1
                else:
                    answer.set_result(event)
        except AitherError as error:  # no answer can come any more
            self._error = error
            self._give_up(error)

    def _give_up(self, error: AitherError) -> None:
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(error)


async def reply(publisher: Publisher, question: Event, payload: Payload = None) -> PublishResult:
    """Answers a question. Raises InvalidArgument when the event asks for no answer."""
    answer = new_event(
        _reply_subject(question),
        payload,
        source=publisher.source,
        cause=question,
        expire_after_s=_ANSWER_LIVES_S,
    )
    return await publisher.publish_event(answer)


async def refuse(publisher: Publisher, question: Event, error: AitherError) -> PublishResult:
    """Answers a question with an error, which its `request` raises as it is."""
    return await reply(publisher, question, to_status(error))


def _reply_subject(question: Event) -> str:
    subject = question.headers.get(REPLY_TO, "")
    if not subject or subject_fault(subject) is not None:
        told = f'event {question.id} on "{question.subject}" names no subject for an answer'
        raise InvalidArgument(f"{told} in its header {REPLY_TO}", reason="NO_REPLY_TO")
    return subject
