"""The Publisher over real gRPC, against a Flux that breaks, hangs, refuses and comes back."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator

import grpc
import pytest

from aither.flux.v1.event_pb2 import Event
from aither.flux.v1.flux_service_pb2 import DURABILITY_MEMORY, PublishResult
from aither_sdk.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
    Unimplemented,
)
from aither_sdk.events import fields_of, handling, new_event
from aither_sdk.publishing.publisher import Publisher
from tests.sdk.flux_stub import Break, FluxStub, HalfClose, Hang, Misanswer, made
from tests.stopwatch import Stopwatch


@pytest.fixture
async def flux() -> AsyncIterator[FluxStub]:
    async with FluxStub() as stub:
        yield stub


async def settle(publisher: Publisher) -> None:
    """Waits until everything given so far has its answer."""
    await publisher.flush(timeout_s=20)


async def test_publish_returns_the_sequence(flux: FluxStub) -> None:
    async with Publisher(flux.address, source="me") as publisher:
        assert not publisher.statistics().connected
        first = await publisher.publish("a.b", {"n": 1})
        second = await publisher.publish("a.b", {"n": 2}, headers={"k": "v"}, id="mine")
        statistics = publisher.statistics()
    assert (first.sequence, second.sequence) == (1, 2)
    assert [event.source for event in flux.log] == ["me", "me"]
    assert flux.log[1].id == "mine"
    assert flux.log[1].headers == {"k": "v"}
    assert statistics.published == 2
    assert statistics.connected
    assert statistics.buffered_events == statistics.buffered_bytes == 0
    assert flux.closed_by_client == 1, "it says good-bye instead of breaking the stream"


async def test_concurrent_publishes_share_batches_and_keep_order(flux: FluxStub) -> None:
    async with Publisher(flux.address, source="me") as publisher:
        futures = [publisher.enqueue(made(id=str(n))) for n in range(2000)]
        await settle(publisher)
    assert flux.ids == [str(n) for n in range(2000)]
    assert [future.result().sequence for future in futures] == list(range(1, 2001))
    assert len(flux.batches) < 20


async def test_cause_of_the_handled_event_goes_along(flux: FluxStub) -> None:
    async with Publisher(flux.address, source="me") as publisher:
        with handling(Event(id="7", source="pulse", hops=1)):
            await publisher.publish("a.b")
    assert (flux.log[0].causation_id, flux.log[0].hops) == ("pulse/7", 2)


async def test_unset_fields_are_filled_in_the_given_event(flux: FluxStub) -> None:
    event = Event(subject="a.b")
    async with Publisher(flux.address, source="me") as publisher:
        await publisher.publish_event(event)
        again = await publisher.publish_event(event)
        statistics = publisher.statistics()
    assert event.id
    assert event.source == "me"
    assert event.time.seconds > 0
    assert again.duplicate
    assert (statistics.published, statistics.duplicates) == (1, 1)


async def test_durability_reaches_flux(flux: FluxStub) -> None:
    async with Publisher(flux.address, source="me", durability=DURABILITY_MEMORY) as publisher:
        await publisher.publish("a.b")
    assert publisher._stream._tail == b"\x10\x01"
    assert len(flux.log) == 1


async def test_bad_event_is_refused_before_it_can_hurt_others(flux: FluxStub) -> None:
    async with Publisher(flux.address, source="me") as publisher:
        with pytest.raises(InvalidArgument, match="subject"):
            await publisher.publish("Not A Subject")
        with pytest.raises(InvalidArgument, match="1048576 at most"):
            await publisher.publish("a.b", {"large": "x" * 2**20})
        with pytest.raises(InvalidArgument, match="id"):
            publisher.enqueue(made(id="x" * 129))
        assert publisher.statistics().buffered_events == 0
        await publisher.publish("a.b")
    assert len(flux.log) == 1


async def test_event_of_nearly_one_mebibyte_passes(flux: FluxStub) -> None:
    async with Publisher(flux.address, source="me") as publisher:
        for _ in range(6):
            publisher.enqueue(new_event("a.b", {"large": "x" * (2**20 - 300)}, source="me"))
        await settle(publisher)
    assert len(flux.log) == 6


async def test_refused_event_fails_alone_with_a_typed_error(flux: FluxStub) -> None:
    told = FailedPrecondition("too deep", reason="HOPS_EXCEEDED", metadata={"hops": "9"})
    flux.refusals["bad"] = told
    async with Publisher(flux.address, source="me") as publisher:
        futures = [publisher.enqueue(made(id=name)) for name in ("good", "bad", "fine")]
        await settle(publisher)
        statistics = publisher.statistics()
    assert flux.ids == ["good", "fine"]
    with pytest.raises(FailedPrecondition, match="too deep") as caught:
        await futures[1]
    assert (caught.value.reason, caught.value.metadata) == ("HOPS_EXCEEDED", {"hops": "9"})
    assert (statistics.published, statistics.refused) == (2, 1)


@pytest.mark.parametrize("stored", [True, False])
async def test_broken_stream_is_resent_without_doubling(flux: FluxStub, stored: bool) -> None:
    flux.publish_script.extend([Break(stored=stored), Break(stored=not stored)])
    async with Publisher(flux.address, source="me") as publisher:
        futures = [publisher.enqueue(made(id=str(n))) for n in range(1000)]
        results = await asyncio.gather(*futures)
        statistics = publisher.statistics()
    assert flux.ids == [str(n) for n in range(1000)]
    assert [result.sequence for result in results] == list(range(1, 1001))
    assert statistics.reconnects == 2
    assert statistics.retried > 0
    assert statistics.published + statistics.duplicates == 1000


@pytest.mark.parametrize("code", [grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL])
async def test_cancelled_by_the_peer_is_a_broken_stream(
    flux: FluxStub, code: grpc.StatusCode
) -> None:
    flux.publish_script.extend([Break(code=code)] * 2)
    async with Publisher(flux.address, source="me") as publisher:
        await publisher.publish("a.b")
    assert flux.publish_streams == 3


@pytest.mark.parametrize("act", [HalfClose(), Misanswer()])
async def test_stream_that_makes_no_sense_is_begun_again(
    flux: FluxStub, act: HalfClose | Misanswer
) -> None:
    flux.publish_script.append(act)
    async with Publisher(flux.address, source="me") as publisher:
        await publisher.publish("a.b", id="one")
    assert flux.ids == ["one"]


async def test_retry_info_is_obeyed(flux: FluxStub) -> None:
    busy = ResourceExhausted("the write queue is full", retry_after_s=0.3)
    flux.publish_script.append(Break(error=busy))
    loop = asyncio.get_running_loop()
    async with Publisher(flux.address, source="me") as publisher:
        began_s = loop.time()
        await publisher.publish("a.b")
        assert loop.time() - began_s >= 0.3
    assert flux.publish_streams == 2


async def test_hopeless_stream_fails_what_is_pending_and_later_ones_try_anew(
    flux: FluxStub,
) -> None:
    flux.publish_script.append(Break(error=Unimplemented("no such method")))
    async with Publisher(flux.address, source="me") as publisher:
        futures = [publisher.enqueue(made(id=str(n))) for n in range(3)]
        for future in futures:
            with pytest.raises(Unimplemented, match="no such method"):
                await future
        assert publisher.statistics().refused == 3
        await publisher.publish("a.b", id="later")
    assert flux.ids == ["later"]


async def test_refused_stream_fails_only_what_was_sent(flux: FluxStub) -> None:
    flux.publish_script.append(Break(error=InvalidArgument("bad batch")))
    async with Publisher(flux.address, source="me", batches_in_flight=1) as publisher:
        bad = publisher.enqueue(made(id="bad"))
        await flux.received.wait()
        good = publisher.enqueue(made(id="good"))
        with pytest.raises(InvalidArgument, match=r'event bad on "test.subject".*bad batch'):
            await bad
        assert (await good).sequence == 1


async def test_event_that_breaks_every_stream_is_given_up(flux: FluxStub) -> None:
    flux.publish_script.extend([Break(error=Internal("a defect"))] * 5)
    async with Publisher(flux.address, source="me") as publisher:
        with pytest.raises(Internal, match="a defect"):
            await publisher.publish("a.b", id="poison")
        await publisher.publish("a.b", id="good")
    assert flux.ids == ["good"]


async def test_wrong_service_on_the_port_is_told() -> None:
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with Publisher(f"127.0.0.1:{port}", source="me") as publisher:
            with pytest.raises(Unimplemented):
                await publisher.publish("a.b")
    finally:
        await server.stop(None)


async def test_hung_stream_times_out_is_broken_and_the_event_arrives(flux: FluxStub) -> None:
    flux.publish_script.append(Hang(stored=True))
    async with Publisher(flux.address, source="me", ack_timeout_s=0.3) as publisher:
        with pytest.raises(DeadlineExceeded, match="may or may not be stored") as caught:
            await publisher.publish("a.b", id="one")
        assert caught.value.metadata == {"event_id": "one"}
        await settle(publisher)
        again = await publisher.publish("a.b", id="one")
        statistics = publisher.statistics()
    assert flux.ids == ["one"]
    assert again.duplicate
    assert statistics.reconnects >= 1


async def test_flux_that_comes_later_is_found(flux: FluxStub) -> None:
    await flux.stop()
    async with Publisher(flux.address, source="me") as publisher:
        publishing = asyncio.create_task(publisher.publish("a.b"))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(publishing), 0.2)
        await flux.start()
        assert (await publishing).sequence == 1


# -- full buffers


async def stuffed(
    flux: FluxStub, publisher: Publisher, events: int
) -> list[asyncio.Future[PublishResult]]:
    """Fills the buffer while Flux answers nothing; the first event is on its way."""
    flux.gate.clear()
    flux.received.clear()
    futures = [publisher.enqueue(made(id="0"))]
    await flux.received.wait()
    return futures + [publisher.enqueue(made(id=str(n))) for n in range(1, events)]


async def test_wait_holds_publishers_back_in_order(flux: FluxStub) -> None:
    async with Publisher(flux.address, source="me", buffer_events=3) as publisher:
        await stuffed(flux, publisher, 3)
        with pytest.raises(ResourceExhausted, match="buffer is full"):
            publisher.enqueue(made(id="too much"))
        waiting = [asyncio.create_task(publisher.publish("a.b", id=f"waits {n}")) for n in range(5)]
        await asyncio.sleep(0)
        assert publisher.statistics().buffered_events == 3
        flux.gate.set()
        await asyncio.gather(*waiting)
        assert publisher.statistics().refused == 1
    assert flux.ids == ["0", "1", "2", *(f"waits {n}" for n in range(5))]


async def test_waiting_for_room_ends_at_the_timeout_and_nothing_was_sent(flux: FluxStub) -> None:
    options = {"source": "me", "buffer_events": 1, "ack_timeout_s": 0.2, "close_timeout_s": 0.0}
    async with Publisher(flux.address, **options) as publisher:  # type: ignore[arg-type]
        await stuffed(flux, publisher, 1)
        with pytest.raises(ResourceExhausted, match=r"found no room.*it was not sent"):
            await publisher.publish("a.b", id="late")
    assert "late" not in flux.ids


async def test_refuse_raises_at_once(flux: FluxStub) -> None:
    async with Publisher(
        flux.address, source="me", buffer_events=2, when_full="refuse"
    ) as publisher:
        await stuffed(flux, publisher, 2)
        with pytest.raises(ResourceExhausted, match=r"Flux at .* is slow or away"):
            await publisher.publish("a.b")
        flux.gate.set()
    assert flux.ids == ["0", "1"]


async def test_drop_oldest_tells_who_gave_way(flux: FluxStub) -> None:
    async with Publisher(
        flux.address, source="me", buffer_events=3, when_full="drop_oldest", batches_in_flight=1
    ) as publisher:
        futures = await stuffed(flux, publisher, 3)
        newest = publisher.enqueue(made(id="3"))
        with pytest.raises(ResourceExhausted, match=r"event 1 .* gave way"):
            await futures[1]
        flux.gate.set()
        await asyncio.gather(futures[0], futures[2], newest)
        assert publisher.statistics().dropped == 1
    assert flux.ids == ["0", "2", "3"]


async def test_bytes_bound_the_buffer_too(flux: FluxStub) -> None:
    async with Publisher(
        flux.address, source="me", buffer_bytes=1000, when_full="refuse"
    ) as publisher:
        await stuffed(flux, publisher, 2)
        with pytest.raises(ResourceExhausted):
            await publisher.publish("a.b", {"large": "x" * 1000})
        flux.gate.set()


# -- cancellation


async def test_cancelled_before_it_was_sent_is_withdrawn(flux: FluxStub) -> None:
    async with Publisher(flux.address, source="me", batches_in_flight=1) as publisher:
        await stuffed(flux, publisher, 1)
        tasks = [asyncio.create_task(publisher.publish("a.b", id=f"{n}")) for n in range(1, 4)]
        await asyncio.sleep(0)
        tasks[1].cancel()
        flux.gate.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(results[1], asyncio.CancelledError)
    assert flux.ids == ["0", "1", "3"]


async def test_cancelled_after_it_was_sent_goes_its_way(flux: FluxStub) -> None:
    flux.gate.clear()
    async with Publisher(flux.address, source="me") as publisher:
        task = asyncio.create_task(publisher.publish("a.b", id="one"))
        await flux.received.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        flux.gate.set()
        await publisher.publish("a.b", id="two")
        assert publisher.statistics().published == 2
    assert flux.ids == ["one", "two"]


async def test_cancelled_while_waiting_for_room_makes_way(flux: FluxStub) -> None:
    async with Publisher(flux.address, source="me", buffer_events=1) as publisher:
        await stuffed(flux, publisher, 1)
        tasks = [asyncio.create_task(publisher.publish("a.b", id=f"{n}")) for n in range(1, 4)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        await asyncio.sleep(0)
        flux.gate.set()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert flux.ids == ["0", "2", "3"]


# -- closing


async def test_close_flushes_what_was_enqueued(flux: FluxStub) -> None:
    async with Publisher(flux.address, source="me") as publisher:
        futures = [publisher.enqueue(made(id=str(n))) for n in range(5000)]
    assert flux.ids == [str(n) for n in range(5000)]
    assert all(future.result().sequence for future in futures)


async def test_close_fails_what_cannot_be_flushed_within_its_bound(flux: FluxStub) -> None:
    flux.gate.clear()
    async with Publisher(flux.address, source="me", close_timeout_s=0.2) as publisher:
        blocked = asyncio.create_task(publisher.publish("a.b", id="sent"))
        await flux.received.wait()
        await asyncio.sleep(0)
        watch = Stopwatch()
    assert watch.calm_s < 2
    with pytest.raises(Unavailable, match="may or may not be stored: publish it again"):
        await blocked
    assert publisher.statistics().dropped == 1


async def test_closing_without_flux_is_quick_and_says_what_was_not_sent() -> None:
    publisher = Publisher("127.0.0.1:1", source="me", close_timeout_s=0.1)
    async with publisher:
        future = publisher.enqueue(made())
    with pytest.raises(Unavailable, match="closed before"):
        await future
    with pytest.raises(FailedPrecondition, match="closed"):
        await publisher.publish("a.b")
    with pytest.raises(FailedPrecondition, match="opened once"):
        async with publisher:
            pass
    await publisher.aclose()


async def test_publisher_that_was_not_opened_says_so() -> None:
    with pytest.raises(FailedPrecondition, match="async with"):
        await Publisher("127.0.0.1:1", source="me").publish("a.b")


async def test_cancelled_close_leaves_no_task_behind(flux: FluxStub) -> None:
    flux.gate.clear()
    publisher = Publisher(flux.address, source="me", close_timeout_s=60)
    await publisher.__aenter__()
    future = publisher.enqueue(made())
    await flux.received.wait()
    closing = asyncio.create_task(publisher.aclose())
    await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    with pytest.raises(Unavailable):
        await future
    assert not [task for task in asyncio.all_tasks() if "publisher" in task.get_name()]


async def test_forgotten_futures_are_not_complained_about(
    flux: FluxStub, caplog: pytest.LogCaptureFixture
) -> None:
    flux.refusals["bad"] = FailedPrecondition("no")
    async with Publisher(flux.address, source="me") as publisher:
        publisher.enqueue(made(id="bad"))
        await settle(publisher)
    async with Publisher("127.0.0.1:1", source="me", close_timeout_s=0) as publisher:
        publisher.enqueue(made())
    gc.collect()
    assert "never retrieved" not in caplog.text


async def test_flush_is_bounded_and_says_how_much_is_left(flux: FluxStub) -> None:
    flux.gate.clear()
    async with Publisher(flux.address, source="me") as publisher:
        await publisher.flush()
        publisher.enqueue(made())
        with pytest.raises(DeadlineExceeded, match=r"1 events .* after 0\.05 s"):
            await publisher.flush(timeout_s=0.05)
        flux.gate.set()
        await publisher.flush(timeout_s=10)


async def test_flush_does_not_wait_for_later_events(flux: FluxStub) -> None:
    async with Publisher(flux.address, source="me", batches_in_flight=1) as publisher:
        await stuffed(flux, publisher, 1)
        flush = asyncio.create_task(publisher.flush())
        await asyncio.sleep(0)
        publisher.enqueue(made(id="later"))
        flux.publish_script.append(Hang())
        flux.gate.set()
        await asyncio.wait_for(flush, 10)
        assert publisher.statistics().buffered_events == 1
        publisher._close_timeout_s = 0.0


def test_all_bad_settings_are_named_at_once() -> None:
    with pytest.raises(InvalidArgument) as caught:
        Publisher(
            "127.0.0.1:1",
            source="",
            buffer_events=0,
            batch_events=5000,
            batch_bytes=2**30,
            batches_in_flight=0,
            ack_timeout_s=0,
            when_full="explode",  # type: ignore[arg-type]
        )
    assert len(caught.value.violations) == 7


# -- under load


async def test_restarts_under_load_lose_and_double_nothing(flux: FluxStub) -> None:
    """Four publishers, Flux killed and brought back on its port three times."""
    acknowledged: dict[str, list[str]] = {}
    done = asyncio.Event()

    async def load(source: str) -> None:
        mine = acknowledged.setdefault(source, [])
        number = 0
        async with Publisher(flux.address, source=source) as publisher:
            while not done.is_set():
                ids = [f"{source}-{number + k}" for k in range(20)]
                number += 20
                results = [publisher.enqueue(made(source=source, id=i)) for i in ids]
                for event_id, result in zip(ids, results, strict=True):
                    await result
                    mine.append(event_id)

    publishers = [asyncio.create_task(load(f"p{n}")) for n in range(4)]
    for _ in range(3):
        stored = len(flux.log)
        while len(flux.log) < stored + 500:
            flux.received.clear()
            await asyncio.wait_for(flux.received.wait(), 20)
        await flux.stop()
        await flux.start()
    done.set()
    await asyncio.wait_for(asyncio.gather(*publishers), 20)
    for source, ids in acknowledged.items():
        assert [event.id for event in flux.log if event.source == source] == ids


async def test_unreadable_refusal_details_still_answer_the_publisher(flux: FluxStub) -> None:
    flux.garbled.add("bad")
    async with Publisher(flux.address, source="me") as publisher:
        with pytest.raises(Internal, match="unreadable details: garbled"):
            await publisher.publish("a.b", id="bad")


async def test_errors_say_why_flux_is_away() -> None:
    async with Publisher(
        "127.0.0.1:1", source="me", ack_timeout_s=0.3, close_timeout_s=0
    ) as publisher:
        with pytest.raises(DeadlineExceeded, match=r"127\.0\.0\.1:1 within 0\.3 s \(UNAVAILABLE"):
            await publisher.publish("a.b")


async def test_defect_within_fails_what_is_pending_and_the_publisher_goes_on(
    flux: FluxStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Publisher(flux.address, source="me") as publisher:
        with monkeypatch.context() as broken:
            broken.setattr(publisher._stream._dialler, "_channel", None)
            with pytest.raises(Internal, match="the publisher failed"):
                await publisher.publish("a.b", id="one")
        assert (await publisher.publish("a.b", id="one")).sequence == 1


async def test_who_waited_behind_one_that_gave_up_comes_in(flux: FluxStub) -> None:
    async with Publisher(
        flux.address, source="me", buffer_bytes=2_000, ack_timeout_s=0.4, close_timeout_s=0
    ) as publisher:
        await stuffed(flux, publisher, 1)
        large = asyncio.create_task(publisher.publish("a.large", {"x": "y" * 1_900}))
        await asyncio.sleep(0.05)
        small = asyncio.create_task(publisher.publish("a.small"))
        with pytest.raises(ResourceExhausted):
            await large
        with pytest.raises(DeadlineExceeded):  # it was let in, and only Flux is late
            await small


async def test_many_are_published_in_order_and_share_what_they_have_in_common(
    flux: FluxStub,
) -> None:
    async with Publisher(flux.address, source="me", batch_events=64) as publisher:
        cause = new_event("a", source="other", correlation_id="order-7")
        with handling(cause):
            results = await publisher.publish_many(
                "a.b", [{"n": n} for n in range(150)], headers={"k": "v"}
            )
            alone = await publisher.publish_many("a.c", [None], ids=["mine"])
        assert await publisher.publish_many("a.b", []) == []
        statistics = publisher.statistics()
    assert [result.sequence for result in results] == list(range(1, 151))
    assert [result.sequence for result in alone] == [151]
    assert [fields_of(event)["n"] for event in flux.log[:150]] == list(range(150))
    assert len(set(flux.ids)) == 151
    assert flux.ids[150] == "mine"
    for event in flux.log[:150]:
        assert event.HasField("time")
        like = new_event(
            "a.b",
            event.payload,
            source="me",
            id=event.id,
            time=event.time,
            headers={"k": "v"},
            cause=cause,
        )
        like.sequence = event.sequence
        assert event == like
    assert statistics.published == 151
    assert statistics.buffered_events == statistics.buffered_bytes == 0


async def test_of_many_those_that_are_refused_are_told_and_the_others_are_stored(
    flux: FluxStub,
) -> None:
    flux.refusals["2"] = FailedPrecondition("no", reason="EXPIRED")
    async with Publisher(flux.address, source="me") as publisher:
        with pytest.raises(FailedPrecondition, match="1 of 4 events") as told:
            await publisher.publish_many("a.b", [None] * 4, ids=["1", "2", "3", "4"])
        assert told.value.reason == "EXPIRED"
        flux.refusals.clear()
        again = await publisher.publish_many("a.b", [None] * 4, ids=["1", "2", "3", "4"])
        statistics = publisher.statistics()
    assert flux.ids == ["1", "3", "4", "2"]
    assert [result.duplicate for result in again] == [True, False, True, True]
    assert (statistics.published, statistics.refused, statistics.duplicates) == (4, 1, 3)


async def test_one_that_is_refused_among_many_holds_up_nothing_behind_it(flux: FluxStub) -> None:
    flux.refusals["12"] = FailedPrecondition("no", reason="EXPIRED")
    async with Publisher(
        flux.address, source="me", batch_events=10, batches_in_flight=1
    ) as publisher:
        with pytest.raises(FailedPrecondition, match=r"1 of 10 events.*payloads\[12\]: no"):
            await publisher.publish_many("a", [None] * 40, ids=[str(n) for n in range(40)])
    assert flux.ids == [str(n) for n in range(40) if n != 12]


async def test_many_are_made_without_holding_up_the_loop(flux: FluxStub) -> None:
    turns = 0
    async with Publisher(flux.address, source="me", batch_events=10) as publisher:
        many = asyncio.create_task(publisher.publish_many("a", [None] * 1000))
        while not publisher.statistics().buffered_events:
            await asyncio.sleep(0)
            turns += 1
        await many
    assert turns >= 99


async def test_many_that_break_the_contract_are_not_sent(flux: FluxStub) -> None:
    async with Publisher(flux.address, source="me") as publisher:
        with pytest.raises(InvalidArgument, match="subject"):
            await publisher.publish_many("A B", [None])
        with pytest.raises(InvalidArgument, match=r"ids\[1\]"):
            await publisher.publish_many("a", [None, None], ids=["x", ""])
        with pytest.raises(InvalidArgument, match="1 ids for 2 payloads"):
            await publisher.publish_many("a", [None, None], ids=["x"])
        with pytest.raises(InvalidArgument, match=r"ids\[1\]"):
            await publisher.publish_many("a", [None, None], ids=["x", 2])  # type: ignore[list-item]
        with pytest.raises(InvalidArgument, match=r"payloads\[1\]"):
            await publisher.publish_many("a", [None, {"n": object()}])
        with pytest.raises(InvalidArgument, match=r"payloads\[2\].* bytes encoded"):
            await publisher.publish_many("a", [None, None, {"n": "x" * 2**20}])
    with pytest.raises(FailedPrecondition, match="closed"):
        await publisher.publish_many("a", [None])
    assert flux.log == []


async def test_many_are_sent_again_after_a_break_and_stored_once(flux: FluxStub) -> None:
    flux.publish_script += [Break(stored=True), Break()]
    async with Publisher(flux.address, source="me", batch_events=10) as publisher:
        results = await publisher.publish_many("a", [{"n": n} for n in range(35)])
        retried = publisher.statistics().retried
    assert [fields_of(event)["n"] for event in flux.log] == list(range(35))
    assert [result.sequence for result in results] == list(range(1, 36))
    assert retried >= 20
    assert retried % 5 == 0, "parcels are whole"


async def test_many_whose_publisher_gives_up_are_taken_back_where_they_were_not_sent(
    flux: FluxStub,
) -> None:
    flux.publish_script += [Hang()]
    async with Publisher(
        flux.address, source="me", batch_events=10, batches_in_flight=1, close_timeout_s=0.1
    ) as publisher:
        many = asyncio.create_task(publisher.publish_many("a", [None] * 30))
        await flux.received.wait()
        many.cancel()
        with pytest.raises(asyncio.CancelledError):
            await many
        assert publisher.statistics().buffered_events == 10


async def test_flux_that_stays_silent_is_given_more_time_with_each_stream(flux: FluxStub) -> None:
    """What was sent to it comes once more each time: that must not keep a slow one slow."""
    flux.publish_script += [Hang(), Hang(), Hang()]
    async with Publisher(
        flux.address, source="me", ack_timeout_s=0.2, close_timeout_s=0
    ) as publisher:
        with pytest.raises(DeadlineExceeded, match='event mine on "a"') as told:
            await publisher.publish_many("a", [None], ids=["mine"])
        assert told.value.metadata["event_id"] == "mine"
        while flux.publish_streams < 3:
            await asyncio.sleep(0.01)
        assert "did not answer for 0.4 s" in publisher._stream.trouble


async def test_answers_that_came_while_the_loop_stood_still_are_heard_first(
    flux: FluxStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    time, stood_still_s = loop.time, 0.0
    monkeypatch.setattr(loop, "time", lambda: time() + stood_still_s)
    flux.publish_script += [Hang()]
    async with Publisher(flux.address, source="me", close_timeout_s=0) as publisher:
        late = asyncio.create_task(publisher.publish("a"))
        await flux.received.wait()
        stood_still_s = 60.0
        for _ in range(3):
            await asyncio.sleep(0)
        assert not late.done(), "its answer may lie unread"
        assert publisher.statistics().reconnects == 0
        stood_still_s = 120.0
        with pytest.raises(DeadlineExceeded):
            await late
