"""The instruments of Flux, read as an exporter reads them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, aclosing
from typing import Any

import pytest
from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from aither.flux.v1 import flux_service_pb2 as pb
from aither_sdk.errors import InvalidArgument, ResourceExhausted
from aither_sdk.subjects import FilterSet
from flux_svc.fanout.audience import MAX_INFO_BYTES, MAX_NAMES, OTHER, Audience
from flux_svc.fanout.subscription import Request, Subscription
from flux_svc.metrics import CLIENT, REASON, STATE, observe
from flux_svc.publishing import Publishing
from flux_svc.validation import EventRules
from tests.conformance.log_house import event, events
from tests.flux.house import House


class Floor:
    """The rooms that are counted."""

    def __init__(self) -> None:
        self.house = House(log_events=50)
        self.publishing = Publishing(self.house.log, EventRules(8))
        self.audience = Audience(1_000)
        self.reader = InMemoryMetricReader()

    def subscription(
        self, name: str, *filters: str, position: int = 0, peer: str = "ipv4:1.2.3.4:5"
    ) -> Subscription:
        request = Request(
            filters=FilterSet(filters),
            excluded_sources=frozenset(),
            position=position,
            snapshot=False,
            stop_sequence=None,
            heartbeat_s=30,
            batch_events=4096,
            client_name=name,
            peer=peer,
        )
        return Subscription(request, self.house.hub, self.house.log)

    def read(self) -> Mapping[str, Mapping[Any, Any]]:
        """Name -> label -> value."""
        data = self.reader.get_metrics_data()
        assert data is not None
        found: dict[str, dict[Any, Any]] = {}
        for metric in data.resource_metrics[0].scope_metrics[0].metrics:
            for point in metric.data.data_points:
                label = next(iter((point.attributes or {}).values()), None)
                value = point.count if hasattr(point, "count") else point.value
                found.setdefault(metric.name.removeprefix("aither.flux."), {})[label] = value
        return found


@pytest.fixture
def floor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Floor]:
    it = Floor()
    provider = MeterProvider([it.reader])
    monkeypatch.setattr(metrics, "get_meter", provider.get_meter)
    observe(it.house.log, it.house.hub, it.publishing, it.audience)
    yield it
    provider.shutdown()


async def test_what_is_published_refused_and_repeated_is_counted(floor: Floor) -> None:
    batch = events(3)
    await floor.publishing.publish(pb.PublishRequest(events=batch))
    await floor.publishing.publish(pb.PublishRequest(events=batch[:1]))
    with pytest.raises(InvalidArgument):
        await floor.publishing.publish(pb.PublishRequest(events=[event("BAD")]))
    found = floor.read()
    assert found["events.published"] == {None: 3}
    assert found["events.duplicate"] == {None: 1}
    assert found["events.refused"] == {"INVALID_ARGUMENT": 1}
    assert found["published.size"] == {None: floor.house.log.info().bytes}
    assert found["append.duration"] == {None: 2}


async def test_what_is_delivered_and_missed_is_counted_by_reason(floor: Floor) -> None:
    for _ in range(10):
        await floor.house.log.append(events(10))
    floor.house.log.lose(60, 61)
    async with floor.house.following() as messages:
        async for message in messages:
            if message.HasField("caught_up"):
                break
    found = floor.read()
    assert found["events.delivered"] == {None: 48}
    assert found["events.missed"] == {"TRIMMED": 50, "COMPACTED": 2}
    assert found["reads.log"] == {None: 1}
    assert found["delivered.size"][None] > 48 * 20


async def test_subscriptions_are_counted_by_state_and_lag(floor: Floor) -> None:
    await floor.house.log.append(events(10))
    with ExitStack() as stack:
        for name, position in (("a", 3), ("a", 7), ("b", 9), ("", 1)):
            stack.enter_context(
                floor.audience.seated(floor.subscription(name, ">", position=position))
            )
        found = floor.read()
    assert found["subscriptions"] == {"LIVE": 0, "CATCHING_UP": 4, "BLOCKED": 0}
    assert found["lag.max"] == {None: 9}
    assert found["lag"] == {"a": 7, "b": 1, OTHER: 9}
    assert floor.read()["lag.max"] == {None: 0}


async def test_what_is_not_for_a_live_subscriber_is_no_lag_of_its(floor: Floor) -> None:
    subscription = floor.subscription("a", "mine")
    async with aclosing(subscription.messages()) as messages, asyncio.timeout(20):
        told = b""
        while not pb.SubscribeResponse.FromString(told).HasField("caught_up"):
            told = await anext(messages)
        waiting = asyncio.ensure_future(anext(messages))
        await asyncio.sleep(0)
        await floor.house.log.append(events(5, "yours"))
        assert (subscription.position, subscription.lag_events) == (5, 0)
        await floor.house.log.append(events(2, "mine"))
        # Told of nothing yet: both wait for it, and so do those of others behind them.
        assert (subscription.info().position_sequence, subscription.lag_events) == (0, 7)
        await waiting
        assert subscription.info().position_sequence == 7


async def test_client_names_make_a_bounded_number_of_series(floor: Floor) -> None:
    for n in range(3 * MAX_NAMES):
        with floor.audience.seated(floor.subscription(f"client-{n}", ">")):
            floor.read()
            await asyncio.sleep(0)
    assert len(floor.audience._names) == MAX_NAMES
    with floor.audience.seated(floor.subscription("one-more", ">")):
        assert set(floor.audience.lags()) == {OTHER}


def test_subscribers_may_come_and_go_while_an_exporter_looks(floor: Floor) -> None:
    """It looks from a thread of its own."""
    subscriptions = [floor.subscription(f"c{n}", "a.>") for n in range(20)]
    audience = floor.audience
    with ExitStack() as seats:
        for one in subscriptions[:10]:
            seats.enter_context(audience.seated(one))
        late = iter(subscriptions[10:])

        class Busy(Subscription):
            @property
            def lag_events(self) -> int:
                seats.enter_context(audience.seated(next(late)))
                return 0

            @property
            def state(self) -> pb.SubscriptionState.ValueType:
                seats.enter_context(audience.seated(next(late)))
                return pb.SUBSCRIPTION_STATE_LIVE

        subscriptions[0].__class__ = Busy
        assert sum(audience.states().values()) == 10
        assert audience.max_lag_events() == 0
        assert set(audience.lags()) == {f"c{n}" for n in range(12)}


def test_labels_are_spelt_as_documented() -> None:
    assert (REASON, STATE, CLIENT) == (
        "aither.flux.reason",
        "aither.flux.subscription.state",
        "aither.flux.client",
    )


def test_the_list_of_subscriptions_keeps_to_two_megabytes(floor: Floor) -> None:
    filters = [f"{'x' * 240}.f{n}" for n in range(64)]
    with ExitStack() as stack:
        for n in range(1_000):
            one = floor.subscription(f"{n:03}" + "n" * 125, *filters)
            stack.enter_context(floor.audience.seated(one))
        infos = floor.audience.infos(1_000)
        answer = pb.GetStreamInfoResponse(subscriptions=infos)
        assert 0.95 * MAX_INFO_BYTES < answer.ByteSize() <= MAX_INFO_BYTES
        assert (len(infos[0].filters), infos[0].filter_count) == (8, 64)
        assert [info.client_name[:3] for info in infos[:3]] == ["000", "001", "002"]
        assert len(floor.audience.infos(5)) == 5
        with pytest.raises(ResourceExhausted), floor.audience.seated(floor.subscription("full")):
            raise AssertionError("one too many was let in")
    assert len(floor.audience) == 0


def test_one_without_a_name_is_shown_by_its_address(floor: Floor) -> None:
    assert floor.subscription("", ">", peer="ipv4:9.9.9.9:9").info().client_name == "ipv4:9.9.9.9:9"
