"""Flux and members of its groups are killed and stopped under load; recorded histories are checked.

What must hold: every event was acknowledged by somebody or is parked; the checkpoint passed nothing
else, at no moment; no attempt of an event was handed out twice, whoever crashed; a leader that was
stopped is replaced within its lease, and what it says afterwards is refused.
"""

from __future__ import annotations

import asyncio
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from aither.flux.v1 import consumer_service_pb2 as cs
from aither.flux.v1 import consumer_service_pb2_grpc, flux_service_pb2_grpc
from aither.flux.v1 import flux_service_pb2 as pb
from aither_sdk.events import new_event
from aither_sdk.publishing.publisher import Publisher
from tests.conformance.groups_house import group
from tests.processes import ServiceProcess, running
from tests.stopwatch import Stopwatch

MEMBER = Path(__file__).with_name("group_member.py")
WORKER = Path(__file__).with_name("group_worker.py")
MAX_DELIVERIES = 6
MEMBERS = 3
STOPS = 5
SEED = 20_261_121
LIMIT_S = 30.0


@dataclass
class History:
    """What the members saw and said."""

    delivered: list[tuple[int, int]] = field(default_factory=list)
    """(sequence, attempt)."""
    acknowledged: set[int] = field(default_factory=set)
    """Noted before it is said."""
    parked: set[int] = field(default_factory=set)
    """Asked to be parked, or given back for the last time."""
    checkpoints: list[tuple[int, frozenset[int]]] = field(default_factory=list)
    """A checkpoint, and what was not done when it was heard of."""
    published: int = 0


async def consume(
    flux: ServiceProcess, name: str, chance: random.Random, history: History, stop: asyncio.Event
) -> None:
    """A member that joins again whatever happens to it, and crashes now and then."""
    while not stop.is_set():
        try:
            async with grpc.aio.insecure_channel(flux.address) as channel:
                await _session(channel, name, chance, history)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await asyncio.sleep(0.05)  # the latter: a write after the end


async def _session(
    channel: grpc.aio.Channel, name: str, chance: random.Random, history: History
) -> None:
    stub: Any = flux_service_pb2_grpc.FluxServiceStub(channel)
    call = stub.Consume()
    credit = pb.Credit(events=64, bytes=2**24)
    opening = pb.OpenConsume(consumer="work", member=name, credit=credit)
    await call.write(pb.ConsumeRequest(open=opening))
    async for response in call:
        done, back, aside = [], [], []
        for one in response.deliveries:
            sequence = one.event.sequence
            history.delivered.append((sequence, one.attempt))
            fate = chance.random()
            if fate < 0.002:
                call.cancel()
                return
            if fate < 0.03:
                if one.attempt == MAX_DELIVERIES:
                    history.parked.add(sequence)
                back.append(one.ack_id)
            elif fate < 0.04:
                history.parked.add(sequence)
                aside.append(one.ack_id)
            else:
                history.acknowledged.add(sequence)
                done.append(one.ack_id)
        if not response.deliveries:
            continue
        await call.write(pb.ConsumeRequest(ack=pb.Ack(ack_ids=done)))
        nack = pb.Nack(ack_ids=back)
        nack.retry_delay.FromMilliseconds(chance.choice([0, 20]))
        await call.write(pb.ConsumeRequest(nack=nack))
        park = pb.Nack(ack_ids=aside, action=pb.NACK_ACTION_PARK, reason="aside")
        await call.write(pb.ConsumeRequest(nack=park))
        more = pb.Credit(events=len(response.deliveries), bytes=2**20)
        await call.write(pb.ConsumeRequest(credit=more))


async def publish(flux: ServiceProcess, history: History, stop: asyncio.Event) -> None:
    async with Publisher(
        flux.address, source="load", ack_timeout_s=60, close_timeout_s=60
    ) as publisher:
        number = 0
        while not stop.is_set():
            batch = [
                publisher.publish_event(new_event("load.x", {"n": n}, id=str(n), source="load"))
                for n in range(number, number + 20)
            ]
            results = await asyncio.gather(*batch)
            number += 20
            history.published = max(one.sequence for one in results)
            await asyncio.sleep(0.01)


async def state_of(flux: ServiceProcess, name: str = "work") -> cs.ConsumerState | None:
    """None while Flux is away."""
    async with grpc.aio.insecure_channel(flux.address) as channel:
        stub: Any = consumer_service_pb2_grpc.ConsumerServiceStub(channel)
        try:
            answer = await stub.GetConsumer(cs.GetConsumerRequest(name=name), timeout=5)
        except grpc.aio.AioRpcError:
            return None
        return answer.state  # type: ignore[no-any-return]


async def watch(flux: ServiceProcess, history: History, stop: asyncio.Event) -> None:
    while not stop.is_set():
        state = await state_of(flux)
        if state is not None:
            at = state.checkpoint_sequence
            seen = {sequence for sequence, _ in history.delivered}
            done = history.acknowledged | history.parked
            history.checkpoints.append((at, frozenset(n for n in seen - done if n <= at)))
        await asyncio.sleep(0.05)


async def create(flux: ServiceProcess, **given: Any) -> None:
    async with grpc.aio.insecure_channel(flux.address) as channel:
        stub: Any = consumer_service_pb2_grpc.ConsumerServiceStub(channel)
        await stub.CreateConsumer(cs.CreateConsumerRequest(consumer=group(**given)))


async def parked_in(flux: ServiceProcess) -> dict[int, cs.ParkedEvent]:
    async with grpc.aio.insecure_channel(flux.address) as channel:
        stub: Any = consumer_service_pb2_grpc.ConsumerServiceStub(channel)
        page = await stub.ListParked(cs.ListParkedRequest(name="work", page_size=1000))
        assert not page.next_page_token
        return {one.event.sequence: one for one in page.events}


async def until(flux: ServiceProcess, wanted: Callable[[cs.ConsumerState], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while True:
            state = await state_of(flux)
            if state is not None and wanted(state):
                return
            await asyncio.sleep(0.05)


async def _under_kills(tmp_path: Path, kills: int, seed: int) -> None:
    chance = random.Random(seed)
    history = History()
    with running("flux_svc", tmp_path) as flux:
        await create(
            flux, filters=["load.>"], max_deliveries=MAX_DELIVERIES, backoffs_s=[0.02, 0.05]
        )
        loading, working = asyncio.Event(), asyncio.Event()
        tasks = [
            asyncio.create_task(
                consume(flux, f"m{n}", random.Random(chance.random()), history, working)
            )
            for n in range(MEMBERS)
        ]
        watcher = asyncio.create_task(watch(flux, history, working))
        load = asyncio.create_task(publish(flux, history, loading))
        for _ in range(kills):
            await asyncio.sleep(chance.uniform(0.1, 0.5))
            before = len(history.acknowledged)
            await asyncio.to_thread(flux.kill)
            await asyncio.to_thread(flux.start)
            async with asyncio.timeout(LIMIT_S):
                while len(history.acknowledged) <= before:
                    await asyncio.sleep(0.01)
                    assert not any(task.done() for task in (*tasks, load)), "one gave up"
        loading.set()
        async with asyncio.timeout(LIMIT_S):
            await load
        last = history.published
        await until(
            flux,
            lambda now: (
                now.checkpoint_sequence >= last and not now.retrying_events + now.outstanding_events
            ),
        )
        parked = await parked_in(flux)
        state = await state_of(flux)
        working.set()
        for task in (*tasks, watcher):
            task.cancel()
        await asyncio.wait([*tasks, watcher])
        stored = await _stored(flux)
    assert state is not None
    print(f"seed {seed}: {len(stored)} events, {len(history.delivered)} deliveries, {state}")
    lost = stored - history.acknowledged - parked.keys()
    assert not lost, f"neither acknowledged nor parked: {sorted(lost)[:10]}"
    twice = [one for one, times in Counter(history.delivered).items() if times > 1]
    assert not twice, f"an attempt was handed out twice: {twice[:10]}"
    assert max(attempt for _, attempt in history.delivered) <= MAX_DELIVERIES
    assert any(attempt > 1 for _, attempt in history.delivered)
    for at, undone in history.checkpoints:
        assert not undone - parked.keys(), f"checkpoint {at} passed {sorted(undone)[:10]}"
    assert state.missed_events == 0


async def _stored(flux: ServiceProcess) -> set[int]:
    found: set[int] = set()
    async with grpc.aio.insecure_channel(flux.address) as channel:
        stub: Any = flux_service_pb2_grpc.FluxServiceStub(channel)
        at = 1
        for _ in range(10_000):
            page = await stub.Read(
                pb.ReadRequest(filters=["load.>"], from_sequence=at, max_events=4096)
            )
            found |= {one.sequence for one in page.events}
            if page.end_reached:
                break
            at = page.next_sequence
    return found


@pytest.mark.timeout(120)
async def test_no_event_is_lost_and_no_attempt_forgotten_over_kills_of_flux(
    tmp_path: Path,
) -> None:
    await _under_kills(tmp_path, 2, SEED)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(5))
async def test_the_same_over_many_more_kills(tmp_path: Path, seed: int) -> None:
    await _under_kills(tmp_path, 30, seed)


# Members that are processes


class MemberProcess:
    """`group_member.py` or another `program` like it, with what it told."""

    def __init__(self, flux: ServiceProcess, name: str, handling_s: float, program: Path) -> None:
        self.told: list[dict[str, Any]] = []
        self._process = subprocess.Popen(
            [sys.executable, str(program), flux.address, "work", name, str(handling_s)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.told.append(json.loads(line))

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    async def ended(self) -> int:
        return await asyncio.to_thread(self._process.wait, LIMIT_S)

    async def hear(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first it tells, or has told, that is wanted."""
        end_s = time.monotonic() + LIMIT_S
        while time.monotonic() < end_s:
            for one in list(self.told):
                if wanted(one):
                    return one
            await asyncio.sleep(0.02)
        raise AssertionError(f"never told; it told {self.told}")

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait(LIMIT_S)
        self._reader.join(LIMIT_S)
        assert self._process.stdout is not None
        self._process.stdout.close()


@contextmanager
def member(
    flux: ServiceProcess, name: str, handling_s: float = 0.0, program: Path = MEMBER
) -> Iterator[MemberProcess]:
    process = MemberProcess(flux, name, handling_s, program)
    try:
        yield process
    finally:
        process.close()


async def _works(epoch: int, *members: MemberProcess) -> MemberProcess:
    """Whichever has begun a handler just now, under a newer epoch."""
    async with asyncio.timeout(LIMIT_S):
        while True:
            for one in members:
                last = one.told[-1] if one.told else {"epoch": 0}
                if last["epoch"] > epoch and last["kind"] == "begun":
                    return one
            await asyncio.sleep(0.01)


def _is(told: dict[str, Any], **what: Any) -> bool:
    return told.items() >= what.items()


async def put(flux: ServiceProcess, *subjects: str) -> list[int]:
    async with Publisher(flux.address, source="test") as publisher:
        results = await asyncio.gather(*(publisher.publish(subject) for subject in subjects))
    return sorted(one.sequence for one in results)


@pytest.mark.timeout(120)
async def test_an_event_that_kills_its_handler_is_parked_and_its_neighbours_are_handled(
    tmp_path: Path,
) -> None:
    with running("flux_svc", tmp_path) as flux:
        await create(flux, filters=["job.>"], max_deliveries=2)
        poison, good = await put(flux, "job.poison", "job.good")
        for attempt in (1, 2):
            with member(flux, f"victim{attempt}") as victim:
                told = await victim.hear(lambda one: one["kind"] == "delivery")
                assert (told["at"], told["attempt"]) == (poison, attempt)
                assert await victim.ended() == -signal.SIGKILL
        with member(flux, "survivor") as survivor:
            told = await survivor.hear(lambda one: one["kind"] == "acked")
            assert told["at"] == good
            await until(flux, lambda state: state.checkpoint_sequence >= good)
        parked = await parked_in(flux)
        assert parked.keys() == {poison}
        assert parked[poison].attempts == 2
        assert "victim2" in parked[poison].reason


@pytest.mark.timeout(120)
async def test_a_stopped_leader_is_replaced_within_its_lease_and_refused_afterwards(
    tmp_path: Path,
) -> None:
    with running("flux_svc", tmp_path) as flux:
        await create(flux, filters=["job.>"], exclusive=True, lease_s=1)
        await put(flux, "job.one")
        # It is still at work when it is stopped, and acknowledges when it wakes up.
        with member(flux, "old", handling_s=3) as old:
            led = await old.hear(lambda one: one["kind"] == "leadership")
            with member(flux, "heir") as heir:
                await heir.hear(lambda one: one["kind"] == "leadership" and not one["active"])
                delivery = await old.hear(lambda one: one["kind"] == "delivery")
                old.signal(signal.SIGSTOP)
                watch = Stopwatch()
                taken = await heir.hear(lambda one: one["kind"] == "leadership" and one["active"])
                assert watch.calm_s < 3
                assert led["active"]
                assert taken["epoch"] > led["epoch"]
                again = await heir.hear(lambda one: one["kind"] == "acked")
                assert again["at"] == delivery["at"]
                old.signal(signal.SIGCONT)
                told = await old.hear(lambda one: one["kind"] == "refused")
                assert told["ids"] == [delivery["id"]]
                lost = await old.hear(lambda one: one["kind"] == "lease_lost")
                assert lost["ids"] == [delivery["id"]]
                await old.hear(lambda one: one["kind"] == "leadership" and not one["active"])
                state = await state_of(flux)
                assert state is not None
                assert (state.leader_epoch, state.acknowledged_events) == (taken["epoch"], 1)


@pytest.mark.slow
async def test_a_worker_that_was_stopped_begins_nothing_once_another_leads(tmp_path: Path) -> None:
    """Judged by the history that both tell, on the one clock of the machine."""
    with running("flux_svc", tmp_path) as flux:
        await create(flux, filters=["job.>"], exclusive=True, lease_s=1, max_deliveries=1000)
        await put(flux, *["job.one"] * 2000)
        with (
            member(flux, "one", 0.02, WORKER) as one,
            member(flux, "two", 0.02, WORKER) as two,
        ):
            epoch = 0
            for _ in range(STOPS):
                leader = await _works(epoch, one, two)
                epoch = leader.told[-1]["epoch"]
                leader.signal(signal.SIGSTOP)
                await _works(epoch, two if leader is one else one)
                leader.signal(signal.SIGCONT)
                await leader.hear(partial(_is, kind="resigned", epoch=epoch))
        told = sorted(one.told + two.told, key=lambda what: what["at_s"])
    newest = 0
    for what in told:
        if what["kind"] == "begun":
            assert what["epoch"] >= newest, f"it began after epoch {newest} did: {what}"
        if what["kind"] != "resigned":
            newest = max(newest, what["epoch"])
    assert newest > STOPS


@pytest.mark.timeout(120)
async def test_a_flux_that_was_stopped_takes_no_lease_from_who_kept_talking(
    tmp_path: Path,
) -> None:
    with running("flux_svc", tmp_path) as flux:
        await create(flux, exclusive=True, lease_s=1)
        with member(flux, "leader") as leader:
            told = await leader.hear(lambda one: one["kind"] == "leadership" and one["active"])
            flux.signal(signal.SIGSTOP)
            await asyncio.sleep(2.8)
            flux.signal(signal.SIGCONT)
            await asyncio.sleep(0.5)
            state = await state_of(flux)
            assert state is not None
            assert state.leader_epoch == told["epoch"]
