"""Spans of events: one a batch, one a handled event, linked and never endless; none when off."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode, format_span_id, get_current_span

from aither.flux.v1.event_pb2 import Event
from aither_sdk import messaging_spans
from aither_sdk.consumers import new_consumer
from aither_sdk.errors import Unavailable
from aither_sdk.events import new_event
from aither_sdk.publishing.publisher import Publisher
from aither_sdk.subscribing.subscriber import EARLIEST, Subscriber
from aither_sdk.working.worker import Worker
from tests.sdk.flux_stub import Break, FluxStub
from tests.sdk.group_stub import GroupStub

Spans = Callable[[str], Sequence[ReadableSpan]]


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> Iterator[TracerProvider]:
    provider = TracerProvider()
    monkeypatch.setattr(messaging_spans, "_tracer", provider.get_tracer("test"))
    yield provider
    provider.shutdown()


@pytest.fixture
def spans(provider: TracerProvider) -> Spans:
    """Ended spans of one operation, in order of their ends."""
    exporter = InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))

    def ended(operation: str) -> Sequence[ReadableSpan]:
        return [s for s in exporter.get_finished_spans() if s.name.split(" ")[0] == operation]

    return ended


def attributes(span: ReadableSpan) -> dict[str, object]:
    return dict(span.attributes or {})


async def test_lone_event_is_sent_in_a_producer_span_linked_to_the_one_that_made_it(
    provider: TracerProvider, spans: Spans
) -> None:
    async with FluxStub() as flux, Publisher(flux.address, source="me") as publisher:
        with provider.get_tracer("app").start_as_current_span("order") as made_in:
            await publisher.publish("order.paid")
        (span,) = spans("send")
        assert flux.log[0].traceparent.split("-")[2] == format_span_id(
            made_in.get_span_context().span_id
        )
    assert (span.name, span.kind, span.parent) == ("send order.paid", SpanKind.PRODUCER, None)
    assert [link.context.span_id for link in span.links] == [made_in.get_span_context().span_id]
    assert attributes(span) == {
        "messaging.system": "aither_flux",
        "messaging.operation.name": "send",
        "messaging.operation.type": "send",
        "messaging.destination.name": "order.paid",
    }


async def test_batch_has_its_count_and_a_bounded_number_of_links(
    provider: TracerProvider, spans: Spans
) -> None:
    async with FluxStub() as flux, Publisher(flux.address, source="me") as publisher:
        with provider.get_tracer("app").start_as_current_span("order"):
            for n in range(40):
                publisher.enqueue(new_event(f"order.n{n}", source="me"))
        await publisher.flush(10)
        (span,) = spans("send")
    assert span.name == f"send {flux.address}"  # of many subjects none would be the name
    assert len(span.links) == messaging_spans.MAX_LINKS
    assert attributes(span)["messaging.batch.message_count"] == 40
    assert attributes(span)["aither_flux.links_left_out"] == 40 - messaging_spans.MAX_LINKS


async def test_unanswered_batch_ends_as_an_error_and_its_repeat_is_another_span(
    spans: Spans,
) -> None:
    async with FluxStub() as flux, Publisher(flux.address, source="me") as publisher:
        flux.publish_script.append(Break(error=Unavailable("moment")))
        await publisher.publish("order.paid")
        first, second = spans("send")
    assert (first.status.status_code, attributes(first)["error.type"]) == (
        StatusCode.ERROR,
        "UNANSWERED",
    )
    assert second.status.status_code is StatusCode.UNSET


async def test_worker_processes_in_a_span_of_its_own_and_settles_in_another(
    provider: TracerProvider, spans: Spans
) -> None:
    published: list[Event] = []

    async def handle(event: Event) -> None:
        published.append(new_event("order.shipped", source="me"))
        if event.subject == "order.n1.paid":
            raise ValueError("no")

    group = new_consumer("work", ["order.*.paid", "other"])
    trace_id, span_id = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    cause = Event(id="c", source="s", subject="order.n0.paid")
    cause.traceparent = f"00-{trace_id}-{span_id}-01"
    async with GroupStub() as flux:
        with provider.get_tracer("app").start_as_current_span("main"):
            worker = Worker(flux.address, group, handle)
            async with worker, asyncio.timeout(20):
                flux.add(cause, Event(id="d", source="s", subject="order.n1.paid"))
                while not (flux.acked and flux.nacks):
                    await asyncio.sleep(0.005)
    first = next(s for s in spans("process") if attributes(s)["messaging.message.id"] == "c")
    failed = next(s for s in spans("process") if attributes(s)["messaging.message.id"] == "d")
    assert (first.name, first.kind) == ("process order.*.paid", SpanKind.CONSUMER)
    assert first.parent is None  # not a part of whatever opened the worker
    assert [format_span_id(link.context.span_id) for link in first.links] == [span_id]
    assert attributes(first) == {
        "messaging.system": "aither_flux",
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.destination.name": "order.n0.paid",
        "messaging.destination.template": "order.*.paid",
        "messaging.message.id": "c",
        "messaging.consumer.group.name": "work",
    }
    assert (failed.status.status_code, attributes(failed)["error.type"]) == (
        StatusCode.ERROR,
        "ValueError",
    )
    context = first.get_span_context()
    assert context is not None
    assert published[0].traceparent.split("-")[2] == format_span_id(context.span_id)
    settled = spans("settle")
    assert {attributes(span)["messaging.operation.name"] for span in settled} == {"ack", "nack"}
    assert all(span.kind is SpanKind.CLIENT for span in settled)


async def test_subscriber_processes_where_it_is_asked_to(spans: Spans) -> None:
    async with FluxStub() as flux:
        await flux.append(Event(id="1", source="s", subject="a.b"))
        async with Subscriber(flux.address, ["a.>"], start=EARLIEST) as subscriber:
            event = await anext(subscriber)
            assert not get_current_span().is_recording()
            with subscriber.handling(event):
                assert new_event("a.c", source="me").causation_id == "s/1"
                assert get_current_span().is_recording()
    (span,) = spans("process")
    assert span.name == "process a.>"
    assert span.links == ()


async def test_no_span_is_made_while_tracing_is_off() -> None:
    assert not messaging_spans.send_span("x:1", _unread(), _unread()).is_recording()
    with messaging_spans.process_span(Event(), "x") as span:
        assert not span.is_recording()


def _unread() -> Iterator[str]:
    raise AssertionError("looked at what nobody records")
    yield ""
