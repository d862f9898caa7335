"""The Worker over real gRPC, against a group that takes back, breaks, falls silent, comes back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from aither.flux.v1.event_pb2 import Event
from aither.flux.v1.flux_service_pb2 import ConsumeResponse, Delivery
from aither_sdk.consumers import new_consumer
from aither_sdk.errors import (
    AlreadyExists,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unavailable,
)
from aither_sdk.events import current_event, new_event
from aither_sdk.working.worker import Park, Retry, Worker, WorkerState, current_delivery
from tests.clock import FakeClock
from tests.sdk.flux_stub import made
from tests.sdk.group_stub import GroupStub
from tests.stopwatch import Stopwatch

GROUP = new_consumer("work", ["job.>"])
BRIEF = new_consumer("work", ["job.>"], ack_deadline_s=1.0)
KEPT = new_consumer("work", ["job.>"], ack_deadline_s=2.0)
"""For who must not lose a lease: a busy machine may take more than a second from a process."""
LEADERS = new_consumer("work", ["job.>"], exclusive=True, lease_s=1.0)
KEPT_LEADERS = new_consumer("work", ["job.>"], exclusive=True, lease_s=2.0)


@pytest.fixture
async def flux() -> AsyncIterator[GroupStub]:
    async with GroupStub() as stub:
        yield stub


async def until(condition: Callable[[], object], limit_s: float = 20) -> None:
    async with asyncio.timeout(limit_s):
        while not condition():  # brought about by other tasks
            await asyncio.sleep(0.005)


def jobs(count: int) -> list[Event]:
    return [made(f"job.n{n}") for n in range(count)]


class Hands:
    """A handler that waits until it is let go, and tells what happened to it."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.ended: list[int] = []
        self.cancelled: list[int] = []
        self.running = 0
        self.most = 0
        self.go = asyncio.Event()

    async def __call__(self, event: Event) -> None:
        self.begun.append(event.sequence)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self.go.wait()
            self.ended.append(event.sequence)
        except asyncio.CancelledError:
            self.cancelled.append(event.sequence)
            raise
        finally:
            self.running -= 1


async def test_every_event_is_handled_and_acknowledged_once(flux: GroupStub) -> None:
    handled = []

    async def handle(event: Event) -> None:
        handled.append(event.sequence)

    async with Worker(flux.address, GROUP, handle) as worker:
        flux.add(*jobs(200), made("other"))
        await until(lambda: len(flux.acked) == 200)
        assert sorted(handled) == sorted(flux.acked) == list(range(1, 201))
        statistics = worker.statistics()
    assert (statistics.received, statistics.acked, statistics.running) == (200, 200, 0)
    assert flux.half_closes == 1


async def test_no_more_than_its_concurrency_is_ever_taken(flux: GroupStub) -> None:
    hands = Hands()
    async with Worker(flux.address, GROUP, hands, concurrency=3) as worker:
        flux.add(*jobs(20))
        await until(lambda: hands.running == 3)
        await asyncio.sleep(0.1)  # for what must not come
        assert flux.deliveries == flux.most_out == 3 == worker.statistics().running
        hands.go.set()
        await until(lambda: len(flux.acked) == 20)
    assert hands.most == flux.most_out == 3


async def test_prefetched_events_wait_for_their_turn_and_keep_their_leases(flux: GroupStub) -> None:
    hands = Hands()
    async with Worker(flux.address, KEPT, hands, concurrency=1, prefetch_events=2) as worker:
        flux.add(*jobs(3))
        await until(lambda: worker.statistics().waiting == 2)
        await asyncio.sleep(2.4)  # longer than the ack deadline
        hands.go.set()
        await until(lambda: len(flux.acked) == 3)
    assert flux.deliveries == 3


async def test_bytes_in_hand_are_bounded(flux: GroupStub) -> None:
    hands = Hands()
    async with Worker(flux.address, GROUP, hands, concurrency=10, window_bytes=2_500):
        flux.add(*[new_event("job.big", {"x": "y" * 1_000}, source="t") for _ in range(6)])
        await until(lambda: hands.running == 3)  # the third begins inside the window
        await asyncio.sleep(0.1)  # for what must not come
        assert flux.deliveries == 3
        hands.go.set()
        await until(lambda: len(flux.acked) == 6)


async def test_a_running_handler_keeps_its_lease(flux: GroupStub) -> None:
    hands = Hands()
    async with Worker(flux.address, KEPT, hands):
        flux.add(*jobs(1))
        await until(lambda: hands.running)
        await asyncio.sleep(2.4)  # longer than the ack deadline
        hands.go.set()
        await until(lambda: flux.acked)
    assert (hands.begun, hands.cancelled, flux.deliveries) == ([1], [], 1)
    assert flux.extends >= 2


async def test_raising_handlers_get_their_event_again_with_a_reason(flux: GroupStub) -> None:
    attempts = []

    async def handle(event: Event) -> None:
        delivery = current_delivery()
        assert delivery is not None
        assert delivery.event == event
        attempts.append(delivery.attempt)
        if delivery.attempt == 1:
            raise ValueError("the disk is on fire")
        if delivery.attempt == 2:
            raise Retry(0.25, "later")

    async with Worker(flux.address, GROUP, handle) as worker:
        flux.add(*jobs(1))
        await until(lambda: flux.acked)
        assert worker.statistics().redelivered == 2
        assert worker.statistics().nacked == 2
    assert attempts == [1, 2, 3]
    assert flux.nacks == [(1, None, "ValueError: the disk is on fire"), (1, 0.25, "later")]


async def test_park_and_the_classes_named_put_an_event_aside(flux: GroupStub) -> None:
    async def handle(event: Event) -> None:
        raise Park("no such customer") if event.sequence == 1 else KeyError("x" * 5_000)

    async with Worker(flux.address, GROUP, handle, park_on=(LookupError,)) as worker:
        flux.add(*jobs(2))
        await until(lambda: len(flux.parked) == 2)
        assert worker.statistics().parked == 2
    assert flux.parked[1] == "no such customer"
    assert flux.parked[2].startswith("KeyError: 'xxx")
    assert len(flux.parked[2]) == 1024


async def test_handler_is_cancelled_when_flux_takes_the_event_back(flux: GroupStub) -> None:
    hands = Hands()
    async with Worker(flux.address, GROUP, hands) as worker:
        flux.add(*jobs(1))
        await until(lambda: hands.running)
        flux.take_back(1)
        await until(lambda: hands.cancelled == [1])
        assert worker.statistics().lease_lost == 1
        hands.go.set()
        await until(lambda: flux.acked == [1])  # delivered again, handled again
    assert hands.begun == [1, 1]


async def test_a_refused_renewal_is_a_lost_lease(flux: GroupStub) -> None:
    hands = Hands()
    async with Worker(flux.address, BRIEF, hands) as worker:
        flux.add(*jobs(1))
        await until(lambda: hands.running)
        flux.take_back(1, tell=False)
        await until(lambda: hands.cancelled == [1])
        assert worker.statistics().lease_lost == 1


async def test_event_delivered_again_ends_the_older_handler_before_the_newer_begins(
    flux: GroupStub,
) -> None:
    hands = Hands()
    async with Worker(flux.address, GROUP, hands):
        flux.add(*jobs(1))
        await until(lambda: hands.running)
        flux.take_back(1, tell=False)
        flux.tasks[1].ready_s = 0
        await until(lambda: hands.begun == [1, 1])
        assert (hands.cancelled, hands.most) == ([1], 1)
        hands.go.set()
        await until(lambda: flux.acked == [1])


async def test_the_same_delivery_twice_is_handled_once(flux: GroupStub) -> None:
    flux.twice = True
    hands = Hands()
    async with Worker(flux.address, GROUP, hands, concurrency=4) as worker:
        flux.add(*jobs(4))
        await until(lambda: worker.statistics().duplicates == 4)
        hands.go.set()
        await until(lambda: len(flux.acked) == 4)
    assert sorted(hands.begun) == [1, 2, 3, 4]


async def test_handler_that_takes_too_long_is_cancelled_and_its_event_comes_again(
    flux: GroupStub,
) -> None:
    hands = Hands()
    async with Worker(flux.address, BRIEF, hands, max_handling_s=0.3):
        flux.add(*jobs(1))
        await until(lambda: hands.cancelled == [1])
        await until(lambda: flux.nacks)
        hands.go.set()
        await until(lambda: flux.acked == [1])
    assert flux.nacks[0][2] == "its handler took longer than 0.3 s"


async def test_broken_stream_is_joined_again_and_running_handlers_go_on(flux: GroupStub) -> None:
    hands = Hands()
    async with Worker(flux.address, GROUP, hands, concurrency=4) as worker:
        flux.add(*jobs(3))
        await until(lambda: hands.running == 3)
        flux.break_streams()
        await until(lambda: flux.deliveries == 6)  # the group hands them out once more
        hands.go.set()
        await until(lambda: len(flux.acked) == 3)
        statistics = worker.statistics()
    assert sorted(hands.begun) == [1, 2, 3]  # and not once more
    assert (statistics.reconnects, statistics.lease_lost) == (1, 0)
    assert flux.credits[:2] == [4, 1]  # three were still in hand


async def test_handled_event_whose_ack_was_lost_is_not_handled_twice(flux: GroupStub) -> None:
    handled = []

    async def handle(event: Event) -> None:
        handled.append(event.sequence)

    flux.swallow_acks = True
    async with Worker(flux.address, GROUP, handle) as worker:
        flux.add(*jobs(2))
        await until(lambda: worker.statistics().acked == 2)
        flux.swallow_acks = False
        flux.break_streams()
        await until(lambda: len(flux.acked) == 2)
        statistics = worker.statistics()
    assert sorted(handled) == [1, 2]
    assert (statistics.unconfirmed, statistics.spared) == (2, 2)


async def test_event_that_was_sought_back_is_handled_though_it_was_done(flux: GroupStub) -> None:
    handled = []

    async def handle(event: Event) -> None:
        handled.append(event.sequence)

    flux.swallow_acks = True
    async with Worker(flux.address, GROUP, handle):
        flux.add(*jobs(1))
        await until(lambda: handled == [1])
        flux.swallow_acks = False
        flux.tasks[1].attempts = 0  # as by SeekConsumer
        flux.break_streams()
        await until(lambda: flux.acked == [1])
    assert handled == [1, 1]


async def test_handler_is_cancelled_when_flux_stays_away_beyond_the_lease(flux: GroupStub) -> None:
    hands = Hands()
    async with Worker(flux.address, BRIEF, hands) as worker:
        flux.add(*jobs(1))
        await until(lambda: hands.running)
        await flux.stop()
        await asyncio.sleep(0.2)
        assert hands.running  # the lease lasts
        await until(lambda: hands.cancelled == [1])
        assert worker.statistics().lease_lost == 1
        await flux.start()
        hands.go.set()
        await until(lambda: flux.acked == [1])


async def test_silent_flux_is_left_and_what_it_never_heard_of_is_not_ours(flux: GroupStub) -> None:
    hands = Hands()
    states: list[WorkerState] = []
    silent_after: list[list[int]] = []

    def take(state: WorkerState) -> None:
        states.append(state)
        if "silent" in state.reason:
            silent_after.append(list(hands.cancelled))

    async with Worker(flux.address, BRIEF, hands, silence_timeout_s=2.5, on_state=take) as worker:
        flux.add(*jobs(1))
        await until(lambda: hands.running)
        flux.deaf = True  # a stopped Flux: nothing that is sent arrives
        await until(lambda: hands.cancelled == [1])
        await until(lambda: states and "silent" in states[-1].reason)
        assert silent_after == [[1]]  # the connection stood longer than the lease
        flux.deaf = False
        hands.go.set()
        await until(lambda: flux.acked == [1])
        assert worker.state == WorkerState(connected=True, reason="")


async def test_leaving_waits_for_handlers_acknowledges_and_gives_the_rest_back(
    flux: GroupStub,
) -> None:
    hands = Hands()
    async with Worker(
        flux.address, GROUP, hands, concurrency=2, prefetch_events=2, drain_timeout_s=10
    ) as worker:
        flux.add(*jobs(6))
        await until(lambda: worker.statistics().waiting == 2)
        asyncio.get_running_loop().call_later(0.1, hands.go.set)
    assert sorted(flux.acked) == sorted(hands.ended) == [1, 2]
    assert (hands.begun, worker.statistics().given_back, flux.half_closes) == ([1, 2], 2, 1)
    assert all(task.seat is None for task in flux.tasks.values())
    assert worker.statistics().unconfirmed == 0


async def test_drain_cancels_what_does_not_end_in_time_without_a_nack(flux: GroupStub) -> None:
    hands = Hands()
    async with Worker(flux.address, GROUP, hands, drain_timeout_s=0.1) as worker:
        flux.add(*jobs(2))
        await until(lambda: hands.running == 2)
    assert sorted(hands.cancelled) == [1, 2]
    assert (flux.acked, flux.nacks, worker.statistics().given_back) == ([], [], 2)


async def test_run_works_until_stop(flux: GroupStub) -> None:
    hands = Hands()
    hands.go.set()
    worker = Worker(flux.address, GROUP, hands)
    running = asyncio.create_task(worker.run())
    flux.add(*jobs(5))
    await until(lambda: len(flux.acked) == 5)
    worker.stop()
    await asyncio.wait_for(running, 5)


async def test_cancelled_run_drains(flux: GroupStub) -> None:
    hands = Hands()
    running = asyncio.create_task(Worker(flux.address, GROUP, hands).run())
    flux.add(*jobs(1))
    await until(lambda: hands.running)
    running.cancel()
    hands.go.set()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(running, 5)
    assert flux.acked == [1]


async def test_group_that_does_not_exist_is_told(flux: GroupStub) -> None:
    with pytest.raises(NotFound, match="no such group"):
        await asyncio.wait_for(Worker(flux.address, "nobody", Hands()).run(), 10)


async def test_group_with_other_settings_is_told(flux: GroupStub) -> None:
    async with Worker(flux.address, GROUP, Hands()) as worker:
        await worker.until_started(timeout_s=10)
    with pytest.raises(AlreadyExists, match="other settings"):
        async with Worker(flux.address, BRIEF, Hands()) as other:
            await other.until_started(timeout_s=10)


async def test_another_log_is_told(flux: GroupStub) -> None:
    flux.join_error = FailedPrecondition("another log", reason="EPOCH_MISMATCH")
    with pytest.raises(FailedPrecondition, match="another log"):
        await asyncio.wait_for(Worker(flux.address, GROUP, Hands()).run(), 10)


async def test_flux_may_come_after_its_worker() -> None:
    flux = GroupStub()
    await flux.start()
    await flux.stop()
    hands = Hands()
    hands.go.set()
    async with Worker(flux.address, GROUP, hands) as worker:
        with pytest.raises(DeadlineExceeded, match="was not joined within"):
            await worker.until_started(timeout_s=0.2)
        await flux.start()
        flux.add(*jobs(1))
        await until(lambda: flux.acked == [1])
    await flux.stop()


async def test_worker_moves_on_to_the_next_address() -> None:
    hands = Hands()
    hands.go.set()
    async with (
        GroupStub() as first,
        GroupStub() as second,
        Worker([first.address, second.address], GROUP, hands) as worker,
    ):
        await worker.until_started(timeout_s=10)
        assert (first.joins, second.joins) == (1, 0)
        second.consumer = first.consumer
        await first.stop()
        second.add(*jobs(1))
        await until(lambda: second.acked == [1])


async def test_bad_settings_are_named_together() -> None:
    with pytest.raises(InvalidArgument) as caught:
        Worker("127.0.0.1:1", GROUP, Hands(), concurrency=0, prefetch_events=-1, max_handling_s=0)
    fields = {violation.field for violation in caught.value.violations}
    assert fields == {"concurrency", "prefetch_events", "max_handling_s"}


# -- causes


async def test_all_that_a_handler_publishes_is_caused_by_its_event(flux: GroupStub) -> None:
    made_there: list[Event] = []

    async def child() -> None:
        await asyncio.sleep(0)
        made_there.append(new_event("job.child", source="t"))

    async def handle(event: Event) -> None:
        made_there.append(new_event("job.done", source="t"))
        async with asyncio.TaskGroup() as group:
            group.create_task(child())
        await asyncio.to_thread(lambda: made_there.append(new_event("job.thread", source="t")))

    cause = Event(id="c", source="s", subject="job.x", hops=2, correlation_id="talk")
    async with Worker(flux.address, GROUP, handle):
        flux.add(cause)
        await until(lambda: flux.acked)
        assert current_event() is None
    assert len(made_there) == 3
    for event in made_there:
        assert (event.causation_id, event.correlation_id, event.hops) == ("s/c", "talk", 3)


# -- exclusive groups


async def test_one_member_leads_and_another_takes_over_when_it_leaves(flux: GroupStub) -> None:
    told: list[tuple[str, bool, int]] = []
    hands = Hands()
    hands.go.set()

    def member(name: str) -> Worker:
        def tell(active: bool, epoch: int) -> None:
            told.append((name, active, epoch))

        return Worker(flux.address, LEADERS, hands, member=name, on_leadership=tell)

    one, two = member("one"), member("two")
    async with two:
        async with one:
            await until(lambda: one.leading or two.leading)
            leader, other = (one, two) if one.leading else (two, one)
            assert (leader.leader_epoch, leader.state.leading, other.leading) == (1, True, False)
            if leader is two:
                flux.depose()
                await until(lambda: one.leading)
        await until(lambda: two.leading)
        assert two.leader_epoch > one.leader_epoch
    assert not two.leading
    assert told[-1] == ("two", False, two.leader_epoch)


async def test_handlers_are_cancelled_when_leadership_is_lost(flux: GroupStub) -> None:
    hands = Hands()
    told: list[tuple[bool, int]] = []
    async with Worker(
        flux.address, LEADERS, hands, on_leadership=lambda a, e: told.append((a, e))
    ) as worker:
        flux.add(*jobs(1))
        await until(lambda: hands.running)
        flux.depose()
        await until(lambda: hands.cancelled == [1])
        assert told[:2] == [(True, 1), (False, 1)]
        await until(lambda: worker.statistics().lease_lost == 1)


async def test_leadership_lasts_while_heartbeats_are_answered(flux: GroupStub) -> None:
    told: list[bool] = []
    async with Worker(
        flux.address, KEPT_LEADERS, None, on_leadership=lambda a, _: told.append(a)
    ) as worker:
        await until(lambda: worker.leading)
        await asyncio.sleep(2.4)  # longer than a lease
        assert worker.leading
        assert told == [True]
        assert flux.heartbeats >= 2
        assert flux.credits[0] == 0  # it takes part in the election and gets no events


async def test_leader_that_is_cut_off_gives_up_before_its_lease_ends_at_flux(
    flux: GroupStub,
) -> None:
    hands = Hands()
    told: list[bool] = []
    async with Worker(
        flux.address, LEADERS, hands, on_leadership=lambda a, _: told.append(a)
    ) as worker:
        flux.add(*jobs(1))
        await until(lambda: hands.running and worker.leading)
        watch = Stopwatch()
        flux.deaf = True
        await until(lambda: not worker.leading)
        assert watch.calm_s < 1.1
        await until(lambda: hands.cancelled == [1] and told == [True, False])
        flux.deaf = False
        await until(lambda: worker.leading)  # joined anew
    assert told[:3] == [True, False, True]


@pytest.mark.parametrize("waits", [True, False])
async def test_no_handler_begins_after_a_stop_in_which_the_lease_ran_out(
    flux: GroupStub, waits: bool
) -> None:
    """The first thing that happens after the stop is that a place is free, or that an event comes;
    the leases were not looked at yet."""
    clock, led, go = FakeClock(), [], asyncio.Event()

    async def handle(event: Event) -> None:
        led.append((event.sequence, worker.leading))
        await go.wait()

    concurrency = 1 if waits else 2
    async with Worker(
        flux.address, LEADERS, handle, concurrency=concurrency, prefetch_events=1, clock=clock
    ) as worker:
        flux.add(*jobs(2 if waits else 1))
        await until(lambda: worker.statistics().received == (2 if waits else 1) and led)
        clock.advance(5)
        if waits:
            go.set()
        else:
            delivery = Delivery(ack_id="late", event=flux.tasks[1].event, attempt=1)
            delivery.event.sequence = 2
            worker._membership.heard(ConsumeResponse(deliveries=[delivery]))
            go.set()
        await until(lambda: worker.leader_epoch == 2)
        await until(lambda: len(flux.acked) == (2 if waits else 1))
    assert len(led) >= 2
    assert all(leading for _, leading in led), led


async def test_broken_stream_does_not_end_leadership_within_the_lease(flux: GroupStub) -> None:
    told: list[tuple[bool, int]] = []
    async with Worker(
        flux.address, LEADERS, None, on_leadership=lambda a, e: told.append((a, e))
    ) as worker:
        await until(lambda: worker.leading)
        flux.break_streams(Unavailable("moment"))
        assert worker.leading
        await until(lambda: worker.leader_epoch == 2)
    # Another life of the leadership: what was begun under the first one has ended.
    assert told == [(True, 1), (False, 1), (True, 2), (False, 2)]
