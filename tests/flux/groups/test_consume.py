"""Consume and ConsumerService over real gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp

from aither.flux.v1 import consumer_service_pb2 as cs
from aither.flux.v1 import consumer_service_pb2_grpc, flux_service_pb2_grpc
from aither.flux.v1 import flux_service_pb2 as pb
from aither_sdk.errors import AitherError
from aither_sdk.health import HealthBoard
from aither_sdk.rpc_status import from_rpc_error
from aither_sdk.server import open_server
from flux_svc import consuming as consuming_module
from flux_svc.consumer_servicer import ConsumerServicer
from flux_svc.consuming import Consuming
from flux_svc.fanout.audience import Audience
from flux_svc.fanout.hub import Hub
from flux_svc.groups.local.groups import LocalGroups
from flux_svc.groups.local.store import MemoryStore
from flux_svc.logs.memory import MemoryLog
from flux_svc.publishing import Publishing
from flux_svc.registration import SERVICES, add_consumer_service, add_flux
from flux_svc.servicer import FluxServicer
from flux_svc.validation import EventRules
from tests.conformance.groups_house import group
from tests.conformance.log_house import event, events
from tests.stopwatch import Stopwatch

LIMIT_S = 20.0


class Bus:
    """A Flux with a memory log in this process."""

    def __init__(self, log: MemoryLog, groups: LocalGroups, channel: grpc.aio.Channel) -> None:
        self.log = log
        self.groups = groups
        self.flux: Any = flux_service_pb2_grpc.FluxServiceStub(channel)
        self.consumers: Any = consumer_service_pb2_grpc.ConsumerServiceStub(channel)

    async def create(self, **given: Any) -> None:
        await self.consumers.CreateConsumer(cs.CreateConsumerRequest(consumer=group(**given)))

    async def state(self) -> cs.ConsumerState:
        response = await self.consumers.GetConsumer(cs.GetConsumerRequest(name="work"))
        return response.state  # type: ignore[no-any-return]

    async def checkpoint(self, at: int) -> None:
        async with asyncio.timeout(LIMIT_S):
            while (await self.state()).checkpoint_sequence < at:
                await asyncio.sleep(0.01)


@pytest_asyncio.fixture
async def bus() -> AsyncIterator[Bus]:
    log = MemoryLog()
    hub = Hub(0, max_events=100, max_bytes=2**20)
    groups = await LocalGroups.open(log, MemoryStore())
    servicer = FluxServicer(log, hub, Publishing(log, EventRules(8)), Audience(10))
    consuming = Consuming(groups, max_streams=3, heartbeat_s=0.2)
    register = [add_flux(servicer, consuming), add_consumer_service(ConsumerServicer(groups, log))]
    async with open_server(
        "127.0.0.1", 0, register=register, services=SERVICES, board=HealthBoard(), drain_s=0.5
    ) as server:
        # Not open_channel: it dials no server of its own process.
        channel = grpc.aio.insecure_channel(server.address)
        yield Bus(log, groups, channel)
        await channel.close()
    await groups.close()
    await log.close()


class Consumer:
    """One stream of Consume, by hand."""

    def __init__(self, bus: Bus, *, events: int = 100, member: str = "m") -> None:
        self._call = bus.flux.Consume()
        self._open = pb.OpenConsume(
            consumer="work", member=member, credit=pb.Credit(events=events, bytes=2**30)
        )
        self.waiting: list[pb.Delivery] = []

    async def begin(self) -> pb.ConsumeOpened:
        await self.say(open=self._open)
        response = await self.next()
        assert response.WhichOneof("control") == "opened"
        return response.opened

    async def say(self, **action: Any) -> None:
        await self._call.write(pb.ConsumeRequest(**action))

    async def next(self) -> pb.ConsumeResponse:
        async with asyncio.timeout(LIMIT_S):
            response = await self._call.read()
        assert response is not grpc.aio.EOF, "the stream has ended"
        return response  # type: ignore[no-any-return]

    async def deliveries(self, count: int) -> list[pb.Delivery]:
        while len(self.waiting) < count:
            self.waiting += (await self.next()).deliveries
        taken, self.waiting = self.waiting[:count], self.waiting[count:]
        return taken

    async def control(self, kind: str) -> Any:
        while True:
            response = await self.next()
            self.waiting += response.deliveries
            if response.WhichOneof("control") == kind:
                return getattr(response, kind)

    async def half_close(self) -> None:
        await self._call.done_writing()

    async def end(self) -> None:
        """Half-closes and waits for the end."""
        await self.half_close()
        await self._read_on()

    def cancel(self) -> None:
        self._call.cancel()

    async def error(self) -> AitherError:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self._read_on()
        return from_rpc_error(caught.value)

    async def _read_on(self) -> None:
        async with asyncio.timeout(LIMIT_S):
            while await self._call.read() is not grpc.aio.EOF:
                pass


async def refused(call: Any) -> AitherError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value)


async def test_an_event_travels_whole_and_is_done_when_acknowledged(bus: Bus) -> None:
    await bus.create()
    sent = event("a.b")
    sent.headers["k"] = "v"
    sent.payload.type_url, sent.payload.value = "type.googleapis.com/x", b"\0" * 300
    await bus.log.append([sent])
    consumer = Consumer(bus)
    opened = await consumer.begin()
    assert (opened.epoch, opened.checkpoint_sequence, opened.leader_epoch) == (bus.log.epoch, 0, 0)
    (delivery,) = await consumer.deliveries(1)
    assert (delivery.event.id, delivery.event.subject) == (sent.id, "a.b")
    assert delivery.event.payload == sent.payload
    assert dict(delivery.event.headers) == {"k": "v"}
    assert (delivery.attempt, delivery.event.sequence) == (1, 1)
    assert 25 < delivery.deadline_time.seconds - delivery.event.recorded_time.seconds < 35
    await consumer.say(ack=pb.Ack(ack_ids=[delivery.ack_id]))
    await bus.checkpoint(1)
    await consumer.end()
    state = await bus.state()
    assert (state.acknowledged_events, state.delivered_events, len(state.members)) == (1, 1, 0)


async def test_half_closing_and_vanishing_return_what_was_out(bus: Bus) -> None:
    await bus.create()
    await bus.log.append(events(2))
    for end in ("half-close", "cancel"):
        consumer = Consumer(bus)
        await consumer.begin()
        await consumer.deliveries(2)
        if end == "cancel":
            consumer.cancel()
        else:
            await consumer.end()
    last = Consumer(bus)
    await last.begin()
    assert [one.attempt for one in await last.deliveries(2)] == [3, 3]


async def test_a_quiet_stream_shows_that_it_lives(bus: Bus) -> None:
    await bus.create(start_after=0)
    consumer = Consumer(bus)
    await consumer.begin()
    assert (await consumer.control("progress")).sequence == 0


async def test_each_heartbeat_is_answered_at_once(bus: Bus) -> None:
    await bus.create()
    consumer = Consumer(bus)
    await consumer.begin()
    watch = Stopwatch()
    for _ in range(50):
        await consumer.say(heartbeat=pb.MemberHeartbeat())
        await consumer.control("progress")
    assert watch.calm_s < 5, "the stream's own progress takes 10 s for as many"


async def test_an_ack_id_that_does_not_work_is_told_and_the_stream_goes_on(bus: Bus) -> None:
    await bus.create()
    consumer = Consumer(bus)
    await consumer.begin()
    await consumer.say(ack=pb.Ack(ack_ids=["never", "heard"]))
    told = await consumer.control("refused")
    assert list(told.ack_ids) == ["never", "heard"]
    assert told.message
    await bus.log.append(events(1))
    await consumer.deliveries(1)


async def test_nack_and_extend_do_what_they_say(bus: Bus) -> None:
    await bus.create()
    await bus.log.append(events(2))
    consumer = Consumer(bus)
    await consumer.begin()
    one, two = await consumer.deliveries(2)
    nack = pb.Nack(ack_ids=[one.ack_id], reason="not yet")
    nack.retry_delay.FromMilliseconds(10)
    await consumer.say(nack=nack)
    (again,) = await consumer.deliveries(1)
    assert (again.event.sequence, again.attempt) == (1, 2)
    extend = pb.Extend(ack_ids=[again.ack_id])
    extend.extension_duration.FromSeconds(60)
    await consumer.say(extend=extend)
    await consumer.say(
        nack=pb.Nack(ack_ids=[two.ack_id], action=pb.NACK_ACTION_PARK, reason="never")
    )
    await consumer.say(ack=pb.Ack(ack_ids=[again.ack_id]))
    await bus.checkpoint(2)
    page = await bus.consumers.ListParked(cs.ListParkedRequest(name="work"))
    (parked,) = page.events
    assert (parked.event.sequence, parked.attempts, parked.reason) == (2, 1, "never")
    replay = await bus.consumers.ReplayParked(cs.ReplayParkedRequest(name="work"))
    assert replay.replayed_events == 1
    assert (await consumer.deliveries(1))[0].event.sequence == 2


async def test_exclusive_members_hear_who_leads(bus: Bus) -> None:
    await bus.create(exclusive=True)
    await bus.log.append(events(1))
    first, second = Consumer(bus, member="first"), Consumer(bus, member="second")
    await first.begin()
    told = await first.control("leadership")
    assert told.active
    assert told.lease_duration.seconds == 10
    await second.begin()
    assert not (await second.control("leadership")).active
    await first.end()
    after = await second.control("leadership")
    assert after.active
    assert after.leader_epoch > told.leader_epoch
    assert [one.event.sequence for one in await second.deliveries(1)] == [1]


async def test_a_leader_that_may_not_know_that_it_is_gone_keeps_its_place_for_its_lease(
    bus: Bus,
) -> None:
    await bus.create(exclusive=True, lease_s=1)
    first, second = Consumer(bus, member="first"), Consumer(bus, member="second")
    await first.begin()
    assert (await first.control("leadership")).active
    await second.begin()
    assert not (await second.control("leadership")).active
    begun_s = asyncio.get_running_loop().time()
    await first.say(heartbeat=pb.MemberHeartbeat())
    await first.control("progress")
    first.cancel()
    told = None
    while told is None:
        await second.say(heartbeat=pb.MemberHeartbeat())
        response = await second.next()
        told = response.leadership if response.HasField("leadership") else None
    assert told.active
    assert asyncio.get_running_loop().time() - begun_s > 0.99


async def test_what_was_refused_is_told_though_the_member_has_said_its_last(bus: Bus) -> None:
    await bus.create()
    consumer = Consumer(bus)
    await consumer.begin()
    for number in range(20):
        await consumer.say(ack=pb.Ack(ack_ids=[f"{number}"]))
    await consumer.half_close()
    told = [(await consumer.control("refused")).ack_ids[0] for _ in range(20)]
    assert told == [f"{number}" for number in range(20)]


async def test_a_drain_is_told_and_what_is_done_by_then_still_counts(bus: Bus) -> None:
    await bus.create()
    await bus.log.append(events(1))
    consumer = Consumer(bus)
    await consumer.begin()
    (delivery,) = await consumer.deliveries(1)
    bus.groups.drain()
    closing = await consumer.control("closing")
    assert closing.reason == pb.CLOSING_REASON_DRAINING
    await consumer.say(ack=pb.Ack(ack_ids=[delivery.ack_id]))
    await consumer.end()
    await bus.checkpoint(1)


async def test_deleting_a_group_ends_its_streams(bus: Bus) -> None:
    await bus.create()
    consumer = Consumer(bus)
    await consumer.begin()
    await bus.consumers.DeleteConsumer(cs.DeleteConsumerRequest(name="work"))
    assert (await consumer.error()).reason == "CONSUMER_DELETED"


async def test_a_member_that_does_not_read_is_held_no_more_than_its_share(bus: Bus) -> None:
    await bus.create(max_outstanding_events=100_000)
    big = [event() for _ in range(64)]
    for one in big:
        one.payload.value = b"x" * 60_000
    for _ in range(8):
        for one in big:
            one.id += "x"
        await bus.log.append(big)
    consumer = Consumer(bus, events=10_000)
    await consumer.begin()
    async with asyncio.timeout(20):
        while not (out := (await bus.state()).outstanding_events):
            await asyncio.sleep(0.02)
    await asyncio.sleep(0.5)
    out = (await bus.state()).outstanding_events
    assert out * 60_000 < 16 * 2**20, f"{out} of {8 * 64} are on their way"
    assert len(await consumer.deliveries(8 * 64)) == 8 * 64


# What is asked wrongly


async def test_a_stream_begins_with_open(bus: Bus) -> None:
    consumer = Consumer(bus)
    await consumer.say(heartbeat=pb.MemberHeartbeat())
    assert (await consumer.error()).violations[0].field == "open"


async def test_whoever_never_opens_is_sent_away(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consuming_module, "OPEN_TIMEOUT_S", 0.05)
    assert (await Consumer(bus).error()).violations[0].field == "open"


@pytest.mark.parametrize(
    ("action", "field"),
    [
        ({"open": pb.OpenConsume(consumer="work")}, "action"),
        ({}, "action"),
        ({"nack": pb.Nack(reason="x" * 2000)}, "nack.reason"),
        ({"nack": pb.Nack(action=7)}, "nack.action"),  # type: ignore[arg-type]
        ({"nack": pb.Nack(retry_delay={"seconds": -1})}, "nack.retry_delay"),  # type: ignore[arg-type]
        ({"extend": pb.Extend(extension_duration={})}, "extend.extension_duration"),  # type: ignore[arg-type]
        ({"credit": pb.Credit(bytes=2**63)}, "credit.bytes"),
        ({"ack": pb.Ack(ack_ids=["x"] * 10_001)}, "ack.ack_ids"),
    ],
)
async def test_a_wrong_action_ends_the_stream_and_names_the_field(
    bus: Bus, action: dict[str, Any], field: str
) -> None:
    await bus.create()
    consumer = Consumer(bus)
    await consumer.begin()
    await consumer.say(**action)
    assert field in [one.field for one in (await consumer.error()).violations]


async def test_a_group_must_exist_and_streams_are_bounded(bus: Bus) -> None:
    consumer = Consumer(bus)
    await consumer.say(open=pb.OpenConsume(consumer="nobody"))
    assert (await consumer.error()).reason == "CONSUMER_NOT_FOUND"
    await bus.create()
    kept = [Consumer(bus, member=f"m{n}") for n in range(3)]
    for one in kept:
        await one.begin()
    assert (await Consumer(bus).error()).reason == "TOO_MANY_MEMBERS"
    await kept[0].end()
    await Consumer(bus).begin()


async def test_every_wrong_setting_is_named(bus: Bus) -> None:
    wrong = cs.Consumer(
        name="No",
        filters=["a..b"],
        max_deliveries=10**6,
        max_outstanding_events=10**6,
        start_after_sequence=2**64 - 1,
    )
    wrong.ack_deadline_duration.FromMilliseconds(10)
    wrong.lease_duration.FromSeconds(1000)
    wrong.backoff_durations.add().FromSeconds(-1)
    error = await refused(bus.consumers.CreateConsumer(cs.CreateConsumerRequest(consumer=wrong)))
    assert {one.field for one in error.violations} == {
        f"consumer.{name}"
        for name in (
            "name",
            "filters[0]",
            "ack_deadline_duration",
            "max_deliveries",
            "backoff_durations[0]",
            "max_outstanding_events",
            "start_after_sequence",
            "lease_duration",
        )
    }


@pytest.mark.parametrize("wrong", [{"seconds": 2**62}, {"seconds": 1, "nanos": 2**31 - 1}])
async def test_a_seek_to_what_is_no_time_is_refused(bus: Bus, wrong: Any) -> None:
    await bus.create()
    request = cs.SeekConsumerRequest(name="work", at_time=Timestamp(**wrong))
    error = await refused(bus.consumers.SeekConsumer(request))
    assert [one.field for one in error.violations] == ["at_time"]


async def test_defaults_are_told(bus: Bus) -> None:
    asked = cs.CreateConsumerRequest(consumer=cs.Consumer(name="work"))
    made = (await bus.consumers.CreateConsumer(asked)).consumer
    assert (made.max_deliveries, made.max_outstanding_events) == (5, 1000)
    assert (made.ack_deadline_duration.seconds, made.lease_duration.seconds) == (30, 10)
    assert [one.seconds for one in made.backoff_durations] == [1, 5, 30]
    assert (await bus.consumers.CreateConsumer(asked)).consumer == made


async def test_groups_and_parked_events_are_listed_in_pages(bus: Bus) -> None:
    for name in "abc":
        await bus.create(name=name)
    names: list[str] = []
    token = ""
    for _ in range(9):
        page = await bus.consumers.ListConsumers(
            cs.ListConsumersRequest(page_size=2, page_token=token)
        )
        names += [one.name for one in page.consumers]
        token = page.next_page_token
        if not token:
            break
    assert names == ["a", "b", "c"]
    await bus.create()
    await bus.log.append(events(5))
    consumer = Consumer(bus)
    await consumer.begin()
    ids = [one.ack_id for one in await consumer.deliveries(5)]
    await consumer.say(nack=pb.Nack(ack_ids=ids, action=pb.NACK_ACTION_PARK))
    await bus.checkpoint(5)
    found: list[int] = []
    token = ""
    for _ in range(9):
        parked = await bus.consumers.ListParked(
            cs.ListParkedRequest(name="work", page_size=2, page_token=token)
        )
        found += [one.event.sequence for one in parked.events]
        token = parked.next_page_token
        if not token:
            break
    assert found == [1, 2, 3, 4, 5]
    gone = await bus.consumers.DeleteParked(cs.DeleteParkedRequest(name="work", sequences=[1, 2]))
    assert gone.deleted_events == 2
    for call, request in (
        (bus.consumers.ListConsumers, cs.ListConsumersRequest(page_size=1001)),
        (bus.consumers.ListParked, cs.ListParkedRequest(name="work", page_size=-1)),
        (bus.consumers.ListParked, cs.ListParkedRequest(name="work", page_token="x")),
    ):
        assert (await refused(call(request))).code is grpc.StatusCode.INVALID_ARGUMENT


async def test_an_update_takes_the_fields_of_its_mask(bus: Bus) -> None:
    await bus.create(max_deliveries=4)

    async def update(mask: list[str] | None, **fields: Any) -> cs.Consumer:
        request = cs.UpdateConsumerRequest(consumer=cs.Consumer(name="work", **fields))
        if mask is not None:
            request.update_mask.CopyFrom(FieldMask(paths=mask))
        return (await bus.consumers.UpdateConsumer(request)).consumer  # type: ignore[no-any-return]

    changed = await update(["max_outstanding_events"], max_outstanding_events=7, max_deliveries=9)
    assert (changed.max_outstanding_events, changed.max_deliveries) == (7, 4)
    assert (await update(["max_deliveries"])).max_deliveries == 5, "unset is the default again"
    everything = await update(None, max_deliveries=8)
    assert (everything.max_deliveries, everything.max_outstanding_events) == (8, 1000)
    for mask, field in ((["nope"], "update_mask.paths[0]"), (["exclusive"], "consumer.exclusive")):
        request = cs.UpdateConsumerRequest(consumer=cs.Consumer(name="work", exclusive=True))
        request.update_mask.CopyFrom(FieldMask(paths=mask))
        error = await refused(bus.consumers.UpdateConsumer(request))
        assert error.violations[0].field == field


async def test_seeking_by_position_and_by_time(bus: Bus) -> None:
    await bus.create()
    await bus.log.append(events(3))
    seek = cs.SeekConsumerRequest(name="work", after_sequence=2)
    assert (await bus.consumers.SeekConsumer(seek)).checkpoint_sequence == 2
    by_time = cs.SeekConsumerRequest(name="work")
    by_time.at_time.FromSeconds(1)
    assert (await bus.consumers.SeekConsumer(by_time)).checkpoint_sequence == 0
    nothing = await refused(bus.consumers.SeekConsumer(cs.SeekConsumerRequest(name="work")))
    assert nothing.violations[0].field == "target"
    far = cs.SeekConsumerRequest(name="work", after_sequence=99)
    error = await refused(bus.consumers.SeekConsumer(far))
    assert error.code is grpc.StatusCode.OUT_OF_RANGE
    assert "after_sequence 99" in error.message
    assert "use 3 at most" in error.message
