"""Nodes that share groups, in one process: what a keeper writes, and what becomes of guests."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aither_sdk.errors import FailedPrecondition, Unavailable
from flux_svc.groups.base import Parked, ParkedKey
from flux_svc.groups.jetstream import journal
from flux_svc.groups.jetstream.groups import JetStreamGroups
from flux_svc.groups.jetstream.journal import Book, bodies_of
from flux_svc.groups.jetstream.parcel import Parcel, pack, piece_of, pieces, unpack
from flux_svc.groups.jetstream.place import FRAME_BYTES, OF_SUBJECT, Place
from flux_svc.groups.jetstream.store import JetStreamStore
from flux_svc.groups.local.store import Change, Header, PendingRow
from flux_svc.logs.jetstream.faults import IN_PROCESS, StreamRefused
from flux_svc.logs.jetstream.log import JetStreamLog
from flux_svc.logs.jetstream.stream import StreamPlan
from flux_svc.logs.jetstream.wire import Headers, Wire
from tests.conformance.groups_house import ack_ids, group, join, sequences, until_checkpoint
from tests.conformance.log_house import events
from tests.nats_server import NatsServer, nats_cluster, nats_server
from tests.stopwatch import Stopwatch

HEADER = Header(b"settings", "epoch", 5, 1, 2, 3, 4)
ONE = ParkedKey(1, "epoch")
_names = itertools.count()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    with nats_server(tmp_path_factory.mktemp("nats")) as server:
        yield server


@asynccontextmanager
async def node(
    server: NatsServer, plan: StreamPlan
) -> AsyncIterator[tuple[JetStreamLog, JetStreamGroups]]:
    log = await JetStreamLog.open([server.url], plan)
    groups = JetStreamGroups.open(log)
    try:
        await groups.list("", 1)
        yield log, groups
    finally:
        await groups.close()
        await log.close()


@pytest.fixture
def plan() -> StreamPlan:
    return StreamPlan(f"S{next(_names)}")


# Several nodes


async def test_members_of_two_nodes_share_a_group_and_both_see_it_alike(
    server: NatsServer, plan: StreamPlan
) -> None:
    async with node(server, plan) as (log, keeper), node(server, plan) as (_, guest):
        await guest.create(group())
        one, two = await join(keeper, member="one", events=10), await join(guest, member="two")
        await log.append(events(30))
        first, second = await one.deliveries(10), await two.deliveries(20)
        assert sorted(sequences(first + second)) == list(range(1, 31))
        assert await one.member.ack(ack_ids(first)) is None
        assert await two.member.ack(ack_ids(second)) is None
        await until_checkpoint(keeper, 30)
        assert await guest.get("work") == await keeper.get("work")


async def test_an_ack_id_works_for_its_own_member_only_on_whichever_node(
    server: NatsServer, plan: StreamPlan
) -> None:
    async with node(server, plan) as (log, keeper), node(server, plan) as (_, guest):
        await keeper.create(group())
        one, two = await join(keeper, member="one"), await join(guest, member="two", events=0)
        await log.append(events(1))
        found = await one.deliveries(1)
        refused = await two.member.ack(ack_ids(found))
        assert refused is not None
        assert await one.member.ack(ack_ids(found)) is None


async def test_a_keeper_that_leaves_in_peace_is_followed_at_once(
    server: NatsServer, plan: StreamPlan
) -> None:
    async with node(server, plan) as (_, first), node(server, plan) as (log, second):
        await second.create(group(ack_deadline_s=600))
        await log.append(events(3))
        reader = await join(second)
        await reader.member.ack(ack_ids((await reader.deliveries(3))[:1]))
        await until_checkpoint(second, 1)
        await first.close()
        with pytest.raises(Unavailable) as ended:
            await reader.until_lost()
        assert ended.value.reason == "GROUPS_MOVED"
        await reader.member.leave()
        watch = Stopwatch()
        again = await join(second)
        found = await again.deliveries(2)
        assert watch.calm_s < 3.5
        assert [(s, d.attempt) for s, d in zip(sequences(found), found, strict=True)] == [
            (2, 2),
            (3, 2),
        ]


async def test_what_a_guest_that_died_had_goes_to_the_others(
    server: NatsServer, plan: StreamPlan
) -> None:
    async with node(server, plan) as (log, keeper), node(server, plan) as (_, guest):
        await keeper.create(group(ack_deadline_s=600))
        stays = await join(keeper, member="stays", events=0)
        gone = await join(guest, member="gone")
        await log.append(events(3))
        await gone.deliveries(3)
        assert guest._life is not None
        guest._life.cancel()  # it says nothing any more, as if it were killed
        stays.member.credit(10, 2**20)
        found = await stays.deliveries(3)
        assert sequences(found) == [1, 2, 3]
        assert {one.attempt for one in found} == {2}
        members = (await keeper.get("work"))[1].members
        assert [one.name for one in members] == ["stays"]


async def test_a_member_of_a_guest_that_does_not_read_is_sent_no_more(
    server: NatsServer, plan: StreamPlan
) -> None:
    async with node(server, plan) as (log, keeper), node(server, plan) as (_, guest):
        await keeper.create(group(max_outstanding_events=10_000))
        slow = await join(guest, events=0)
        batch = events(40)
        for one in batch:
            one.payload.value = b"x" * 200_000
        for one in batch:
            await log.append([one])
        slow.member.credit(10_000, 2**40)

        async def out() -> int:
            return (await keeper.get("work"))[1].outstanding_events

        async with asyncio.timeout(20):
            while not await out():
                await asyncio.sleep(0.02)
        await asyncio.sleep(0.6)
        assert await out() < 30, "the whole backlog left for who does not read"
        assert sequences(await slow.deliveries(40)) == list(range(1, 41))


# The store


@asynccontextmanager
async def stores(server: NatsServer) -> AsyncIterator[tuple[Place, Wire]]:
    wire = await Wire.dial(server.url, name="test")
    place = Place(f"P{next(_names)}", 1)
    await place.make(wire)
    try:
        yield place, wire
    finally:
        await wire.close()


async def term(place: Place, wire: Wire, ended: list[str] | None = None) -> JetStreamStore:
    told = [] if ended is None else ended
    fence = await place.set_fence(wire, (await place.fence(wire)).sequence, "me")
    assert fence is not None
    store = JetStreamStore(place, wire, fence, lambda: told.append("over"))
    await store.load()
    return store


def row(sequence: int, attempts: int = 1) -> PendingRow:
    return PendingRow(sequence, attempts, 0, "why")


async def test_a_keeper_that_was_replaced_stores_nothing(server: NatsServer) -> None:
    async with stores(server) as (place, wire):
        ended: list[str] = []
        old = await term(place, wire, ended)
        await old.write(Change("g", header=HEADER, pending=[row(1)]))
        new = await term(place, wire)
        parked = Parked(ONE, b"frame", 1, "why", 7)
        for change in (
            Change("g", header=replace(HEADER, position=9)),
            Change("g", parked=[parked], done=[1]),
            Change("g", delete=True),
        ):
            with pytest.raises(Unavailable) as refused:
                await old.write(change)
            assert refused.value.reason == "GROUPS_MOVED"
        assert ended
        await new.write(Change("h", header=HEADER))
        stored = await (await term(place, wire)).load()
        assert stored.keys() == {"g", "h"}
        assert (stored["g"].header, list(stored["g"].pending)) == (HEADER, [row(1)])
        assert stored["g"].parked == {}


async def until_replicated(wire: Wire, place: Place) -> None:
    """Until the cluster can place a stream and its leader takes a fence."""
    async with asyncio.timeout(30.0):
        while True:
            try:
                await place.make(wire)
                await place.fence(wire)
                return
            except StreamRefused:
                await asyncio.sleep(0.1)


async def store_much_at_once(store: JetStreamStore) -> None:
    parked = [Parked(ParkedKey(n, "epoch"), b"frame", 1, "why", 7) for n in range(1, 9)]
    await asyncio.gather(
        *(store.write(Change(f"g{n}", header=HEADER, pending=[row(n)])) for n in range(8)),
        store.write(Change("p", header=HEADER, parked=parked)),
    )


async def test_what_replicas_take_one_at_a_time_is_not_taken_for_another_keeper(
    server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What nats-server does with 3 replicas, on a server without; the real one is below."""
    bears_on: set[str] = set()
    post = Wire.post

    async def one_at_a_time(
        wire: Wire, subject: str, body: bytes, headers: Headers
    ) -> dict[str, Any]:
        fenced = headers.get(OF_SUBJECT, "")
        if fenced and fenced in bears_on:
            raise StreamRefused(IN_PROCESS, "wrong last sequence")
        bears_on.add(fenced)
        try:
            return await post(wire, subject, body, headers)
        finally:
            bears_on.discard(fenced)

    async with stores(server) as (place, wire):
        monkeypatch.setattr(Wire, "post", one_at_a_time)
        ended: list[str] = []
        await store_much_at_once(await term(place, wire, ended))
        assert not ended
        stored = await (await term(place, wire)).load()
        assert (len(stored), len(stored["p"].parked)) == (9, 8)


@pytest.mark.slow
async def test_groups_on_replicas_change_at_once_and_the_keeper_stays(tmp_path: Path) -> None:
    with nats_cluster(tmp_path) as servers:
        wire = await Wire.dial(servers[0].url, name="test")
        place = Place("R", 3)
        try:
            await until_replicated(wire, place)
            ended: list[str] = []
            store = await term(place, wire, ended)
            await store_much_at_once(store)
            store._replicated = False  # as where somebody edits the stream
            await store_much_at_once(store)
            assert not ended
            stored = await (await term(place, wire)).load()
            assert (len(stored), len(stored["p"].parked)) == (9, 8)
        finally:
            await wire.close()


async def test_what_a_keeper_left_half_done_is_ended_by_the_next_for_good(
    server: NatsServer,
) -> None:
    async with stores(server) as (place, wire):
        store = await term(place, wire)
        rows = [row(1), row(2), PendingRow(ParkedKey(3, "epoch"), 1, 0, "")]
        await store.write(Change("g", header=HEADER, pending=rows))
        # Only the copy: the change that takes the row away was never stored. Of 3 the copy is gone.
        await store._park(store._books["g"], "g", Parked(ONE, b"one", 3, "", 7))
        store = await term(place, wire)
        # Whoever runs the group lets go of it: it is not to come back.
        await store.write(Change("g", unparked=[ONE]))
        again = Parked(ParkedKey(3, "epoch"), b"three", 1, "", 8)
        await store.write(Change("g", header=HEADER, parked=[again]))
        stored = (await (await term(place, wire)).load())["g"]
        assert (list(stored.pending), stored.parked) == ([row(2)], {again.key: 5})


async def test_parked_copies_are_fetched_within_the_bytes_asked_for(server: NatsServer) -> None:
    async with stores(server) as (place, wire):
        store = await term(place, wire)
        parked = [Parked(ParkedKey(n, "epoch"), bytes(1000), 1, "", 7) for n in range(1, 6)]
        await store.write(Change("g", header=HEADER, parked=parked))
        keys = [one.key for one in parked]
        for max_bytes, events in ((1, 1), (1999, 1), (3000, 3), (10_000, 5)):
            assert len(await store.parked("g", keys, max_bytes=max_bytes)) == events


def test_a_journal_of_a_newer_version_is_not_guessed_at() -> None:
    (body,) = bodies_of(Change("g", pending=[row(1)]), HEADER, "epoch", [], "a")
    newer = {**json.loads(body), "version": journal.VERSION + 1}
    with pytest.raises(FailedPrecondition) as refused:
        Book().read(json.dumps(newer).encode(), 1)
    assert refused.value.reason == "NEWER_SCHEMA"


async def test_an_event_whose_keeper_died_while_parking_it_is_parked_once(
    server: NatsServer,
) -> None:
    async with stores(server) as (place, wire):
        store = await term(place, wire)
        await store.write(Change("g", header=HEADER, pending=[row(1), row(2)]))
        # Only the copy: the change that takes the row away was never stored.
        await store._park(store._books["g"], "g", Parked(ONE, b"one", 3, "it is poison; ü\n", 7))
        store = await term(place, wire)
        stored = (await store.load())["g"]
        assert (list(stored.pending), stored.parked) == ([row(2)], {ONE: 3})
        again = Parked(ONE, b"other", 4, "again", 8)
        await store.write(Change("g", header=HEADER, parked=[again], done=[1]))
        store = await term(place, wire)
        assert (await store.load())["g"].parked == {ONE: 5}
        assert await store.parked("g", [ONE, ParkedKey(2, "epoch")], max_bytes=10) == [again]
        await store.write(Change("g", unparked=[ONE]))
        assert (await (await term(place, wire)).load())["g"].parked == {}


async def test_a_group_that_is_deleted_leaves_nothing_to_the_next_of_its_name(
    server: NatsServer,
) -> None:
    async with stores(server) as (place, wire):
        store = await term(place, wire)
        parked = Parked(ONE, b"one", 3, "", 7)
        await store.write(Change("g", header=HEADER, parked=[parked], pending=[row(2)]))
        await store.write(Change("g", delete=True))
        assert await (await term(place, wire)).load() == {}
        store = await term(place, wire)
        await store.write(Change("g", header=HEADER))
        stored = (await (await term(place, wire)).load())["g"]
        assert (list(stored.pending), stored.parked) == ([], {})
        held = await wire.ask(f"STREAM.INFO.{place.stream}", {})
        assert held["state"]["messages"] == 2  # the fence, and what was made


async def test_a_journal_stays_short_and_tells_the_same(
    server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "KEPT_ENTRIES", 8)
    async with stores(server) as (place, wire):
        store = await term(place, wire)
        await store.write(Change("g", header=HEADER, pending=[row(n) for n in range(50)]))
        for n in range(50, 120):
            await store.write(
                Change("g", header=replace(HEADER, position=n), pending=[row(n)], done=[n - 5])
            )
        left = [*range(45), *range(115, 120)]
        held = await wire.ask(f"STREAM.INFO.{place.stream}", {})
        assert held["state"]["messages"] < 20
        stored = (await (await term(place, wire)).load())["g"]
        assert stored.header.position == 119
        assert list(stored.pending) == [row(n) for n in left]


def test_a_change_in_parts_counts_only_with_the_last_of_them() -> None:
    rows = [PendingRow(n, 1, 0, "r" * 1000) for n in range(500)]
    bodies = bodies_of(
        Change("g", pending=rows, done=[7_000]), HEADER, "epoch", [row(900), row(3)], "a"
    )
    assert len(bodies) > 3
    assert max(map(len, bodies)) < 2**18
    whole, torn = Book(), Book()
    for at, body in enumerate(bodies, 1):
        assert whole.header is None
        whole.read(body, at)
    assert whole.header == HEADER
    assert {one.sequence for one, _ in whole.rows.values()} == {*range(500), 900}
    for at, body in enumerate(bodies[:-1], 1):
        torn.read(body, at)
    torn.read(bodies_of(Change("g", pending=[row(1)]), HEADER, "epoch", [], "b")[0], 99)
    assert list(torn.rows) == [1]


async def test_what_the_first_version_wrote_is_read_as_it_was_meant(server: NatsServer) -> None:
    header = ["cw==", "epoch", 9, 0, 0, 0, 0]
    entries: list[dict[str, Any]] = [
        {"rows": [[5, 2, 0, False, "why"], [1, 1, 0, True, ""], [2, 1, 0, True, ""]]},
        {"rows": [[6, 1, 0, False, ""]], "done": [2]},
    ]
    async with stores(server) as (place, wire):
        for n, entry in enumerate(entries):
            body = {"id": f"a{n}", "more": False, "clear": False, "done": [], "header": header}
            await wire.post(place.journal("g"), json.dumps({**body, **entry}).encode(), {})
        for n in (1, 3):  # copies that lie under their sequence alone
            headers = {"Aither-Attempts": "3", "Aither-Parked-Ns": "7", FRAME_BYTES: "3"}
            await wire.post(place.parked("g", str(n)), b"old", headers)
        store = await term(place, wire)
        stored = (await store.load())["g"]
        three = ParkedKey(3, "epoch")
        assert list(stored.pending) == [
            PendingRow(ONE, 1, 0, ""),
            row(5, 2),
            PendingRow(6, 1, 0, ""),
        ]
        assert stored.parked == {ONE: 3, three: 3}
        # They stay what they are when the group goes on in another log, however often it is read.
        seek = Change("g", header=replace(HEADER, epoch="other"), clear_pending=True)
        await store.write(seek)
        new = Parked(ParkedKey(1, "other"), b"other", 1, "new", 8)
        await store.write(Change("g", header=seek.header, parked=[new]))
        for _ in range(2):
            store = await term(place, wire)
            assert (await store.load())["g"].parked == {ONE: 3, three: 3, new.key: 5}
            await store.write(Change("g", header=seek.header))
        assert (await store.parked("g", [ONE], max_bytes=9))[0].frame == b"old"
        await store.write(Change("g", unparked=[ONE]))
        again = Parked(three, b"again", 1, "", 9)
        await store.write(Change("g", parked=[again]))
        store = await term(place, wire)
        assert (await store.load())["g"].parked == {three: 5, new.key: 5}
        assert await store.parked("g", [new.key, three], max_bytes=99) == [new, again]


def test_parcels_come_through_in_pieces_as_they_were() -> None:
    parcel = Parcel({"a": [1, "ü"], "b": None}, [b"", b"x" * 5000, b"\x00"])
    messages = list(pieces(b"s" * 16, 7, pack(parcel), 1000))
    assert len(messages) == 6
    found = [piece_of(one) for one in messages]
    assert [one.number for one in found] == list(range(7, 13))
    assert [one.more for one in found] == [True] * 5 + [False]
    values, blobs = unpack(b"".join(one.data for one in found))
    assert (values, list(blobs)) == (parcel.values, list(parcel.blobs))
    assert len(list(pieces(b"s" * 16, 0, b"", 1000))) == 1
