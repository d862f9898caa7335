"""The groups' store in JetStream, for as long as one node keeps them.

A change is one message of its group's journal; a large one is several, and only the last of them
makes it count. Parked copies are messages of their own, stored before the change that takes them
off the pending rows and let go before the change that forgets them: a keeper that dies in between
leaves a copy twice told (the newer stands in the older one's place), never none. The next keeper
ends what it had begun (`load`).

Every message stands behind the fence. With replicas nats-server takes one such message at a time
and refuses what comes while it is on its way to them: so they go one after the other then.
"""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections import defaultdict
from collections.abc import Callable, Coroutine, Sequence
from contextlib import nullcontext, suppress
from typing import Any
from urllib.parse import quote, unquote

from aither_sdk.errors import AitherError, Unavailable
from flux_svc.groups.base import Parked, ParkedKey
from flux_svc.groups.jetstream.journal import Book, bodies_of
from flux_svc.groups.jetstream.place import FRAME_BYTES, ROLLUP, Kept, Place
from flux_svc.groups.local.store import Change, Header, RowKey, Stored
from flux_svc.logs.jetstream.faults import (
    IN_PROCESS,
    WRONG_LAST_SEQUENCE,
    StreamRefused,
    fault_of,
)
from flux_svc.logs.jetstream.messages import header_bytes
from flux_svc.logs.jetstream.wire import Headers, Wire

_ATTEMPTS, _PARKED_NS, _REASON = "Aither-Attempts", "Aither-Parked-Ns", "Aither-Reason"
_TOGETHER = 64
"""Questions that are asked at once."""
_FETCHED = 16
"""Parked copies fetched at once, of up to 1 MiB each."""
_TRIES = 40
_BEHIND_S = 0.05
_IN_PROCESS_S = 0.01


class JetStreamStore:
    """For one term: of one wire and one fence. Of no use after it."""

    persistent = True

    def __init__(self, place: Place, wire: Wire, fence: int, ended: Callable[[], None]) -> None:
        self._place = place
        self._wire = wire
        self._behind = place.behind(fence)
        self._fence = fence
        self._ended = ended
        self._books: dict[str, Book] = {}
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        """A group's changes are stored one after the other, in the order of the calls."""
        self._replicated = place.replicas > 1
        self._alone = asyncio.Lock()
        """Held while a message is on its way, where there are replicas."""
        self._writer = uuid.uuid4().hex[:8]
        self._changes = itertools.count()
        self._writing: set[asyncio.Task[None]] = set()

    async def load(self) -> dict[str, Stored]:
        place, wire = self._place, self._wire
        books: defaultdict[str, Book] = defaultdict(Book)
        try:
            for group, at, body in await place.journals(wire, self._fence):
                books[group].read(body, at)
            copies = await place.copies(wire, self._fence)
        except StreamRefused as refused:
            raise fault_of(refused, place.stream) from refused
        for name, book in books.items():
            if book.header is None:
                continue
            book.found(copies.get(name, ()))
            self._books[name] = book
        for name, book in self._books.items():
            if ended := _ended(book):
                await self._in_turn(Change(name, done=ended))
        return {name: _stored(book) for name, book in self._books.items()}

    async def write(self, change: Change) -> None:
        """Raises Unavailable GROUPS_MOVED once another node keeps the groups."""
        task = asyncio.get_running_loop().create_task(
            self._in_turn(change), name=f"flux:group-store:{change.name}"
        )
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)
        await asyncio.shield(task)

    async def parked(self, name: str, keys: Sequence[ParkedKey], *, max_bytes: int) -> list[Parked]:
        book = self._books.get(name, Book())
        known = [one for one in keys if one in book.parked]
        chosen: list[ParkedKey] = []
        size = 0
        for key in known:
            size += book.parked[key].frame_bytes
            if chosen and size > max_bytes:
                break
            chosen.append(key)
        found: list[Parked] = []
        for start in range(0, len(chosen), _FETCHED):
            some = chosen[start : start + _FETCHED]
            copies = await asyncio.gather(*(self._copy(book, one) for one in some))
            found += [one for one in copies if one is not None]
        return found

    async def close(self) -> None:
        """Lets what is on its way end; each step of it is bounded."""
        if self._writing:
            await asyncio.wait(self._writing)

    async def _in_turn(self, change: Change) -> None:
        async with self._turns[change.name]:
            try:
                await self._write(change)
            except StreamRefused as refused:
                if refused.code in WRONG_LAST_SEQUENCE:
                    self._ended()
                    raise moved() from refused
                raise fault_of(refused, self._place.stream) from refused

    async def _write(self, change: Change) -> None:
        book = self._books.get(change.name) or Book()
        header = change.header or book.header
        if header is None:
            return  # of a group that was deleted
        copies = [self._park(book, change.name, one) for one in change.parked]
        gone = [one for one in change.unparked if one in book.parked]
        await _together([*copies, *(self._unpark(book, change.name, one) for one in gone)])
        if change.delete or change.header or change.pending or change.done or change.clear_pending:
            await self._note(book, change, header)
        if change.delete:
            await self._forget(change.name, book)
            return
        self._books[change.name] = book
        before = book.forget()
        if before is not None:
            # What is not forgotten now is forgotten later, or read once more.
            with suppress(StreamRefused, AitherError):
                await self._place.purge(self._wire, self._place.journal(change.name), before)

    async def _note(self, book: Book, change: Change, header: Header) -> None:
        id = f"{self._writer}{next(self._changes):x}"
        bodies = bodies_of(change, header, book.bare_epoch or header.epoch, book.old_rows(), id)
        subject = self._place.journal(change.name)
        places = [await self._post(subject, body, self._behind) for body in bodies]
        book.write(bodies, places)

    async def _forget(self, name: str, book: Book) -> None:
        """Bounded by the entry that says so: whoever makes the group again writes behind it."""
        self._books.pop(name, None)
        place, at = self._place, book.deleted_at
        with suppress(StreamRefused, AitherError):
            await place.purge(self._wire, place.parked(name, ">"), at)
            await place.purge(self._wire, place.journal(name), at)
            await place.delete(self._wire, at)

    async def _park(self, book: Book, name: str, one: Parked) -> None:
        headers: Headers = {
            **self._behind,
            **ROLLUP,
            _ATTEMPTS: str(one.attempts),
            _PARKED_NS: str(one.parked_ns),
            FRAME_BYTES: str(len(one.frame)),
        }
        # The reason gives way where the server takes no more.
        room = self._wire.max_payload - header_bytes(headers) - len(one.frame) - 64
        reason = one.reason
        while len(quote(reason)) > max(0, room):
            reason = reason[: len(reason) // 2]
        headers[_REASON] = quote(reason)
        before = book.parked.get(one.key)
        end = f"{one.sequence}.{one.key.epoch}" if before is None else before.subject
        at = await self._post(self._place.parked(name, end), one.frame, headers)
        book.parked[one.key] = Kept(end, at, len(one.frame))

    async def _unpark(self, book: Book, name: str, key: ParkedKey) -> None:
        """An empty message takes the copy's place, then goes itself."""
        subject = self._place.parked(name, book.parked[key].subject)
        at = await self._post(subject, b"", {**self._behind, **ROLLUP})
        book.parked.pop(key, None)
        with suppress(StreamRefused, AitherError):
            await self._place.delete(self._wire, at)

    async def _copy(self, book: Book, key: ParkedKey) -> Parked | None:
        for _ in range(_TRIES):
            if key not in book.parked:
                return None
            try:
                found = await self._place.message(self._wire, book.parked[key].at)
            except StreamRefused as refused:
                raise fault_of(refused, self._place.stream) from refused
            if found is not None:
                headers = found.headers or {}
                return Parked(
                    key,
                    found.data,
                    int(headers[_ATTEMPTS]),
                    unquote(headers.get(_REASON, "")),
                    int(headers[_PARKED_NS]),
                )
            await asyncio.sleep(_BEHIND_S)
        raise Unavailable(
            f"the replicas of the groups' stream lack the copy of event {key.sequence}; repeat in "
            "a moment",
            reason="LOG_BEHIND",
            retry_after_s=0.5,
        )

    async def _post(self, subject: str, body: bytes, headers: Headers) -> int:
        """Where the message stands now."""
        tries = 0
        while True:
            try:
                async with self._alone if self._replicated else nullcontext():
                    return int((await self._wire.post(subject, body, headers))["seq"])
            except StreamRefused as refused:
                tries += 1
                if refused.code != IN_PROCESS or tries == _TRIES:
                    raise
                if (await self._place.fence(self._wire)).sequence != self._fence:
                    raise
            self._replicated = True  # or somebody is about to take the fence
            await asyncio.sleep(_IN_PROCESS_S)


def moved() -> Unavailable:
    return Unavailable(
        "another node keeps the groups from now on; join again, what was out is delivered again",
        reason="GROUPS_MOVED",
        retry_after_s=0.25,
    )


def _ended(book: Book) -> list[RowKey]:
    """Rows that would not be there if a keeper had not died in the middle of parking or letting
    go. They go before anything becomes of the copies, or they would stand for another delivery."""
    assert book.header is not None
    found: list[RowKey] = []
    for key, (_, at) in book.rows.items():
        if isinstance(key, ParkedKey):
            if key not in book.parked:
                found.append(key)  # let go, for it was done
        else:
            copy = book.parked.get(ParkedKey(key, book.header.epoch))
            if copy is not None and copy.at > at:
                found.append(key)  # parked
    return found


def _stored(book: Book) -> Stored:
    assert book.header is not None
    rows = sorted((row for row, _ in book.rows.values()), key=lambda row: row.sequence)
    sizes = {key: kept.frame_bytes for key, kept in book.parked.items()}
    return Stored(book.header, rows, sizes)


async def _together(work: Sequence[Coroutine[Any, Any, None]]) -> None:
    """All of it, some at a time. Raises the first failure once those beside it have ended."""
    for start in range(0, len(work), _TOGETHER):
        some = work[start : start + _TOGETHER]
        failures = [
            one
            for one in await asyncio.gather(*some, return_exceptions=True)
            if isinstance(one, BaseException)
        ]
        if failures:
            for rest in work[start + _TOGETHER :]:
                rest.close()
            raise failures[0]
