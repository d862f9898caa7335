"""The Subscriber over real gRPC, against a Flux that breaks, falls silent and comes back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

import grpc
import pytest

from aither.flux.v1.event_pb2 import Event
from aither.flux.v1.flux_service_pb2 import (
    CLOSING_REASON_DRAINING,
    CLOSING_REASON_STOP_REACHED,
    CLOSING_REASON_TOO_SLOW,
    GAP_REASON_TRIMMED,
    CaughtUp,
    Closing,
    FellBehind,
    Gap,
    Progress,
    SlowPolicy,
    SubscribeRequest,
    SubscribeResponse,
)
from aither_sdk.errors import (
    AitherError,
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    OutOfRange,
    PermissionDenied,
    ResourceExhausted,
    TooSlow,
    Unavailable,
    Unimplemented,
)
from aither_sdk.events import current_event
from aither_sdk.subscribing.arriving import Events
from aither_sdk.subscribing.subscriber import (
    EARLIEST,
    LAST_PER_SUBJECT,
    Position,
    Subscriber,
    SubscriberState,
    after,
)
from tests.sdk.flux_stub import FluxStub, made, scene, stored
from tests.stopwatch import Stopwatch


@pytest.fixture
async def flux() -> AsyncIterator[FluxStub]:
    async with FluxStub() as stub:
        yield stub


async def taken(subscriber: Subscriber, count: int) -> list[int]:
    """The next sequences."""
    return [(await anext(subscriber)).sequence for _ in range(count)]


async def until(condition: Callable[[], bool]) -> None:
    """Waits for what other tasks bring about."""
    async with asyncio.timeout(20):
        while not condition():  # conditions of any kind
            await asyncio.sleep(0.005)


def events(*sequences: int) -> SubscribeResponse:
    return SubscribeResponse(events=stored(*sequences))


async def test_new_events_come_in_order_and_only_those_that_match(flux: FluxStub) -> None:
    await flux.append(made("a.old"))
    async with Subscriber(flux.address, ["a.*"]) as subscriber:
        await subscriber.until_started(timeout_s=10)
        await flux.append(made("a.x"), made("b.x"), made("a.y"))
        assert await taken(subscriber, 2) == [2, 4]
        assert subscriber.position == Position("epoch-1", 2)


async def test_request_says_all_that_was_asked(flux: FluxStub) -> None:
    async with Subscriber(
        flux.address,
        ["a.>"],
        start=after(7, "epoch-1"),
        client_name="me",
        heartbeat_s=20,
        exclude_sources=["me"],
        max_batch_events=9,
        stop_sequence=100,
    ) as subscriber:
        await subscriber.until_started(timeout_s=10)
    request = flux.subscribe_requests[0]
    assert (list(request.filters), request.after_sequence) == (["a.>"], 7)
    assert (request.resume_epoch, request.client_name) == ("epoch-1", "me")
    assert (request.heartbeat_interval.seconds, request.max_batch_events) == (20, 9)
    assert (list(request.exclude_sources), request.stop_sequence) == (["me"], 100)


async def test_event_is_handled_when_the_next_is_asked_for(flux: FluxStub) -> None:
    flux.scenes.append(scene(flux.started(), events(1, 2, 3)))
    async with Subscriber(flux.address) as subscriber:
        assert subscriber.position == Position("", 0)
        for expected in (0, 1, 2):
            await anext(subscriber)
            assert subscriber.position.sequence == expected
        assert subscriber.statistics().handled == 2
        waiting = asyncio.create_task(subscriber.__anext__())
        await until(lambda: subscriber.position.sequence == 3)
        assert subscriber.statistics().handled == 3
        waiting.cancel()


async def test_batches_come_as_they_were_sent(flux: FluxStub) -> None:
    flux.scenes.append(scene(flux.started(), events(1, 2, 3), events(4)))
    async with Subscriber(flux.address) as subscriber:
        batches = subscriber.batches()
        first = await anext(batches)
        assert [event.sequence for event in first] == [1, 2, 3]
        assert first[-1].id == "e3"
        assert subscriber.position.sequence == 0
        assert current_event() is None
        assert len(await anext(batches)) == 1
        assert subscriber.position.sequence == 3
        assert subscriber.statistics().handled == 3


async def test_batches_that_nobody_looks_into_are_not_decoded(
    flux: FluxStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = 0

    def look(events: Events) -> Sequence[Event]:
        nonlocal looked
        looked += 1
        return decode(events)

    decode = Events._all
    monkeypatch.setattr(Events, "_all", look)
    flux.scenes.append(scene(flux.started(), events(1, 2, 3), events(5, 9), events(10)))
    async with Subscriber(flux.address) as subscriber:
        batches = subscriber.batches()
        assert [len(await anext(batches)) for _ in range(2)] == [3, 2]
        assert looked == 0
        assert [event.id for event in await anext(batches)] == ["e10"]
        assert (subscriber.position.sequence, looked) == (9, 1)


async def test_change_between_events_and_batches_leaves_nothing_out(flux: FluxStub) -> None:
    flux.scenes.append(scene(flux.started(), events(1, 2, 3), events(4, 5)))
    async with Subscriber(flux.address) as subscriber:
        assert await taken(subscriber, 1) == [1]
        async for batch in subscriber.batches():
            assert [event.sequence for event in batch] == [2, 3]
            assert subscriber.position.sequence == 1
            break
        assert await taken(subscriber, 2) == [4, 5]
        assert subscriber.statistics().handled == 4


async def test_handled_event_is_the_cause_until_the_next_is_awaited(flux: FluxStub) -> None:
    flux.scenes.append(scene(flux.started(), events(1, 2)))
    async with Subscriber(flux.address, stop_sequence=2) as subscriber:
        async for event in subscriber:
            cause = current_event()
            assert cause is not None
            assert cause.id == event.id
            if event.sequence == 2:
                break
    assert current_event() is None


async def test_broken_stream_resumes_with_position_and_epoch(flux: FluxStub) -> None:
    flux.scenes.append(scene(flux.started(3), events(4, 5), Unavailable("gone")))
    flux.scenes.append(scene(flux.started(5), events(5, 6)))
    async with Subscriber(flux.address, start=after(3, "epoch-1")) as subscriber:
        assert await taken(subscriber, 3) == [4, 5, 6]
        statistics = subscriber.statistics()
    assert flux.subscribe_requests[1].after_sequence == 5
    assert flux.subscribe_requests[1].resume_epoch == "epoch-1"
    assert (statistics.duplicates, statistics.reconnects) == (1, 1)


async def test_break_before_the_first_event_resumes_where_it_began(flux: FluxStub) -> None:
    flux.scenes.append(scene(flux.started(41), Unavailable("gone")))
    flux.scenes.append(scene(flux.started(41), events(42)))
    async with Subscriber(flux.address) as subscriber:
        assert await taken(subscriber, 1) == [42]
    assert flux.subscribe_requests[1].after_sequence == 41


async def test_bookmarks_move_the_position_when_nothing_is_in_hand(flux: FluxStub) -> None:
    flux.scenes.append(
        scene(flux.started(1), events(2), SubscribeResponse(progress=Progress(sequence=50)))
    )
    async with Subscriber(flux.address) as subscriber:
        await anext(subscriber)
        await until(lambda: subscriber._cursor.position.sequence == 50)
        assert subscriber.position.sequence == 1, "2 is still in hand"
        waiting = asyncio.create_task(subscriber.__anext__())
        await until(lambda: subscriber.position.sequence == 50)
        waiting.cancel()


async def test_silent_stream_is_dialled_again(flux: FluxStub) -> None:
    flux.scenes.append(scene(flux.started(), events(1)))
    flux.scenes.append(scene())
    flux.scenes.append(scene(flux.started(), events(2)))
    states: list[SubscriberState] = []
    async with Subscriber(
        flux.address, start=EARLIEST, silence_timeout_s=0.2, on_state=states.append
    ) as subscriber:
        assert await taken(subscriber, 2) == [1, 2]
    assert any("silent for 0.2 s" in state.reason for state in states)
    assert flux.subscribe_requests[2].after_sequence == 1


async def test_heartbeats_keep_a_quiet_stream(flux: FluxStub) -> None:
    beats = [SubscribeResponse(progress=Progress(sequence=n)) for n in range(100)]

    async def quiet(_: SubscribeRequest) -> AsyncIterator[SubscribeResponse]:
        yield flux.started()
        for beat in beats:
            yield beat
            await asyncio.sleep(0.02)

    flux.scenes.append(quiet)
    async with Subscriber(flux.address, silence_timeout_s=1.0) as subscriber:
        waiting = asyncio.create_task(subscriber.__anext__())
        await until(lambda: subscriber.position.sequence >= 60)
        waiting.cancel()
        assert subscriber.statistics().reconnects == 0


async def test_peer_sent_cancel_is_a_broken_stream(flux: FluxStub) -> None:
    class CancelledByProxyError(AitherError):
        code = grpc.StatusCode.CANCELLED

    flux.scenes.append(scene(flux.started(), events(1), CancelledByProxyError("no")))
    flux.scenes.append(scene(flux.started(), events(2)))
    async with Subscriber(flux.address) as subscriber:
        assert await taken(subscriber, 2) == [1, 2]


async def test_draining_flux_is_left_quietly(flux: FluxStub) -> None:
    closing = SubscribeResponse(
        closing=Closing(reason=CLOSING_REASON_DRAINING, resume_sequence=8, epoch="epoch-1")
    )
    flux.scenes.append(scene(flux.started(), events(1), closing))
    flux.scenes.append(scene(flux.started(8), events(9)))
    states: list[SubscriberState] = []
    async with Subscriber(flux.address, on_state=states.append) as subscriber:
        assert await taken(subscriber, 2) == [1, 9]
    assert flux.subscribe_requests[1].after_sequence == 8
    assert "Flux is draining" in [state.reason for state in states]


async def test_passed_stop_sequence_ends_the_iteration(flux: FluxStub) -> None:
    closing = SubscribeResponse(
        closing=Closing(reason=CLOSING_REASON_STOP_REACHED, resume_sequence=3)
    )
    flux.scenes.append(scene(flux.started(), events(1, 2), closing))
    async with Subscriber(flux.address, stop_sequence=3) as subscriber:
        assert [event.sequence async for event in subscriber] == [1, 2]
        assert subscriber.position.sequence == 3
        assert [event async for event in subscriber] == []


async def test_gap_is_told_in_its_place(flux: FluxStub) -> None:
    gap = SubscribeResponse(gap=Gap(from_sequence=2, to_sequence=5, reason=GAP_REASON_TRIMMED))
    flux.scenes.append(scene(flux.started(), events(1), gap, events(6)))
    order: list[object] = []
    async with Subscriber(
        flux.address, on_gap=lambda gap: order.append((gap.from_sequence, gap.to_sequence))
    ) as subscriber:
        async for event in subscriber:
            order.append(event.sequence)
            if event.sequence == 6:
                break
        statistics = subscriber.statistics()
    assert order == [1, (2, 5), 6]
    assert (statistics.gaps, statistics.missed_events) == (1, 4)


async def test_what_on_gap_raises_ends_the_iteration(flux: FluxStub) -> None:
    gap = SubscribeResponse(gap=Gap(from_sequence=1, to_sequence=5, reason=GAP_REASON_TRIMMED))
    flux.scenes.append(scene(flux.started(), gap))

    def refuse(_: Gap) -> None:
        raise RuntimeError("cannot live with that")

    async with Subscriber(flux.address, on_gap=refuse) as subscriber:
        with pytest.raises(RuntimeError, match="cannot live"):
            await anext(subscriber)


async def test_snapshot_is_complete_only_after_it_was_handled(flux: FluxStub) -> None:
    await flux.append(made("s.a"), made("s.b"), made("s.a"))
    states: list[SubscriberState] = []
    async with Subscriber(
        flux.address, ["s.>"], start=LAST_PER_SUBJECT, on_state=states.append
    ) as subscriber:
        assert await taken(subscriber, 2) == [2, 3]
        before = subscriber.state
        assert before.connected
        assert not before.snapshot_complete
        waiting = asyncio.create_task(subscriber.__anext__())
        await until(lambda: subscriber.state.caught_up)
        assert subscriber.state.snapshot_complete
        assert subscriber.position.sequence == 3
        await flux.append(made("s.c"))
        assert (await waiting).sequence == 4
    assert [state.snapshot_complete for state in states] == sorted(
        state.snapshot_complete for state in states
    )
    assert states[0].connected
    assert (states[-1].connected, states[-1].reason) == (False, "closed")


async def test_falling_behind_and_catching_up_are_told(flux: FluxStub) -> None:
    flux.scenes.append(
        scene(
            flux.started(),
            SubscribeResponse(caught_up=CaughtUp()),
            events(1),
            SubscribeResponse(fell_behind=FellBehind(sequence=1, lag_events=70)),
            events(2),
        )
    )
    async with Subscriber(flux.address) as subscriber:
        assert subscriber.statistics().lag_events is None
        await anext(subscriber)
        live = subscriber.state
        await anext(subscriber)
        behind = subscriber.state
        assert (live.caught_up, behind.caught_up) == (True, False)
        assert subscriber.statistics().lag_events == 70


async def test_failing_on_state_stops_nothing(flux: FluxStub) -> None:
    flux.scenes.append(scene(flux.started(), events(1)))

    def fail(_: SubscriberState) -> None:
        raise RuntimeError("a bug in the callback")

    async with Subscriber(flux.address, on_state=fail) as subscriber:
        assert await taken(subscriber, 1) == [1]


async def test_slow_handler_reads_one_message_ahead_and_no_more(flux: FluxStub) -> None:
    flux.scenes.append(scene(flux.started(), *(events(n) for n in range(1, 50))))
    async with Subscriber(flux.address) as subscriber:
        await anext(subscriber)
        await until(lambda: subscriber.statistics().received == 2)
        for _ in range(20):
            await asyncio.sleep(0.002)
        assert subscriber.statistics().received == 2
        assert await taken(subscriber, 48) == list(range(2, 50))


# -- another log


async def test_another_log_is_raised_by_default(flux: FluxStub) -> None:
    flux.scenes.append(scene(flux.started(), events(1), Unavailable("gone")))
    async with Subscriber(flux.address) as subscriber:
        assert await taken(subscriber, 1) == [1]
        flux.wipe("epoch-2")
        with pytest.raises(FailedPrecondition) as caught:
            await anext(subscriber)
        assert caught.value.reason == "EPOCH_MISMATCH"
        with pytest.raises(FailedPrecondition):
            await anext(subscriber)
        assert subscriber.position == Position("epoch-1", 1)


async def test_another_log_can_be_taken_from_its_beginning(flux: FluxStub) -> None:
    await flux.append(*(made() for _ in range(5)))
    states: list[SubscriberState] = []
    async with Subscriber(
        flux.address, start=after(3, "epoch-0"), on_new_epoch="restart", on_state=states.append
    ) as subscriber:
        assert await taken(subscriber, 5) == [1, 2, 3, 4, 5]
        assert subscriber.position == Position("epoch-1", 4)
    assert states[-1].epoch == "epoch-1"


# -- what cannot be mended


@pytest.mark.parametrize(
    "error",
    [
        InvalidArgument("a bad filter"),
        Unimplemented("no such thing"),
        PermissionDenied("not you"),
        OutOfRange("beyond the end"),
    ],
)
async def test_permanent_error_is_raised_after_what_came_before(
    flux: FluxStub, error: AitherError
) -> None:
    flux.scenes.append(scene(flux.started(), events(1), error))
    async with Subscriber(flux.address) as subscriber:
        assert await taken(subscriber, 1) == [1]
        for _ in range(2):
            with pytest.raises(type(error), match=error.message):
                await anext(subscriber)
        assert not subscriber.state.connected
        assert error.message in subscriber.state.reason
    assert len(flux.subscribe_requests) == 1


async def test_busy_flux_is_asked_again_when_it_says(flux: FluxStub) -> None:
    flux.scenes.append(scene(ResourceExhausted("too many subscribers", retry_after_s=0.3)))
    flux.scenes.append(scene(flux.started(), events(1)))
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    async with Subscriber(flux.address) as subscriber:
        assert await taken(subscriber, 1) == [1]
    assert loop.time() - began_s >= 0.3


def test_every_bad_filter_and_setting_is_named_before_dialling() -> None:
    with pytest.raises(InvalidArgument) as caught:
        Subscriber(
            "127.0.0.1:1",
            ["Bad", "a.>.b"],
            heartbeat_s=0,
            exclude_sources=["x"] * 17,
            max_batch_events=5000,
            client_name="x" * 129,
        )
    fields = [violation.field for violation in caught.value.violations]
    assert fields[:2] == ["filters[0]", "filters[1]"]
    assert sorted(fields[2:]) == [
        "client_name",
        "exclude_sources",
        "heartbeat_s",
        "max_batch_events",
    ]


async def test_until_started_is_bounded_and_says_why() -> None:
    async with Subscriber("127.0.0.1:1") as subscriber:
        with pytest.raises(DeadlineExceeded, match=r"did not answer within 0\.3 s.*UNAVAILABLE"):
            await subscriber.until_started(timeout_s=0.3)


async def test_until_started_raises_what_makes_it_impossible(flux: FluxStub) -> None:
    flux.scenes.append(scene(PermissionDenied("not you")))
    async with Subscriber(flux.address) as subscriber:
        with pytest.raises(PermissionDenied):
            await subscriber.until_started(timeout_s=10)


# -- iterating, closing, cancelling


async def test_two_iterations_at_once_are_refused(flux: FluxStub) -> None:
    flux.scenes.append(scene(flux.started(), events(1, 2, 3)))
    async with Subscriber(flux.address) as subscriber:
        async for _ in subscriber:
            with pytest.raises(FailedPrecondition, match="iterated already"):
                async for _ in subscriber:
                    pass
            with pytest.raises(FailedPrecondition, match="iterated already"):
                await anext(subscriber)
            with pytest.raises(FailedPrecondition, match="iterated already"):
                subscriber.batches()
            break
        async for event in subscriber:
            assert event.sequence == 2
            break


async def test_two_waiting_tasks_are_refused(flux: FluxStub) -> None:
    async with Subscriber(flux.address) as subscriber:
        first = asyncio.create_task(subscriber.__anext__())
        await subscriber.until_started(timeout_s=10)
        with pytest.raises(FailedPrecondition, match="iterated already"):
            await anext(subscriber)
        first.cancel()


async def test_subscriber_that_is_not_open_says_so() -> None:
    with pytest.raises(FailedPrecondition, match="async with"):
        await anext(Subscriber("127.0.0.1:1"))


async def test_cancelled_wait_loses_nothing_and_keeps_the_stream(flux: FluxStub) -> None:
    async with Subscriber(flux.address) as subscriber:
        await subscriber.until_started(timeout_s=10)
        for number in range(1, 30):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(subscriber), 0.001)
            await flux.append(made())
            assert (await anext(subscriber)).sequence == number
    assert len(flux.subscribe_requests) == 1


async def test_close_while_blocked_ends_the_loop(flux: FluxStub) -> None:
    async with Subscriber(flux.address) as subscriber:

        async def follow() -> list[int]:
            return [event.sequence async for event in subscriber]

        following = asyncio.create_task(follow())
        await subscriber.until_started(timeout_s=10)
        await subscriber.aclose()
        assert await asyncio.wait_for(following, 10) == []
        await subscriber.aclose()
    assert not [task for task in asyncio.all_tasks() if "subscriber" in task.get_name()]


async def test_close_in_the_middle_of_a_message_ends_the_loop_there(flux: FluxStub) -> None:
    """A drain must not wait for the thousands of events that a message may hold."""
    flux.scenes.append(scene(flux.started(), events(*range(1, 101)), asyncio.Event()))
    async with Subscriber(flux.address) as subscriber:
        seen = []
        async for event in subscriber:
            seen.append(event.sequence)
            if event.sequence == 3:
                await subscriber.aclose()
    assert seen == [1, 2, 3]
    assert subscriber.position == Position("epoch-1", 3)
    assert subscriber.statistics().handled == 3


async def test_close_before_opening_makes_an_iteration_without_events(flux: FluxStub) -> None:
    await flux.append(made())
    subscriber = Subscriber(flux.address, start=EARLIEST)
    await subscriber.aclose()
    async with subscriber:
        assert [event.sequence async for event in subscriber] == []
        with pytest.raises(Unavailable, match="closed"):
            await subscriber.until_started(timeout_s=10)
    assert not flux.subscribe_requests


async def test_close_while_dialling_in_vain_is_quick() -> None:
    async with Subscriber("127.0.0.1:1") as subscriber:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(subscriber), 0.2)
        watch = Stopwatch()
    assert watch.calm_s < 1


async def test_restarts_under_load_leave_no_gap_and_no_double(flux: FluxStub) -> None:
    """Flux killed and brought back on its port three times while events are appended."""
    seen: list[int] = []

    async def follow() -> None:
        async with Subscriber(flux.address, start=EARLIEST) as subscriber:
            async for event in subscriber:
                seen.append(event.sequence)
                if event.sequence == 4000:
                    return

    following = asyncio.create_task(follow())
    for round_number in range(1, 5):
        for _ in range(100):
            await flux.append(*(made() for _ in range(10)))
            await asyncio.sleep(0)
        if round_number < 4:
            await until(lambda: len(seen) > (round_number - 1) * 1000)  # noqa: B023
            await flux.stop()
            await flux.start()
    await asyncio.wait_for(following, 20)
    assert seen == list(range(1, 4001))


async def test_defect_within_is_raised_not_a_silent_end(
    flux: FluxStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    subscriber = Subscriber(flux.address)
    monkeypatch.setattr(subscriber._cursor, "next_start", None)
    async with subscriber:
        with pytest.raises(Internal, match="the subscriber failed: TypeError"):
            await anext(subscriber)


async def test_slow_subscriber_that_asked_for_it_is_told_with_its_place(flux: FluxStub) -> None:
    closing = Closing(reason=CLOSING_REASON_TOO_SLOW, resume_sequence=3, epoch="epoch-1")
    flux.scenes.append(scene(flux.started(), events(1, 2, 3), SubscribeResponse(closing=closing)))
    async with Subscriber(flux.address, start=EARLIEST, slow_policy="disconnect") as subscriber:
        assert await taken(subscriber, 3) == [1, 2, 3]
        with pytest.raises(TooSlow, match="slow policy is DISCONNECT") as caught:
            await anext(subscriber)
        assert caught.value.metadata == {"epoch": "epoch-1", "sequence": "3"}
        assert subscriber.position == Position("epoch-1", 3)
    assert flux.subscribe_requests[0].slow_policy == SlowPolicy.SLOW_POLICY_DISCONNECT


async def test_damaged_log_is_told_once_with_what_to_do(flux: FluxStub) -> None:
    damaged = DataLoss("record 3 is damaged", metadata={"sequence": "3"})
    flux.scenes.append(scene(flux.started(), events(1, 2), damaged))
    async with Subscriber(flux.address, start=EARLIEST) as subscriber:
        assert await taken(subscriber, 2) == [1, 2]
        with pytest.raises(DataLoss, match="aither flux repair") as caught:
            await anext(subscriber)
        assert caught.value.metadata["sequence"] == "3"
    assert len(flux.subscribe_requests) == 1  # not asked for ever


async def test_subscriber_goes_on_at_the_next_node_where_it_was() -> None:
    async with FluxStub() as first, FluxStub() as second:
        for stub in (first, second):
            await stub.append(*[made(f"a.n{n}", id=f"e{n}") for n in range(4)])
        addresses = f"{first.address},{second.address}"
        async with Subscriber(addresses, ["a.*"], start=EARLIEST) as subscriber:
            assert await taken(subscriber, 2) == [1, 2]
            await first.stop()
            await second.append(made("a.more"))
            assert await taken(subscriber, 3) == [3, 4, 5]
            assert subscriber.address == second.address
        request = second.subscribe_requests[-1]
        assert (request.after_sequence, request.resume_epoch) == (4, "epoch-1")


async def test_node_that_is_late_to_hear_is_asked_again(flux: FluxStub) -> None:
    async with FluxStub() as late:
        flux.scenes.append(scene(flux.started(), events(1, 2), Unavailable("killed")))
        late.scenes.append(scene(OutOfRange("2 is beyond the end, which is 1")))
        flux.scenes.append(scene(flux.started(2), events(3)))
        async with Subscriber([flux.address, late.address], start=EARLIEST) as subscriber:
            assert await taken(subscriber, 3) == [1, 2, 3]
    assert len(late.subscribe_requests) == 1


async def test_unknown_slow_policy_is_refused_before_anything_is_dialled() -> None:
    with pytest.raises(InvalidArgument, match="must be one of catch_up, conflate, disconnect"):
        Subscriber("127.0.0.1:1", slow_policy="hurry")  # type: ignore[arg-type]


async def test_no_address_is_told() -> None:
    with pytest.raises(InvalidArgument, match="no address"):
        Subscriber(" , ")


async def test_a_close_that_is_cancelled_still_closes_the_channel() -> None:
    subscriber = Subscriber("127.0.0.1:1", ["a"])
    await subscriber.__aenter__()
    channel = subscriber._dialler.channel
    closing = asyncio.create_task(subscriber.aclose())
    await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert channel.get_state() is grpc.ChannelConnectivity.SHUTDOWN
