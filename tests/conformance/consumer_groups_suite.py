"""The port `flux_svc/groups/base.py` as tests; a backend inherits the class and gives a house."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from aither.flux.v1.flux_service_pb2 import NACK_ACTION_PARK, NACK_ACTION_RETRY
from aither_sdk.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutOfRange,
    Unavailable,
)
from flux_svc.groups.base import BEFORE_ALL, Ability, ConsumerGroups, ParkedKey
from flux_svc.logs.base import EventLog
from tests.conformance.groups_house import (
    LIMIT_S,
    GroupsHouse,
    ack_ids,
    group,
    join,
    sequence,
    sequences,
    until_checkpoint,
)
from tests.conformance.log_house import events
from tests.stopwatch import Stopwatch


class ConsumerGroupsSuite:
    @pytest.fixture(autouse=True)
    def _needed_abilities(self, request: pytest.FixtureRequest, house: GroupsHouse) -> None:
        for mark in request.node.iter_markers("needs"):
            if not set(mark.args) <= house.abilities:
                pytest.skip("the backend does not declare it")

    @pytest_asyncio.fixture
    async def both(self, house: GroupsHouse) -> AsyncIterator[tuple[EventLog, ConsumerGroups]]:
        log, groups = await house.open()
        yield log, groups
        await groups.close()
        await log.close()

    @pytest.fixture
    def log(self, both: tuple[EventLog, ConsumerGroups]) -> EventLog:
        return both[0]

    @pytest.fixture
    def groups(self, both: tuple[EventLog, ConsumerGroups]) -> ConsumerGroups:
        return both[1]

    def test_it_declares_what_its_house_does(
        self, groups: ConsumerGroups, house: GroupsHouse
    ) -> None:
        assert groups.abilities == house.abilities

    # Names and settings

    async def test_creating_again_with_the_same_settings_is_no_error(
        self, groups: ConsumerGroups
    ) -> None:
        first = await groups.create(group(max_deliveries=7))
        assert await groups.create(group(max_deliveries=7)) == first
        with pytest.raises(AlreadyExists) as caught:
            await groups.create(group(max_deliveries=8, lease_s=2))
        assert caught.value.metadata["fields"] == "max_deliveries, lease_duration"

    async def test_creating_at_the_same_time_makes_one_group(self, groups: ConsumerGroups) -> None:
        made = await asyncio.gather(*(groups.create(group()) for _ in range(8)))
        assert all(one == made[0] for one in made)

    async def test_groups_are_listed_by_name_in_pages(self, groups: ConsumerGroups) -> None:
        for name in ("c", "a", "b"):
            await groups.create(group(name))
        assert [one.name for one in await groups.list("", 2)] == ["a", "b"]
        assert [one.name for one in await groups.list("b", 2)] == ["c"]

    async def test_what_is_not_there_is_said_so(self, groups: ConsumerGroups) -> None:
        for asked in (
            groups.get("work"),
            groups.delete("work"),
            groups.seek("work", 0),
            groups.update(group(), ["max_deliveries"]),
            groups.list_parked("work", BEFORE_ALL, 1),
            groups.replay_parked("work", ()),
            groups.delete_parked("work", ()),
            groups.join("work", "m"),
        ):
            with pytest.raises(NotFound) as caught:
                await asked
            assert caught.value.reason == "CONSUMER_NOT_FOUND"

    async def test_a_group_begins_at_the_end_of_the_log_unless_told(
        self, log: EventLog, groups: ConsumerGroups
    ) -> None:
        await log.append(events(3))
        wanted = group()
        wanted.ClearField("start_after_sequence")
        await groups.create(wanted)
        assert (await groups.get("work"))[1].checkpoint_sequence == 3
        with pytest.raises(OutOfRange):
            await groups.create(group("far", start_after=4))

    async def test_settings_change_by_name_and_some_never(
        self, log: EventLog, groups: ConsumerGroups
    ) -> None:
        await groups.create(group())
        changed = await groups.update(group(max_deliveries=9, filters=["x"]), ["max_deliveries"])
        assert (changed.max_deliveries, list(changed.filters)) == (9, [])
        with pytest.raises(InvalidArgument):
            await groups.update(group(exclusive=True), ["exclusive"])
        await groups.update(group(filters=["b.>"]), ["filters"])
        await log.append([*events(1, "a.x"), *events(1, "b.x")])
        reader = await join(groups)
        assert sequences(await reader.deliveries(1)) == [2]

    # Delivering

    async def test_what_is_there_and_what_comes_is_delivered_once(
        self, log: EventLog, groups: ConsumerGroups
    ) -> None:
        await log.append(events(3))
        await groups.create(group())
        reader = await join(groups)
        first = await reader.deliveries(3)
        await log.append(events(2))
        second = await reader.deliveries(2)
        assert sequences(first + second) == [1, 2, 3, 4, 5]
        assert {one.attempt for one in first + second} == {1}
        assert await reader.member.ack(ack_ids(first + second)) is None
        await until_checkpoint(groups, 5)
        await reader.nothing_for(0.05)

    async def test_only_what_matches_is_delivered_and_the_rest_is_passed(
        self, log: EventLog, groups: ConsumerGroups
    ) -> None:
        await groups.create(group(filters=["yes.*"]))
        await log.append([*events(2, "no.a"), *events(1, "yes.a"), *events(2, "no.b")])
        reader = await join(groups)
        found = await reader.deliveries(1)
        assert sequences(found) == [3]
        await reader.member.ack(ack_ids(found))
        await until_checkpoint(groups, 5)
        state = (await groups.get("work"))[1]
        assert (state.lag_events, state.outstanding_events) == (0, 0)

    async def test_no_credit_no_delivery(self, log: EventLog, groups: ConsumerGroups) -> None:
        await log.append(events(5))
        await groups.create(group())
        reader = await join(groups, events=0)
        await reader.nothing_for(0.05)
        reader.member.credit(2, 0)
        await reader.deliveries(2)
        await reader.nothing_for(0.05)

    async def test_an_event_larger_than_the_bytes_left_goes_all_the_same(
        self, log: EventLog, groups: ConsumerGroups
    ) -> None:
        await log.append(events(2))
        await groups.create(group())
        reader = await join(groups, size=1)
        await reader.deliveries(1)
        await reader.nothing_for(0.05)

    async def test_members_share_and_none_gets_what_another_has(
        self, log: EventLog, groups: ConsumerGroups
    ) -> None:
        await groups.create(group())
        readers = [await join(groups, member=f"m{n}", events=10) for n in range(3)]
        await log.append(events(30))
        found = [one for reader in readers for one in sequences(await reader.deliveries(10))]
        assert sorted(found) == list(range(1, 31))

    @pytest.mark.needs(Ability.EXACT_OUTSTANDING)
    async def test_outstanding_events_are_bounded_over_all_members(
        self, log: EventLog, groups: ConsumerGroups
    ) -> None:
        await log.append(events(9))
        await groups.create(group(max_outstanding_events=3))
        one, two = await join(groups, member="one"), await join(groups, member="two")
        await asyncio.sleep(0.1)
        assert (await groups.get("work"))[1].outstanding_events == 3
        await one.member.leave()
        found = await two.deliveries(3)
        await two.nothing_for(0.05)
        await two.member.ack(ack_ids(found[:1]))
        await two.deliveries(1)

    # Coming back

    async def test_an_overdue_delivery_comes_again_and_the_loss_is_told(
        self, log: EventLog, groups: ConsumerGroups
    ) -> None:
        await log.append(events(1))
        await groups.create(group(ack_deadline_s=1, backoffs_s=[0]))
        reader = await join(groups)
        (first,) = await reader.deliveries(1)
        (second,) = await reader.deliveries(1)
        assert reader.lost == [first.ack_id]
        assert second.attempt == 2
        refused = await reader.member.ack([first.ack_id])
        assert refused is not None
        assert list(refused.ack_ids) == [first.ack_id]
        assert await reader.member.ack([second.ack_id]) is None

    async def test_extending_keeps_a_delivery(self, log: EventLog, groups: ConsumerGroups) -> None:
        await log.append(events(1))
        await groups.create(group(ack_deadline_s=1, backoffs_s=[0]))
        reader = await join(groups)
        found = await reader.deliveries(1)
        assert await reader.member.extend(ack_ids(found), 30) is None
        await reader.nothing_for(1.3)
        assert await reader.member.ack(ack_ids(found)) is None

    async def test_a_nack_comes_again_after_its_delay(
        self, log: EventLog, groups: ConsumerGroups
    ) -> None:
        await log.append(events(2))
        await groups.create(group())
        reader = await join(groups)
        found = await reader.deliveries(2)
        await reader.member.nack(ack_ids(found[:1]), NACK_ACTION_RETRY, retry_delay_s=0.3)
        await reader.nothing_for(0.15)
        (again,) = await reader.deliveries(1)
        assert (sequences([again]), again.attempt) == ([1], 2)

    async def test_what_a_leaving_member_had_goes_to_the_others_at_once(
        self, log: EventLog, groups: ConsumerGroups
    ) -> None:
        await log.append(events(4))
        await groups.create(group(ack_deadline_s=3600))
        gone = await join(groups, member="gone")
        await gone.deliveries(4)
        other = await join(groups, member="other")
        await gone.member.leave()
        await gone.member.leave()
        found = await other.deliveries(4)
        assert sorted(sequences(found)) == [1, 2, 3, 4]
        assert {one.attempt for one in found} == {2}

    async def test_enough_deliveries_park_an_event_and_the_group_goes_on(
        self, log: EventLog, groups: ConsumerGroups
    ) -> None:
        await log.append(events(2))
        await groups.create(group(max_deliveries=2))
        reader = await join(groups)
        one, two = await reader.deliveries(2)
        await reader.member.nack([one.ack_id], retry_delay_s=0, reason="first")
        (again,) = await reader.deliveries(1)
        await reader.member.nack([again.ack_id], retry_delay_s=0, reason="it is poison")
        await reader.member.ack([two.ack_id])
        await until_checkpoint(groups, 2)
        (parked,) = await groups.list_parked("work", BEFORE_ALL, 10)
        assert (parked.sequence, parked.attempts, parked.frame) == (1, 2, one.frame)
        assert "it is poison" in parked.reason
        assert (await groups.get("work"))[1].parked_events == 1

    async def test_parked_events_are_paged_replayed_and_deleted(
        self, log: EventLog, groups: ConsumerGroups
    ) -> None:
        await log.append(events(4))
        await groups.create(group())
        reader = await join(groups)
        found = await reader.deliveries(4)
        await reader.member.nack(ack_ids(found), NACK_ACTION_PARK, reason="later")
        await until_checkpoint(groups, 4)
        listed = await groups.list_parked("work", BEFORE_ALL, 3)
        assert [one.key for one in listed] == [ParkedKey(n, log.epoch) for n in (1, 2, 3)]
        assert [one.sequence for one in await groups.list_parked("work", listed[-1].key, 3)] == [4]
        assert await groups.delete_parked("work", [4, 77]) == 1
        await log.trim(5)
        assert await groups.replay_parked("work", [2]) == 1
        (again,) = await reader.deliveries(1)
        assert (sequences([again]), again.attempt) == ([2], 1)
        assert [one.sequence for one in await groups.list_parked("work", BEFORE_ALL, 9)] == [1, 3]
        await reader.member.ack([again.ack_id])
        assert await groups.replay_parked("work", ()) == 2
        await reader.member.ack(ack_ids(await reader.deliveries(2)))
        assert list(await groups.list_parked("work", BEFORE_ALL, 9)) == []

    async def test_events_that_are_trimmed_are_counted_and_block_nobody(
        self, log: EventLog, groups: ConsumerGroups
    ) -> None:
        await groups.create(group())
        await log.append(events(10))
        await log.trim(8)
        reader = await join(groups)
        found = await reader.deliveries(3)
        assert sequences(found) == [8, 9, 10]
        await reader.member.ack(ack_ids(found))
        await until_checkpoint(groups, 10)
        assert (await groups.get("work"))[1].missed_events == 7

    # Moving

    async def test_seeking_takes_back_what_is_out(
        self, log: EventLog, groups: ConsumerGroups
    ) -> None:
        await log.append(events(5))
        await groups.create(group())
        reader = await join(groups)
        first = await reader.deliveries(5)
        assert await groups.seek("work", 3) == 3
        await reader.until_lost(5)
        assert sorted(reader.lost) == sorted(ack_ids(first))
        again = await reader.deliveries(2)
        assert sequences(again) == [4, 5]
        assert {one.attempt for one in again} == {1}
        with pytest.raises(OutOfRange):
            await groups.seek("work", 6)

    async def test_deleting_ends_its_members(self, log: EventLog, groups: ConsumerGroups) -> None:
        await log.append(events(1))
        await groups.create(group())
        reader = await join(groups, events=0)
        await groups.delete("work")
        with pytest.raises(NotFound) as caught:
            async with asyncio.timeout(LIMIT_S):
                await reader.hear()
        assert caught.value.reason == "CONSUMER_DELETED"
        await reader.member.leave()
        await groups.create(group(max_deliveries=3))
        assert sequences(await (await join(groups)).deliveries(1)) == [1]

    async def test_a_drain_is_told_and_ends_joining(
        self, log: EventLog, groups: ConsumerGroups
    ) -> None:
        await log.append(events(1))
        await groups.create(group())
        reader = await join(groups)
        found = await reader.deliveries(1)
        groups.drain()
        async with asyncio.timeout(LIMIT_S):
            while reader.closing is None:
                await reader.hear()
        assert await reader.member.ack(ack_ids(found)) is None
        with pytest.raises(Unavailable):
            await groups.join("work", "late")

    async def test_a_member_that_drains_gets_no_more_and_keeps_what_it_has(
        self, log: EventLog, groups: ConsumerGroups
    ) -> None:
        await log.append(events(1))
        await groups.create(group())
        reader, other = await join(groups), await join(groups, events=0)
        found = await reader.deliveries(1)
        reader.member.drain()
        reader.member.credit(1000, 2**30)
        await reader.member.extend(ack_ids(found))  # what was said before it has been heard by now
        await log.append(events(2))
        other.member.credit(9, 2**30)
        assert sequences(await other.deliveries(2)) == [2, 3]
        assert await reader.member.ack(ack_ids(found)) is None
        await until_checkpoint(groups, 1)

    async def test_the_state_names_the_members(self, groups: ConsumerGroups) -> None:
        await groups.create(group())
        await join(groups, member="one")
        two = await join(groups, member="two")
        members = (await groups.get("work"))[1].members
        assert sorted(one.name for one in members) == ["one", "two"]
        assert all(one.active and one.connected_time.seconds for one in members)
        await two.member.leave()
        assert [one.name for one in (await groups.get("work"))[1].members] == ["one"]

    # One at a time

    @pytest.mark.needs(Ability.EXCLUSIVE)
    async def test_a_leader_that_leaves_is_replaced_at_once(
        self, log: EventLog, groups: ConsumerGroups
    ) -> None:
        await log.append(events(3))
        await groups.create(group(exclusive=True, lease_s=60))
        first = await join(groups, member="first")
        epoch = await first.until_active()
        await first.deliveries(3)
        second = await join(groups, member="second")
        await second.until_active(False)
        await first.member.leave()
        assert await second.until_active() > epoch
        assert sequences(await second.deliveries(3)) == [1, 2, 3]

    @pytest.mark.needs(Ability.EXCLUSIVE)
    async def test_a_silent_leader_is_replaced_within_its_lease(
        self, log: EventLog, groups: ConsumerGroups
    ) -> None:
        await log.append(events(1))
        await groups.create(group(exclusive=True, lease_s=1))
        silent = await join(groups, member="silent")
        epoch = await silent.until_active()
        found = await silent.deliveries(1)
        standby = await join(groups, member="standby")
        watch = Stopwatch()
        new_epoch = await standby.until_active()
        assert watch.calm_s < 3
        assert new_epoch > epoch
        await silent.until_active(False)
        assert silent.lost == ack_ids(found)
        assert await silent.member.ack(ack_ids(found)) is not None
        again = await standby.deliveries(1)
        assert await standby.member.ack(ack_ids(again)) is None

    @pytest.mark.needs(Ability.EXCLUSIVE)
    async def test_heartbeats_keep_a_leader(self, groups: ConsumerGroups) -> None:
        await groups.create(group(exclusive=True, lease_s=1))
        leader = await join(groups, member="leader")
        epoch = await leader.until_active()
        other = await join(groups, member="other")
        for _ in range(7):
            await asyncio.sleep(0.2)
            leader.member.heartbeat()
        assert (await groups.get("work"))[1].leader_epoch == epoch
        assert [told.active for told in other.leadership] in ([], [False])

    # Surviving

    @pytest.mark.needs(Ability.PERSISTENT)
    async def test_everything_survives_close_and_open(self, house: GroupsHouse) -> None:
        log, groups = await house.open()
        await log.append(events(6))
        made = await groups.create(group(max_deliveries=3, exclusive=True, lease_s=2))
        reader = await join(groups)
        epoch = await reader.until_active()
        found = await reader.deliveries(6)
        await reader.member.ack(ack_ids(found[1:4]))
        await reader.member.nack(ack_ids(found[4:5]), NACK_ACTION_PARK, reason="put aside")
        async with asyncio.timeout(LIMIT_S):
            while not (await groups.get("work"))[1].parked_events:
                await asyncio.sleep(0.01)
        await groups.close()
        await log.close()

        log, groups = await house.open()
        settings, state = await groups.get("work")
        assert settings == made
        assert (state.checkpoint_sequence, state.parked_events) == (0, 1)
        assert state.acknowledged_events == 3
        assert (await groups.list_parked("work", BEFORE_ALL, 9))[0].reason == "put aside"
        reader = await join(groups)
        assert await reader.until_active() > epoch
        again = await reader.deliveries(2)
        assert [(s, one.attempt) for s, one in zip(sequences(again), again, strict=True)] == [
            (1, 2),
            (6, 2),
        ]
        await reader.member.ack(ack_ids(again))
        await until_checkpoint(groups, 6)
        await groups.close()
        await log.close()

    @pytest.mark.needs(Ability.PERSISTENT)
    async def test_another_log_is_noticed_and_a_seek_mends_it(self, house: GroupsHouse) -> None:
        log, groups = await house.open()
        await log.append(events(3))
        await groups.create(group())
        old = log.epoch
        reader = await join(groups)
        before = await reader.deliveries(3)
        await reader.member.nack(ack_ids(before[:2]), NACK_ACTION_PARK, reason="of old")
        await until_checkpoint(groups, 2)
        await groups.close()
        await log.close()
        house.wipe_log()
        log, groups = await house.open()
        await log.append(events(2))
        with pytest.raises(FailedPrecondition) as caught:
            await groups.join("work", "m")
        assert caught.value.reason == "EPOCH_MISMATCH"
        assert caught.value.metadata == {"epoch": log.epoch, "consumer_epoch": old}
        assert (await groups.get("work"))[1].epoch == old
        await groups.seek("work", 0)
        assert (await groups.get("work"))[1].epoch == log.epoch
        # What was parked of the old log has the numbers of events of this one, and is not them.
        assert await groups.replay_parked("work", [1]) == 0
        assert await groups.replay_parked("work", [1], old) == 1
        reader = await join(groups)
        found = await reader.deliveries(3)
        assert sorted((sequence(one), one.epoch) for one in found) == [(1, ""), (1, old), (2, "")]
        await reader.member.nack(ack_ids(found), NACK_ACTION_PARK, reason="again")
        await until_checkpoint(groups, 2)
        async with asyncio.timeout(LIMIT_S):
            while (await groups.get("work"))[1].parked_events < 4:
                await asyncio.sleep(0.01)
        listed = await groups.list_parked("work", BEFORE_ALL, 9)
        keys = sorted(ParkedKey(n, epoch) for n in (1, 2) for epoch in (old, log.epoch))
        assert [one.key for one in listed] == keys
        assert [one.key for one in await groups.list_parked("work", keys[0], 2)] == keys[1:3]
        frames = {one.key: one.frame for one in listed}
        assert frames[ParkedKey(1, old)] == before[0].frame != frames[ParkedKey(1, log.epoch)]
        assert await groups.delete_parked("work", [2]) == 1
        await groups.close()
        await log.close()
        log, groups = await house.open()
        keys.remove(ParkedKey(2, log.epoch))
        assert [one.key for one in await groups.list_parked("work", BEFORE_ALL, 9)] == keys
        assert await groups.delete_parked("work", [], old) == 2
        assert await groups.delete_parked("work", []) == 1
        await groups.close()
        await log.close()
