"""The pure buffer: under any sequence of sends, answers and breaks nothing is lost or reordered."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aither_sdk.publishing.buffer import (
    Batch,
    Entry,
    MisansweredError,
    Place,
    PublishBuffer,
)
from aither_sdk.publishing.limits import Limits, WhenFull

OPERATIONS = st.one_of(
    st.tuples(st.just("offer"), st.integers(1, 40)),
    st.tuples(st.just("send"), st.just(0)),
    st.tuples(st.just("answer"), st.just(0)),
    st.tuples(st.just("store and break"), st.integers(0, 5)),
    st.tuples(st.just("withdraw"), st.integers(0, 30)),
)


class Model:
    """A server with idempotency, and what became of each entry."""

    def __init__(self, when_full: WhenFull) -> None:
        limits = Limits(
            buffer_events=12, buffer_bytes=200, batch_events=4, batch_bytes=60, batches_in_flight=3
        )
        self.buffer: PublishBuffer[int] = PublishBuffer(limits, when_full)
        self.stream: list[Batch[int]] = []
        self.log: list[int] = []
        self.taken: list[Entry[int]] = []
        self.acknowledged: list[int] = []
        self.gone: set[int] = set()
        self.uncertain: set[int] = set()
        self.next = 0

    def offer(self, size: int) -> None:
        self.next += 1
        entry = Entry(bytes(size), self.next, events=size % 5 or 1)
        dropped = self.buffer.offer(entry, may_wait=True)
        for old in dropped:
            self.gone.add(old.ticket)
            self.uncertain |= {old.ticket} if old.sends else set()
        if entry.place is not Place.OUTSIDE:
            self.taken.append(entry)

    def send(self) -> None:
        batch = self.buffer.next_batch(0.0)
        if batch is not None:
            assert 1 <= batch.events == sum(e.events for e in batch.entries) <= 4
            assert len(batch.entries) == 1 or sum(e.size_bytes for e in batch.entries) <= 60
            self.stream.append(batch)
        assert self.buffer.batches_in_flight <= 3

    def store(self, batch: Batch[int]) -> None:
        self.log += [e.ticket for e in batch.entries if e.ticket not in self.log]

    def answer(self) -> None:
        if self.stream:
            batch = self.stream.pop(0)
            self.store(batch)
            entries = self.buffer.answered(batch.events)
            assert entries == batch.entries
            self.acknowledged += [e.ticket for e in entries if e.ticket not in self.gone]
            self.buffer.admit()

    def store_and_break(self, stored: int) -> None:
        for batch in self.stream[:stored]:
            self.store(batch)
        self.stream.clear()
        self.buffer.broken()

    def withdraw(self, which: int) -> None:
        if which < len(self.taken):
            entry = self.taken[which]
            if self.buffer.withdraw(entry):
                assert entry.sends == 0
                self.gone.add(entry.ticket)
                self.buffer.admit()

    def run(self, operations: list[tuple[str, int]]) -> None:
        for name, number in operations:
            if name == "offer":
                self.offer(number)
            elif name == "send":
                self.send()
            elif name == "answer":
                self.answer()
            elif name == "withdraw":
                self.withdraw(number)
            else:
                self.store_and_break(number)
            live = list(self.buffer.oldest_first())
            inside = [e for e in live if e.place is not Place.WAITING]
            assert self.buffer.events == sum(e.events for e in inside) <= 12
            assert self.buffer.size_bytes == sum(e.size_bytes for e in inside)
            assert [e.ordinal for e in live] == sorted(e.ordinal for e in live)

    def drain(self) -> None:
        for _ in range(1000):
            self.send()
            self.answer()
            if self.buffer.empty:
                return
        raise AssertionError("the buffer does not drain")


@settings(max_examples=300)
@given(st.lists(OPERATIONS, max_size=60), st.sampled_from(["wait", "refuse", "drop_oldest"]))
def test_nothing_is_lost_doubled_or_reordered(
    operations: list[tuple[str, int]], when_full: WhenFull
) -> None:
    model = Model(when_full)
    model.run(operations)
    model.drain()
    expected = [e.ticket for e in model.taken if e.ticket not in model.gone]
    assert model.acknowledged == expected
    certain = [n for n in model.log if n not in model.uncertain]
    assert certain == expected
    assert model.log == sorted(model.log)
    assert all(e.place is Place.GONE and e.frame == b"" for e in model.taken)


def test_lone_entry_goes_at_once_and_a_crowd_gathers() -> None:
    buffer: PublishBuffer[int] = PublishBuffer(Limits(), "wait")
    sizes = []
    for number in range(200):
        buffer.offer(Entry(b"x", number), may_wait=True)
        if (batch := buffer.next_batch(0.0)) is not None:
            sizes.append(len(batch.entries))
    assert sizes == [1, 1, 4, 16, 64]


def test_answer_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    buffer: PublishBuffer[int] = PublishBuffer(Limits(), "wait")
    with pytest.raises(MisansweredError):
        buffer.answered(1)
    buffer.offer(Entry(b"x", 1), may_wait=True)
    buffer.next_batch(0.0)
    with pytest.raises(MisansweredError, match="2 results came for a batch of 1"):
        buffer.answered(2)
    assert buffer.events == 1
    assert buffer.broken() == 1


def test_waiting_entries_come_in_before_later_ones() -> None:
    buffer: PublishBuffer[int] = PublishBuffer(Limits(buffer_events=1), "wait")
    first, second, third = (Entry(b"x", n) for n in range(3))
    for entry in (first, second):
        buffer.offer(entry, may_wait=True)
    buffer.offer(third, may_wait=False)
    assert (first.place, second.place, third.place) == (Place.UNSENT, Place.WAITING, Place.OUTSIDE)
    buffer.next_batch(0.0)
    buffer.answered(1)
    buffer.offer(third, may_wait=False)
    assert third.place is Place.OUTSIDE, "room belongs to those who wait for it"
    assert buffer.admit()
    assert second.place is Place.UNSENT


def test_entry_larger_than_the_buffer_is_taken_when_it_is_empty() -> None:
    buffer: PublishBuffer[int] = PublishBuffer(Limits(buffer_bytes=10), "refuse")
    large, small = Entry(bytes(100), 1), Entry(b"x", 2)
    buffer.offer(large, may_wait=False)
    buffer.offer(small, may_wait=False)
    assert large.place is Place.UNSENT
    assert small.place is Place.OUTSIDE


def test_withdrawn_entries_leave_no_heap_behind() -> None:
    buffer: PublishBuffer[int] = PublishBuffer(Limits(buffer_events=4), "wait")
    kept = Entry(b"x", 0)
    buffer.offer(kept, may_wait=True)
    for number in range(10_000):
        entry = Entry(b"x", number)
        buffer.offer(entry, may_wait=True)
        assert buffer.withdraw(entry)
    assert len(buffer._unsent) + len(buffer._waiting) < 200
    assert list(buffer.oldest_first()) == [kept]


def test_failing_what_was_sent_spares_the_rest() -> None:
    buffer: PublishBuffer[int] = PublishBuffer(Limits(), "wait")
    entries = [Entry(b"x", n) for n in range(3)]
    buffer.offer(entries[0], may_wait=True)
    buffer.next_batch(0.0)
    for entry in entries[1:]:
        buffer.offer(entry, may_wait=True)
    assert buffer.fail_sent() == entries[:1]
    batch = buffer.next_batch(0.0)
    assert batch is not None
    assert batch.entries == entries[1:]
