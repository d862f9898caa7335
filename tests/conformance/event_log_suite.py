"""The port `flux_svc/logs/base.py` as tests. A backend inherits the class and gives it a house."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from itertools import pairwise

import pytest
import pytest_asyncio

from aither.flux.v1.event_pb2 import Event
from aither.flux.v1.flux_service_pb2 import (
    DURABILITY_FSYNC,
    DURABILITY_MEMORY,
    GAP_REASON_COMPACTED,
    SubscribeResponse,
)
from aither_sdk.errors import FailedPrecondition, ResourceExhausted, Unavailable
from aither_sdk.subjects import FilterSet
from flux_svc.logs.base import Ability, EventLog, IndexEntry, Missing, Record, Succession
from flux_svc.sequencer import Appended, Expected
from tests.clock import FakeClock
from tests.conformance.log_house import (
    LogHouse,
    check,
    event,
    events,
    holes_of,
    ids,
    last,
    read_all,
    sequences,
)

SECOND_NS = 1_000_000_000


class EventLogSuite:
    @pytest.fixture(autouse=True)
    def _needed_abilities(self, request: pytest.FixtureRequest, house: LogHouse) -> None:
        for mark in request.node.iter_markers("needs"):
            if not set(mark.args) <= house.abilities:
                pytest.skip("the backend does not declare it")

    @pytest_asyncio.fixture
    async def log(self, house: LogHouse, clock: FakeClock) -> AsyncIterator[EventLog]:
        log = await house.open(clock=clock)
        yield log
        await log.close()

    @pytest.fixture
    def clock(self) -> FakeClock:
        return FakeClock()

    # Appending

    async def test_an_empty_log_says_so(self, log: EventLog) -> None:
        info = log.info()
        assert (info.first_sequence, info.last_sequence, info.events) == (0, 0, 0)
        result = await log.read(0)
        assert (result.events, result.position, result.end_reached) == (0, 0, True)
        assert result.first_sequence == 1
        assert (await last(log, lambda _: True)).events == 0
        assert await log.sequence_at(0) == 1

    async def test_a_batch_is_stored_whole_adjacent_and_in_order(self, log: EventLog) -> None:
        await log.append(events(3))
        batch = events(5)
        results = await log.append(batch)
        assert results == [Appended(n, False) for n in range(4, 9)]
        assert [one.id for one in await read_all(log)][3:] == [one.id for one in batch]

    async def test_frames_joined_are_a_response(self, log: EventLog) -> None:
        batch = events(300)
        await log.append(batch)
        result = await log.read(0)
        response = SubscribeResponse.FromString(result.payload)
        assert [one.id for one in response.events] == [one.id for one in batch]

    async def test_everything_a_publisher_says_is_kept(self, log: EventLog) -> None:
        sent = Event(
            id="1",
            source="gateway/eu-1 ü",
            subject="a.b",
            traceparent="00-" + "1" * 32 + "-" + "2" * 16 + "-01",
            correlation_id="c",
            causation_id="s/0",
            hops=3,
            headers={"k": "v"},
        )
        sent.time.seconds = 5
        sent.payload.type_url = "type.googleapis.com/never.Heard"
        sent.payload.value = b"\x00\xff" * 100
        await log.append([sent])
        (stored,) = await read_all(log)
        stored.ClearField("sequence")
        stored.ClearField("recorded_time")
        assert stored == sent

    async def test_what_flux_sets_overrules_the_publisher(
        self, log: EventLog, clock: FakeClock
    ) -> None:
        sent = event()
        sent.sequence = 77
        sent.recorded_time.seconds = 1
        sent.recorded_time.nanos = 7
        await log.append([sent, event()])
        stored, bare = await read_all(log)
        assert stored.sequence == 1
        if Ability.EMBEDDED in log.abilities:
            assert stored.recorded_time.ToNanoseconds() == clock.time_ns()
        else:
            assert abs(stored.recorded_time.ToNanoseconds() - time.time_ns()) < 60 * SECOND_NS
        assert bare.time.ToNanoseconds() == clock.time_ns()
        assert sent.sequence == 77, "the caller's event is left alone"

    async def test_concurrent_batches_do_not_mix(self, log: EventLog) -> None:
        batches = [events(1 + n % 7) for n in range(100)]
        answers = await asyncio.gather(*(log.append(batch) for batch in batches))
        stored = {one.sequence: one.id for one in await read_all(log)}
        assert sorted(stored) == list(range(1, sum(map(len, batches)) + 1))
        for batch, results in zip(batches, answers, strict=True):
            places = [result.sequence for result in results]
            assert places == list(range(places[0], places[0] + len(batch)))
            assert [stored[place] for place in places] == [one.id for one in batch]

    async def test_appends_of_one_task_keep_their_order(self, log: EventLog) -> None:
        answers = await asyncio.gather(*(log.append([event()]) for _ in range(200)))
        assert [answer[0].sequence for answer in answers] == list(range(1, 201))

    async def test_a_batch_of_the_largest_size_is_stored(self, log: EventLog) -> None:
        batch = events(4096)
        for one in batch:
            one.payload.value = b"x" * 900
        assert len(await log.append(batch)) == 4096
        assert sequences(await read_all(log, max_events=4096)) == list(range(1, 4097))

    async def test_an_event_of_a_mebibyte_is_stored(self, log: EventLog) -> None:
        large = event()
        large.payload.value = bytes(range(256)) * 4096
        await log.append([event(), large, event()])
        assert (await read_all(log))[1].payload.value == large.payload.value

    @pytest.mark.needs(Ability.FSYNC)
    async def test_every_durability_keeps_the_order(self, log: EventLog) -> None:
        wanted = [DURABILITY_MEMORY, DURABILITY_FSYNC] * 20
        answers = await asyncio.gather(*(log.append([event()], durability=d) for d in wanted))
        assert [answer[0].sequence for answer in answers] == list(range(1, 41))

    async def test_fsync_is_honoured_or_refused(self, log: EventLog) -> None:
        if Ability.FSYNC in log.abilities:
            await log.append([event()], durability=DURABILITY_FSYNC)
            return
        with pytest.raises(FailedPrecondition) as refused:
            await log.append([event()], durability=DURABILITY_FSYNC)
        assert refused.value.reason == "DURABILITY_UNSUPPORTED"

    # Idempotency

    async def test_a_repeat_is_answered_with_the_first_sequence(self, log: EventLog) -> None:
        batch = events(3)
        first = await log.append(batch)
        again = await log.append(batch)
        assert again == [Appended(one.sequence, True) for one in first]
        assert log.info().events == 3

    async def test_a_batch_with_duplicates_stores_the_others(self, log: EventLog) -> None:
        known, fresh = event(), event()
        await log.append([known])
        assert await log.append([known, fresh]) == [Appended(1, True), Appended(2, False)]

    async def test_the_same_id_twice_in_a_batch_is_one_event(self, log: EventLog) -> None:
        one = event()
        results = await log.append([one, event(), one])
        assert results == [Appended(1, False), Appended(2, False), Appended(1, True)]
        assert log.info().events == 2

    async def test_the_same_id_of_another_source_is_another_event(self, log: EventLog) -> None:
        await log.append([event(source="a", id="1"), event(source="b", id="1")])
        assert log.info().events == 2

    async def test_repeats_in_flight_together_are_one_event(self, log: EventLog) -> None:
        one = event()
        answers = await asyncio.gather(*(log.append([one]) for _ in range(50)))
        assert {answer[0].sequence for answer in answers} == {1}
        assert sum(not answer[0].duplicate for answer in answers) == 1
        assert log.info().events == 1

    @pytest.mark.needs(Ability.PERSISTENT)
    async def test_a_repeat_after_reopening_is_known(self, house: LogHouse) -> None:
        batch = events(10)
        log = await house.open()
        await log.append(batch)
        await log.close()
        log = await house.open()
        results = await log.append([*batch, event()])
        await log.close()
        assert results == [Appended(n, True) for n in range(1, 11)] + [Appended(11, False)]

    @pytest.mark.needs(Ability.TRIM)
    async def test_a_trimmed_event_is_still_known(self, log: EventLog) -> None:
        batch = events(10)
        await log.append(batch)
        await log.trim(6)
        assert await log.append(batch[:2]) == [Appended(1, True), Appended(2, True)]

    @pytest.mark.needs(Ability.TRIM, Ability.PERSISTENT)
    async def test_a_trimmed_event_is_known_after_reopening(self, house: LogHouse) -> None:
        batch = events(10)
        log = await house.open()
        await log.append(batch)
        await log.trim(11)
        await log.close()
        log = await house.open()
        results = await log.append([*batch, event()])
        await log.close()
        assert results == [Appended(n, True) for n in range(1, 11)] + [Appended(11, False)]

    @pytest.mark.needs(
        Ability.TRIM,
        Ability.PERSISTENT,
        Ability.EXPECTED_LAST_SEQUENCE,
        Ability.EXPECTED_SUBJECT_SEQUENCES,
    )
    async def test_a_repeat_of_a_trimmed_event_is_known_whatever_it_expects(
        self, house: LogHouse
    ) -> None:
        one = event()
        log = await house.open()
        await log.append([one], expected=Expected(0, {one.subject: 0}))
        await log.append([event()])
        await log.trim(3)
        await log.close()
        log = await house.open()
        for expected in (Expected(0), Expected(subjects={one.subject: 1})):
            assert await log.append([one], expected=expected) == [Appended(1, True)]
        with pytest.raises(FailedPrecondition):
            await log.append([event()], expected=Expected(subjects={one.subject: 1}))
        await log.close()

    # Expected last sequence

    @pytest.mark.needs(Ability.EXPECTED_LAST_SEQUENCE)
    async def test_a_wrong_expectation_stores_nothing(self, log: EventLog) -> None:
        await log.append(events(2), expected=Expected(0))
        with pytest.raises(FailedPrecondition) as refused:
            await log.append(events(2), expected=Expected(1))
        assert refused.value.reason == "WRONG_LAST_SEQUENCE"
        assert refused.value.metadata["actual"] == "2"
        assert (await log.append([event()], expected=Expected(2)))[0].sequence == 3

    @pytest.mark.needs(Ability.EXPECTED_LAST_SEQUENCE)
    async def test_one_of_many_with_the_same_expectation_wins(self, log: EventLog) -> None:
        tries = [log.append([event()], expected=Expected(0)) for _ in range(20)]
        answers = await asyncio.gather(*tries, return_exceptions=True)
        assert sum(isinstance(answer, list) for answer in answers) == 1
        assert sum(isinstance(answer, FailedPrecondition) for answer in answers) == 19
        assert log.info().last_sequence == 1

    @pytest.mark.needs(Ability.EXPECTED_LAST_SEQUENCE)
    async def test_a_repeat_is_answered_like_the_first_try(self, log: EventLog) -> None:
        one = event()
        await log.append([one], expected=Expected(0))
        assert await log.append([one], expected=Expected(0)) == [Appended(1, True)]

    # The tail

    async def test_listeners_hear_each_record_once_in_order_before_the_ack(
        self, log: EventLog
    ) -> None:
        heard: list[Record] = []
        late: list[int] = []
        log.on_commit(heard.extend)

        async def publish(batch: Sequence[Event]) -> None:
            results = await log.append(batch)
            late.extend(one.sequence for one in results if one.sequence > heard[-1].sequence)

        await asyncio.gather(*(publish(events(3)) for _ in range(60)))
        assert not late
        assert [record.sequence for record in heard] == list(range(1, 181))
        result = await log.read(0)
        assert result.records == heard

    async def test_reads_show_what_listeners_were_told(self, log: EventLog) -> None:
        told = 0
        done = False

        def hear(records: Sequence[Record]) -> None:
            nonlocal told
            told = records[-1].sequence

        async def watch() -> None:
            while not done:
                asked = told
                result = await log.read(0, max_events=4096)
                assert asked <= result.position <= told
                await asyncio.sleep(0)

        log.on_commit(hear)
        watcher = asyncio.create_task(watch())
        for _ in range(50):
            await log.append(events(5))
        done = True
        await watcher

    async def test_a_listener_that_fails_disturbs_nobody(self, log: EventLog) -> None:
        heard: list[Record] = []

        def fail(records: Sequence[Record]) -> None:
            raise ValueError("a defect of the listener")

        log.on_commit(fail)
        log.on_commit(heard.extend)
        await log.append(events(2))
        assert len(heard) == 2

    # Cancelling and closing

    async def test_a_cancelled_append_disturbs_nobody(self, log: EventLog) -> None:
        heard: list[Record] = []
        log.on_commit(heard.extend)
        cancelled = []
        for n in range(40):
            task = asyncio.create_task(log.append(events(2)))
            if n % 2:
                await asyncio.sleep(0)
                task.cancel()
                cancelled.append(task)
        await asyncio.gather(*cancelled, return_exceptions=True)
        last = (await log.append([event()]))[0].sequence
        stored = sequences(await read_all(log))
        assert stored == list(range(1, last + 1)) == [record.sequence for record in heard]

    async def test_a_cancelled_read_disturbs_nobody(self, log: EventLog) -> None:
        await log.append(events(50))
        for _ in range(30):
            task = asyncio.create_task(log.read(0))
            await asyncio.sleep(0)
            task.cancel()
        assert (await log.read(0)).events == 50

    async def test_a_closed_log_refuses_and_closes_again(self, log: EventLog) -> None:
        await log.append(events(2))
        await log.close()
        await log.close()
        for call in (log.append([event()]), log.read(0), last(log, bool), log.sequence_at(0)):
            with pytest.raises(Unavailable) as refused:
                await call
            assert refused.value.reason == "LOG_CLOSED"
        assert log.info().last_sequence == 2

    async def test_closing_finishes_the_appends_that_wait(self, house: LogHouse) -> None:
        log = await house.open()
        tasks = [asyncio.create_task(log.append(events(3))) for _ in range(50)]
        await asyncio.sleep(0)
        await log.close()
        answers = await asyncio.gather(*tasks)
        assert sorted(one.sequence for answer in answers for one in answer) == list(range(1, 151))

    @pytest.mark.needs(Ability.WRITE_QUEUE)
    async def test_closing_while_appends_are_blocked_waits_for_them(self, house: LogHouse) -> None:
        log = await house.open()
        with house.stalled():
            tasks = [asyncio.create_task(log.append(events(3))) for _ in range(5)]
            await asyncio.sleep(0)
            first = asyncio.create_task(log.close())
            second = asyncio.create_task(log.close())
            await asyncio.sleep(0.05)
            assert not first.done()
            second.cancel()
        await first
        answers = await asyncio.gather(*tasks)
        assert [one.sequence for answer in answers for one in answer] == list(range(1, 16))

    @pytest.mark.needs(Ability.WRITE_QUEUE)
    async def test_the_write_queue_is_bounded(self, house: LogHouse) -> None:
        log = await house.open(queue_events=100)
        with house.stalled():
            waiting = [asyncio.create_task(log.append(events(10))) for _ in range(10)]
            await asyncio.sleep(0)
            with pytest.raises(ResourceExhausted) as refused:
                await log.append([event()])
            assert refused.value.reason == "WRITE_QUEUE_FULL"
            assert refused.value.retry_after_s
            assert (await log.read(0)).events == 0, "reads go on"
        await asyncio.gather(*waiting)
        assert (await log.append([event()]))[0].sequence == 101
        await log.close()

    @pytest.mark.needs(Ability.WRITE_QUEUE)
    async def test_appends_that_wait_get_room_in_their_turn(self, house: LogHouse) -> None:
        log = await house.open(queue_events=100)
        succession = Succession()
        sizes = [90, 40, 1, 70, 99, 3]
        with house.stalled():
            tasks = [
                asyncio.create_task(
                    log.append(events(size), succession=succession, wait=True), name=str(size)
                )
                for size in sizes
            ]
            await asyncio.sleep(0)
            with pytest.raises(ResourceExhausted):
                await log.append(events(11))
            # Who went away holds up nobody.
            tasks[3].cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(done[3], asyncio.CancelledError)
        answers = [one for one in done if isinstance(one, list)]
        assert [one.sequence for answer in answers for one in answer] == list(range(1, 234))
        await log.close()

    @pytest.mark.needs(Ability.EXPECTED_LAST_SEQUENCE)
    async def test_nothing_of_a_succession_is_stored_behind_what_was_refused(
        self, house: LogHouse
    ) -> None:
        log = await house.open()
        succession = Succession()
        expected = Expected(last_sequence=7)
        done = await asyncio.gather(
            log.append(events(1), succession=succession),
            log.append(events(1), succession=succession, expected=expected),
            log.append(events(1), succession=succession),
            log.append(events(1)),
            return_exceptions=True,
        )
        reasons = [getattr(one, "reason", None) for one in done]
        assert reasons == [None, "WRONG_LAST_SEQUENCE", "WRONG_LAST_SEQUENCE", None]
        assert log.info().last_sequence == 2
        await log.close()

    async def test_a_filter_over_many_subjects_lets_others_have_their_turn(
        self, house: LogHouse
    ) -> None:
        log = await house.open()
        for start in range(0, 12_000, 4000):
            await log.append([event(f"s.{n}") for n in range(start, start + 4000)])
        asked = 0
        turns: list[int] = []

        def matches(subject: str) -> bool:
            nonlocal asked
            asked += 1
            return subject.endswith("7")

        search = asyncio.create_task(log.newest(matches))
        await asyncio.sleep(0)
        late = asyncio.create_task(log.append([event("s.7")]))
        while not search.done():
            turns.append(asked)
            await asyncio.sleep(0)
        newest = await search
        await late
        assert newest.position == 12_000
        assert list(newest.sequences) == list(range(8, 12_001, 10))
        assert max(b - a for a, b in pairwise([0, *turns])) < 6000
        await log.close()

    @pytest.mark.needs(Ability.WRITE_QUEUE)
    async def test_closing_refuses_what_waits_for_room(self, house: LogHouse) -> None:
        log = await house.open(queue_events=10)
        with house.stalled():
            queued = asyncio.create_task(log.append(events(10), wait=True))
            waiting = asyncio.create_task(log.append(events(5), wait=True))
            await asyncio.sleep(0)
            closing = asyncio.create_task(log.close())
            with pytest.raises(Unavailable) as refused:
                await waiting
            assert refused.value.reason == "LOG_CLOSED"
        await closing
        assert len(await queued) == 10

    # Reading

    async def test_positions_lead_from_read_to_read(self, log: EventLog) -> None:
        await log.append(events(10))
        first = await log.read(0, max_events=4)
        assert (list(first.sequences), first.position, first.end_reached) == (
            [1, 2, 3, 4],
            4,
            False,
        )
        second = await log.read(first.position, max_events=6)
        assert (list(second.sequences), second.end_reached) == ([5, 6, 7, 8, 9, 10], True)
        third = await log.read(second.position)
        assert (third.events, third.position, third.end_reached) == (0, 10, True)

    async def test_a_position_beyond_the_end_stays(self, log: EventLog) -> None:
        await log.append(events(3))
        result = await log.read(9)
        assert (result.events, result.position, result.end_reached) == (0, 9, True)
        largest = 2**64 - 1
        result = await log.read(largest)
        assert (result.events, result.position, result.end_reached) == (0, largest, True)

    async def test_bytes_bound_a_read_but_the_first_event_fits(self, log: EventLog) -> None:
        batch = events(4)
        for one in batch:
            one.payload.value = b"x" * 1000
        await log.append(batch)
        assert list((await log.read(0, max_bytes=10)).sequences) == [1]
        two = await log.read(1, max_bytes=2200)
        assert (list(two.sequences), two.position, two.end_reached) == ([2, 3], 3, False)
        assert (await log.read(3, max_bytes=10)).end_reached

    async def test_filters_and_sources_choose(self, log: EventLog) -> None:
        for n in range(60):
            await log.append([event(f"a.{n % 3}", source=f"s{n % 2}")])
        wanted = FilterSet(["a.1"]).matches
        result = await log.read(0, matches=wanted)
        assert list(result.sequences) == list(range(2, 61, 3))
        assert (result.position, result.end_reached) == (60, True)
        result = await log.read(0, matches=wanted, exclude_sources=frozenset({"s0"}), max_events=3)
        assert list(result.sequences) == [2, 8, 14]
        assert 14 <= result.position < 20
        result = await log.read(0, exclude_sources=frozenset({"s0", "s1"}))
        assert (result.events, result.position, result.end_reached) == (0, 60, True)

    async def test_until_ends_a_read(self, log: EventLog) -> None:
        await log.append(events(10))
        result = await log.read(2, until=5)
        assert (list(result.sequences), result.position, result.end_reached) == ([3, 4, 5], 5, True)
        assert (await log.read(5, until=5)).events == 0

    @pytest.mark.needs(Ability.BACKWARD)
    async def test_backward_gives_the_newest_first(self, log: EventLog) -> None:
        for n in range(20):
            await log.append([event(f"a.{n % 2}")])
        first = await log.read(21, backward=True, max_events=3)
        assert (list(first.sequences), first.position) == ([20, 19, 18], 18)
        check(first)
        odd = await log.read(18, backward=True, matches=FilterSet(["a.0"]).matches)
        assert (list(odd.sequences), odd.end_reached) == (list(range(17, 0, -2)), True)
        rest = await log.read(2**40, backward=True, until=19)
        assert (list(rest.sequences), rest.position, rest.end_reached) == ([20, 19], 19, True)
        assert (await log.read(1, backward=True)).end_reached

    async def test_a_filter_that_matches_nothing_is_read_in_bounded_steps(
        self, log: EventLog
    ) -> None:
        for _ in range(6):
            await log.append(events(4000))
        position, steps = 0, 0
        while True:
            result = await log.read(position, matches=lambda _: False)
            assert result.events == 0
            assert 0 < result.position - position <= 20_000
            position, steps = result.position, steps + 1
            if result.end_reached:
                break
        assert (position, steps > 1) == (24_000, True)

    async def test_last_is_the_newest_of_each_subject_by_sequence(self, log: EventLog) -> None:
        for n in range(30):
            await log.append([event(f"a.{n % 3}", source="x" if n == 29 else "y"), event("b")])
        result = await last(log, FilterSet(["a.*"]).matches)
        assert [one.subject for one in check(result)] == ["a.0", "a.1", "a.2"]
        assert (list(result.sequences), result.position) == ([55, 57, 59], 60)
        result = await last(log, FilterSet(["a.*"]).matches, exclude_sources=frozenset({"x"}))
        assert list(result.sequences) == [55, 57]
        assert (await last(log, lambda _: False)).position == 60

    async def test_last_is_true_for_its_position(self, log: EventLog) -> None:
        done = False

        async def publish() -> None:
            while not done:
                await log.append([event("state"), event("other")])
                await asyncio.sleep(0)

        publisher = asyncio.create_task(publish())
        for _ in range(30):
            result = await last(log, FilterSet(["state"]).matches)
            if result.events:
                assert list(result.sequences) == [result.position - 1]
            await asyncio.sleep(0)
        done = True
        await publisher

    @pytest.mark.needs(Ability.EMBEDDED)
    async def test_a_time_finds_the_first_event_at_or_after_it(
        self, log: EventLog, clock: FakeClock
    ) -> None:
        start = clock.time_ns()
        for _ in range(10):
            await log.append(events(2))
            clock.advance(1)
        assert await log.sequence_at(0) == 1
        assert await log.sequence_at(start + 3 * SECOND_NS) == 7
        assert await log.sequence_at(start + 3 * SECOND_NS + 1) == 9
        assert await log.sequence_at(start + 60 * SECOND_NS) == 21

    @pytest.mark.needs(Ability.EMBEDDED)
    async def test_a_time_is_found_though_the_clock_jumped(
        self, log: EventLog, clock: FakeClock
    ) -> None:
        start = clock.time_ns()
        await log.append([event()])
        clock.jump_wall(3600)
        await log.append([event()])
        clock.jump_wall(-3590)
        await log.append([event()])
        assert await log.sequence_at(start + 1) == 2
        assert await log.sequence_at(start + 3600 * SECOND_NS) == 2
        assert await log.sequence_at(start + 3601 * SECOND_NS) == 4

    async def test_the_recorded_time_of_an_event_finds_it(self, log: EventLog) -> None:
        for _ in range(20):
            await log.append(events(2))
        records = (await log.read(0)).records
        for time_ns in {record.recorded_ns for record in records}:
            first = min(one.sequence for one in records if one.recorded_ns == time_ns)
            assert await log.sequence_at(time_ns) == first
        assert await log.sequence_at(records[-1].recorded_ns + 3600 * SECOND_NS) == 41

    async def test_info_counts(self, log: EventLog) -> None:
        await log.append([event("a"), event("b"), event("a")])
        result = await log.read(0)
        info = log.info()
        assert (info.first_sequence, info.last_sequence, info.events) == (1, 3, 3)
        assert info.subjects == 2
        if Ability.EMBEDDED in log.abilities:
            assert info.bytes == len(result.payload)
        assert info.epoch == log.epoch

    # Trimming

    @pytest.mark.needs(Ability.TRIM)
    async def test_a_reader_behind_the_trim_can_tell(self, log: EventLog) -> None:
        await log.append([*events(5, "old"), *events(5, "new")])
        await log.trim(7)
        info = log.info()
        assert (info.first_sequence, info.events, info.subjects) == (7, 4, 1)
        result = await log.read(0)
        assert (list(result.sequences), result.first_sequence) == ([7, 8, 9, 10], 7)
        assert ids(await last(log, lambda _: True)) == [ids(result)[-1]]
        if Ability.EMBEDDED in log.abilities:
            assert info.bytes == len(result.payload)
        await log.trim(3)
        assert log.info().first_sequence == 7

    @pytest.mark.needs(Ability.TRIM)
    async def test_fetch_names_what_was_trimmed(self, log: EventLog) -> None:
        await log.append([event(source="x" if n > 8 else "y") for n in range(1, 11)])
        await log.trim(4)
        found = await log.fetch([2, 3, 5, 9, 12], exclude_sources=frozenset({"x"}))
        assert (list(found.sequences), list(found.gone)) == ([5], [2, 3, 12])

    @pytest.mark.needs(Ability.TRIM)
    async def test_a_log_that_was_trimmed_whole_goes_on(self, log: EventLog) -> None:
        await log.append(events(5))
        await log.trim(1_000)
        info = log.info()
        assert (info.first_sequence, info.last_sequence, info.events) == (0, 5, 0)
        result = await log.read(0)
        assert (result.events, result.first_sequence, result.end_reached) == (0, 6, True)
        assert (await log.append([event()]))[0].sequence == 6
        assert list((await log.read(0)).sequences) == [6]

    @pytest.mark.needs(Ability.TRIM)
    async def test_trimming_and_appending_and_reading_go_together(self, log: EventLog) -> None:
        for _ in range(5):
            await log.append(events(4000))

        async def publish() -> None:
            for _ in range(50):
                await log.append(events(10))

        async def follow() -> None:
            position = 0
            while position < 20_500:
                result = await log.read(position, max_events=500)
                expected = max(position + 1, result.first_sequence)
                assert list(result.sequences) == list(range(expected, result.position + 1))
                position = result.position
                await asyncio.sleep(0)

        await asyncio.gather(publish(), log.trim(15_001), follow(), publish())
        assert log.info().first_sequence == 15_001
        assert log.info().events == 21_000 - 15_000

    @pytest.mark.needs(Ability.TRIM, Ability.EMBEDDED)
    async def test_a_time_before_the_trim_finds_the_oldest_event(
        self, log: EventLog, clock: FakeClock
    ) -> None:
        start = clock.time_ns()
        for _ in range(10):
            await log.append(events(2))
            clock.advance(1)
        await log.trim(9)
        assert await log.sequence_at(start) == 9
        assert await log.sequence_at(start + 5 * SECOND_NS) == 11

    # Removing single events

    @pytest.mark.needs(Ability.REMOVE)
    async def test_a_reader_is_told_of_each_removed_event_once(self, log: EventLog) -> None:
        await log.append(events(100))
        away = {3, 4, 5, 40, 77, 78, 100}
        assert await log.remove(sorted(away)) == len(away)
        assert log.info().events == 100 - len(away)
        for step in (1, 7, 1000):
            holes = await holes_of(log, max_events=step)
            assert sum(hole.events for hole in holes) == len(away)
            assert {hole.reason for hole in holes} == {GAP_REASON_COMPACTED}
            assert all(a.to_sequence < b.from_sequence for a, b in pairwise(holes))
        found = sequences(await read_all(log))
        assert found == [n for n in range(1, 101) if n not in away]

    @pytest.mark.needs(Ability.REMOVE)
    async def test_a_hole_is_told_from_where_the_reader_stands(self, log: EventLog) -> None:
        await log.append(events(20))
        await log.remove(range(5, 12))
        for position, expected in (
            (0, (5, 11, 7)),
            (4, (5, 11, 7)),
            (8, (9, 11, 3)),
            (10, (11, 11, 1)),
        ):
            (hole,) = await holes_of(log, position)
            assert hole == Missing(*expected, GAP_REASON_COMPACTED)
        assert not await holes_of(log, 11)
        assert not (await log.read(0, until=4)).missing
        assert (await log.read(0, until=6)).missing == (Missing(5, 6, 2, GAP_REASON_COMPACTED),)

    @pytest.mark.needs(Ability.REMOVE)
    async def test_holes_are_told_though_the_filter_drops_all(self, log: EventLog) -> None:
        await log.append(events(20))
        await log.remove([7])
        result = await log.read(0, matches=lambda _: False)
        assert (result.events, result.position) == (0, 20)
        assert result.missing == (Missing(7, 7, 1, GAP_REASON_COMPACTED),)

    @pytest.mark.needs(Ability.REMOVE)
    async def test_many_holes_are_told_in_one(self, log: EventLog) -> None:
        await log.append(events(1000))
        await log.remove(range(2, 1001, 2))
        result = await log.read(0, max_events=1000)
        assert result.missing == (Missing(2, 1000, 500, GAP_REASON_COMPACTED),)

    @pytest.mark.needs(Ability.REMOVE)
    async def test_what_is_removed_at_the_front_moves_the_front(self, log: EventLog) -> None:
        await log.append(events(10))
        await log.remove([2, 3])
        assert log.info().first_sequence == 1
        await log.remove([1])
        result = await log.read(0)
        assert (result.first_sequence, result.missing) == (4, ())
        assert log.info().first_sequence == 4
        await log.remove(range(1, 11))
        result = await log.read(0)
        assert (result.events, result.first_sequence, result.missing) == (0, 11, ())
        assert (log.info().first_sequence, log.info().last_sequence) == (0, 10)
        assert (await log.append([event()]))[0].sequence == 11
        assert (log.info().first_sequence, log.info().events) == (11, 1)
        if Ability.EMBEDDED in log.abilities:
            assert log.info().bytes == len((await log.read(0)).payload)

    @pytest.mark.needs(Ability.REMOVE)
    async def test_a_subject_whose_newest_event_is_removed_has_no_state(
        self, log: EventLog
    ) -> None:
        await log.append([event("a"), event("a"), event("b")])
        await log.remove([2])
        assert list((await log.newest(bool)).sequences) == [3]
        assert log.info().subjects == 1
        await log.remove([1])
        await log.append([event("a")])
        assert list((await log.newest(bool)).sequences) == [3, 4]
        assert list((await log.newest(bool, after=3)).sequences) == [4]

    @pytest.mark.needs(Ability.REMOVE)
    async def test_an_older_event_may_go_and_the_state_stays(self, log: EventLog) -> None:
        await log.append([event("a"), event("a"), event("b")])
        assert await log.remove([1, 1_000]) == 1
        assert list((await log.newest(bool)).sequences) == [2, 3]
        assert await log.remove([1]) == 0
        assert await log.remove([]) == 0

    @pytest.mark.needs(Ability.REMOVE)
    async def test_what_was_removed_is_still_known_as_a_duplicate(self, log: EventLog) -> None:
        batch = events(5)
        await log.append(batch)
        await log.remove([2, 5])
        again = await log.append(batch)
        assert again == [Appended(n, True) for n in range(1, 6)]
        assert log.info().events == 3

    @pytest.mark.needs(Ability.REMOVE)
    async def test_fetch_leaves_out_and_names_what_is_gone(self, log: EventLog) -> None:
        await log.append([event(source="x" if n == 4 else "y") for n in range(10)])
        await log.remove([3, 7])
        found = await log.fetch([1, 3, 5, 7, 9])
        assert (list(found.sequences), list(found.gone)) == ([1, 5, 9], [3, 7])
        found = await log.fetch([3, 5, 11], exclude_sources=frozenset({"x"}))
        assert (list(found.sequences), list(found.gone), found.position) == ([], [3, 11], 11)

    @pytest.mark.needs(Ability.REMOVE)
    async def test_a_state_that_is_compacted_while_it_is_read_can_be_made_whole(
        self, log: EventLog
    ) -> None:
        """The way of `EventLog.fetch`: what is gone was superseded, so it is found after."""
        await log.append([event("a"), event("b")])
        state = await log.newest(bool)
        await log.append([event("a")])
        await log.remove([1])
        found = await log.fetch(state.sequences)
        assert (list(found.sequences), list(found.gone)) == ([2], [1])
        more = await log.newest(bool, after=state.position)
        assert list(more.sequences) == [3]

    @pytest.mark.needs(Ability.REMOVE)
    async def test_the_index_lists_what_is_held(self, log: EventLog, clock: FakeClock) -> None:
        start = clock.time_ns()
        await log.append([event("a"), event("b", expire_ns=start + 5)])
        clock.advance(1)
        await log.append([event("c"), event("a")])
        await log.remove([3])
        held = await log.read(0)
        times, sizes = [one.recorded_ns for one in held.records], held.sizes
        index = await log.index(0)
        if Ability.EMBEDDED in log.abilities:
            assert times == [start, start, start + SECOND_NS]
        else:
            sizes = [entry.size for entry in index]
            assert sum(sizes) == log.info().bytes
        assert index == [
            IndexEntry(1, times[0], "a", sizes[0], 0),
            IndexEntry(2, times[1], "b", sizes[1], start + 5),
            IndexEntry(4, times[2], "a", sizes[2], 0),
        ]
        assert [entry.sequence for entry in await log.index(1, max_events=1)] == [2]
        assert await log.index(4) == []

    @pytest.mark.needs(Ability.REMOVE)
    async def test_expired_events_are_named_until_they_are_removed(
        self, log: EventLog, clock: FakeClock
    ) -> None:
        now = clock.time_ns()
        ends = [now + 30, 0, now + 10, now + 20, now + 20]
        await log.append([event(expire_ns=end) for end in ends])
        assert await log.expired(now + 9) == []
        assert await log.expired(now + 20) == [3, 4, 5]
        assert await log.expired(now + 30, max_events=1) == [3]
        await log.remove([3, 4])
        assert await log.expired(now + 10**18) == [1, 5]
        await log.trim(2)
        assert await log.expired(now + 10**18) == [5]
        assert [one.expire_time.ToNanoseconds() for one in await read_all(log)] == [0, now + 20]

    @pytest.mark.needs(Ability.REMOVE, Ability.EMBEDDED)
    async def test_times_are_found_between_holes(self, log: EventLog, clock: FakeClock) -> None:
        start = clock.time_ns()
        for _ in range(10):
            await log.append([event()])
            clock.advance(1)
        await log.remove([4, 5, 10])
        assert await log.sequence_at(start + 3 * SECOND_NS) == 6
        assert await log.sequence_at(start + 9 * SECOND_NS) == 11

    @pytest.mark.needs(Ability.REMOVE)
    async def test_removing_and_appending_and_reading_go_together(self, log: EventLog) -> None:
        for _ in range(3):
            await log.append(events(800))

        async def publish() -> None:
            for _ in range(50):
                await log.append(events(10))

        async def follow() -> None:
            position, told = 0, 0
            while position < 2_900:
                result = await log.read(position, max_events=500)
                gone = sum(hole.events for hole in result.missing)
                assert result.events + gone == result.position - position
                told += gone
                position = result.position
                await asyncio.sleep(0)

        away = range(2, 2_401, 3)
        _, removed, *_ = await asyncio.gather(publish(), log.remove(away), follow())
        assert removed == len(away)
        assert log.info().events == 2_900 - removed

    # What a publisher expects of a subject

    @pytest.mark.needs(Ability.EXPECTED_SUBJECT_SEQUENCES)
    async def test_a_subject_is_compared_and_set(self, log: EventLog) -> None:
        await log.append([event("a")], expected=Expected(subjects={"a": 0}))
        await log.append([event("b"), event("a")], expected=Expected(subjects={"a": 1, "b": 0}))
        with pytest.raises(FailedPrecondition) as refused:
            await log.append([event("b")], expected=Expected(subjects={"b": 2, "a": 1}))
        assert refused.value.reason == "WRONG_LAST_SEQUENCE"
        assert refused.value.metadata["subject"] == "a"
        assert refused.value.metadata["actual"] == "3"
        assert log.info().last_sequence == 3

    @pytest.mark.needs(Ability.EXPECTED_SUBJECT_SEQUENCES)
    async def test_of_twenty_who_expect_the_same_one_wins(self, log: EventLog) -> None:
        at = 0
        for turn in range(5):
            tries = [
                log.append([event("other"), event("a")], expected=Expected(subjects={"a": at}))
                for _ in range(20)
            ]
            answers = await asyncio.gather(*tries, return_exceptions=True)
            won = [one for one in answers if isinstance(one, list)]
            lost = [one for one in answers if isinstance(one, FailedPrecondition)]
            assert (len(won), len(lost)) == (1, 19)
            at = won[0][1].sequence
            assert {one.metadata["actual"] for one in lost} == {str(at)}
            assert log.info().last_sequence == at == 2 * (turn + 1)

    @pytest.mark.needs(Ability.EXPECTED_SUBJECT_SEQUENCES)
    async def test_a_repeat_is_answered_though_the_subject_moved_on(self, log: EventLog) -> None:
        batch = [event("a"), event("a")]
        wanted = Expected(subjects={"a": 0})
        await log.append(batch, expected=wanted)
        await log.append([event("a")])
        assert await log.append(batch, expected=wanted) == [Appended(1, True), Appended(2, True)]
        with pytest.raises(FailedPrecondition):
            await log.append([batch[0], event("a")], expected=wanted)
        mixed = await log.append([batch[0], event("a")], expected=Expected(subjects={"a": 3}))
        assert mixed == [Appended(1, True), Appended(4, False)]

    @pytest.mark.needs(Ability.EXPECTED_SUBJECT_SEQUENCES, Ability.REMOVE)
    async def test_a_subject_without_state_is_expected_at_zero(self, log: EventLog) -> None:
        await log.append([event("a"), event("a"), event("b")])
        await log.remove([2])
        with pytest.raises(FailedPrecondition) as refused:
            await log.append([event("a")], expected=Expected(subjects={"a": 1}))
        assert refused.value.metadata["actual"] == "0"
        await log.append([event("a")], expected=Expected(subjects={"a": 0}))
        await log.trim(4)
        await log.append([event("b")], expected=Expected(subjects={"b": 0, "a": 4}))

    # Opening again

    @pytest.mark.needs(Ability.PERSISTENT)
    async def test_everything_is_there_after_reopening(self, house: LogHouse) -> None:
        clock = FakeClock()
        log = await house.open(clock=clock)
        for n in range(30):
            await log.append(events(10, f"a.{n % 4}"))
            clock.advance(1)
        await log.trim(101)
        before, payload = log.info(), (await log.read(0)).payload
        state, at_ns = await last(log, bool), (await log.read(250)).records[0].recorded_ns
        assert (at := await log.sequence_at(at_ns)) >= 101
        await log.close()
        log = await house.open(clock=clock)
        assert log.info() == before
        assert (await log.read(0)).payload == payload
        assert (await last(log, bool)) == state
        assert await log.sequence_at(at_ns) == at == 251
        assert (await log.append([event()]))[0].sequence == 301
        await log.close()

    @pytest.mark.needs(Ability.PERSISTENT, Ability.REMOVE, Ability.EXPECTED_SUBJECT_SEQUENCES)
    async def test_holes_and_states_are_there_after_reopening(self, house: LogHouse) -> None:
        clock = FakeClock()
        log = await house.open(clock=clock)
        batch = [event(f"a.{n % 4}", expire_ns=clock.time_ns() + n) for n in range(40)]
        await log.append(batch)
        await log.remove([1, 2, 10, 11, 40])
        before = log.info(), await holes_of(log), await log.index(0), await log.newest(bool)
        await log.close()
        log = await house.open(clock=clock)
        after = log.info(), await holes_of(log), await log.index(0), await log.newest(bool)
        assert after == before
        assert await log.expired(clock.time_ns() + 10) == [3, 4, 5, 6, 7, 8, 9]
        assert await log.append(batch) == [Appended(n, True) for n in range(1, 41)]
        with pytest.raises(FailedPrecondition):
            await log.append([event("a.2")], expected=Expected(subjects={"a.2": 0}))
        wanted = Expected(subjects={"a.3": 0, "a.2": 39})
        assert (await log.append([event("a.3")], expected=wanted))[0].sequence == 41
        await log.close()

    @pytest.mark.needs(Ability.PERSISTENT, Ability.TRIM)
    async def test_sequences_are_not_given_twice_though_all_is_trimmed(
        self, house: LogHouse
    ) -> None:
        log = await house.open()
        await log.append(events(5))
        await log.trim(6)
        await log.close()
        log = await house.open()
        assert (await log.append([event()]))[0].sequence == 6
        await log.close()

    async def test_the_epoch_names_one_life_of_the_log(self, house: LogHouse) -> None:
        async with AsyncExitStack() as stack:
            seen = []
            for _ in range(2):
                log = await house.open()
                stack.push_async_callback(log.close)
                await log.append([event()])
                seen.append(log.epoch)
                await log.close()
            assert (seen[0] == seen[1]) == (Ability.PERSISTENT in house.abilities)
            house.wipe()
            log = await house.open()
            stack.push_async_callback(log.close)
            assert log.epoch not in seen
            assert log.info().last_sequence == 0
