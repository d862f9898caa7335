"""Questions and answers over real gRPC: typed, bounded, and each answer to its own asker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from aither.flux.v1.event_pb2 import Event
from aither_sdk.errors import DeadlineExceeded, InvalidArgument, NotFound, ResourceExhausted
from aither_sdk.events import handling, payload_of
from aither_sdk.publishing.publisher import Publisher
from aither_sdk.requests import Requester, refuse, reply
from aither_sdk.subscribing.subscriber import Subscriber
from tests.sdk.flux_stub import FluxStub


@pytest.fixture
async def flux() -> AsyncIterator[FluxStub]:
    async with FluxStub() as stub:
        yield stub


@pytest.fixture
async def publisher(flux: FluxStub) -> AsyncIterator[Publisher]:
    async with Publisher(flux.address, source="Shop/EU 1") as publisher:
        yield publisher


@pytest.fixture
async def doubler(flux: FluxStub) -> AsyncIterator[None]:
    """Answers `double` in the opposite order of the questions, by pairs; refuses what is not a
    number."""

    async def answer(questions: Subscriber, publisher: Publisher) -> None:
        held: list[Event] = []
        async for event in questions:
            asked = payload_of(event)
            assert isinstance(asked, dict)
            if not isinstance(asked["n"], float):
                await refuse(publisher, event, NotFound("not a number", reason="NO_NUMBER"))
                continue
            held.append(event)
            if len(held) == 2:
                for one in reversed(held):
                    n = payload_of(one)
                    assert isinstance(n, dict)
                    await reply(publisher, one, {"n": 2 * n["n"]})
                held.clear()

    async with (
        Subscriber(flux.address, ["double"]) as questions,
        Publisher(flux.address, source="doubler") as publisher,
    ):
        await questions.until_started(10)
        task = asyncio.create_task(answer(questions, publisher))
        yield
        await questions.aclose()
        await task


async def test_each_answer_comes_to_its_own_question(
    flux: FluxStub, publisher: Publisher, doubler: None
) -> None:
    async with Requester(flux.address, publisher) as requester:
        answers = await asyncio.gather(
            *(requester.request("double", {"n": n}, timeout_s=10) for n in range(20))
        )
        assert [payload_of(answer) for answer in answers] == [{"n": 2.0 * n} for n in range(20)]
        assert requester.statistics().outstanding == 0
        assert requester.reply_subject.startswith("reply.shop-eu-1.")
    assert sum(r.filters == [requester.reply_subject] for r in flux.subscribe_requests) == 1


async def test_answer_is_caused_by_its_question_and_both_expire(
    flux: FluxStub, publisher: Publisher, doubler: None
) -> None:
    async with Requester(flux.address, publisher) as requester:
        with handling(Event(id="1", source="s", correlation_id="talk")):
            first = requester.request("double", {"n": 1}, timeout_s=10)
            answer, _ = await asyncio.gather(
                first, requester.request("double", {"n": 2}, timeout_s=10)
            )
    question = next(event for event in flux.log if event.id == answer.correlation_id)
    assert (question.causation_id, question.hops, answer.hops) == ("s/1", 1, 2)
    assert answer.causation_id == f"{question.source}/{question.id}"
    assert 0 < question.expire_time.seconds - question.time.seconds <= 11
    assert answer.HasField("expire_time")


async def test_refusal_is_raised_with_its_type_and_reason(
    flux: FluxStub, publisher: Publisher, doubler: None
) -> None:
    async with Requester(flux.address, publisher) as requester:
        with pytest.raises(NotFound, match="not a number") as caught:
            await requester.request("double", {"n": "x"}, timeout_s=10)
    assert caught.value.reason == "NO_NUMBER"


async def test_no_answer_is_a_typed_timeout_and_a_late_one_is_counted(
    flux: FluxStub, publisher: Publisher
) -> None:
    async with Requester(flux.address, publisher) as requester:
        with pytest.raises(DeadlineExceeded, match='nobody answered "void"') as caught:
            await requester.request("void", timeout_s=0.1)
        assert caught.value.reason == "NO_ANSWER"
        await reply(publisher, flux.log[0])
        async with asyncio.timeout(10):
            while requester.statistics().late == 0:
                await asyncio.sleep(0.005)
        assert requester.statistics().timed_out == 1


async def test_open_questions_are_bounded(flux: FluxStub, publisher: Publisher) -> None:
    async with Requester(flux.address, publisher, max_outstanding=1) as requester:
        asking = asyncio.create_task(requester.request("void", timeout_s=10))
        while not requester.statistics().outstanding:
            await asyncio.sleep(0)
        with pytest.raises(ResourceExhausted) as caught:
            await requester.request("void", timeout_s=10)
        assert caught.value.reason == "REQUESTS_FULL"
        asking.cancel()
        await asyncio.wait({asking})
        assert requester.statistics().outstanding == 0


async def test_event_that_asks_for_nothing_cannot_be_answered(publisher: Publisher) -> None:
    with pytest.raises(InvalidArgument, match="names no subject for an answer"):
        await reply(publisher, Event(id="1", source="s", subject="a.b"))
