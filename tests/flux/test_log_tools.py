"""verify, repair and backup on logs that are whole, damaged, and in use."""

from __future__ import annotations

import json
import os
import random
import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest

from aither.flux.v1.flux_service_pb2 import GAP_REASON_UNREADABLE
from aither_sdk.errors import AitherError, DataLoss, FailedPrecondition
from flux_svc.groups.base import Parked, ParkedKey
from flux_svc.groups.local.sqlite_store import SqliteStore
from flux_svc.groups.local.sqlite_tables import APPLICATION_ID, STEPS
from flux_svc.groups.local.store import Change, Header, PendingRow
from flux_svc.logs.base import Missing
from flux_svc.logs.sqlite.file import FILE_NAME, REPAIR_MARK, connect, limit_size
from flux_svc.logs.sqlite.log import SqliteLog
from flux_svc.tools import repair as repair_room
from flux_svc.tools.__main__ import main
from flux_svc.tools.backup import back_up
from flux_svc.tools.repair import repair
from flux_svc.tools.verify import verify
from tests.clock import FakeClock
from tests.conformance.log_house import event, holes_of, read_all, sequences

COUNT = 3000


async def _written(folder: Path, count: int = COUNT) -> SqliteLog:
    clock = FakeClock()
    log = await SqliteLog.open(folder, clock=clock)
    batch = [event(f"a.{n % 7}", id=f"x{n}", expire_ns=10**18 + n) for n in range(1, count + 1)]
    for one in batch:
        one.payload.value = b"payload" * 10
    for start in range(0, count, 1000):
        await log.append(batch[start : start + 1000])
        clock.advance(5)
    await log.remove([10, 11, 500])
    await log.trim(4)
    return log


def _run(folder: Path, statement: str, *values: object) -> None:
    with closing(sqlite3.connect(folder / FILE_NAME, isolation_level=None)) as connection:
        connection.execute(statement, values)


def _damage_a_page(folder: Path, like: str) -> None:
    """Overwrites the leaf page that an event lies on."""
    path = folder / FILE_NAME
    content = bytearray(path.read_bytes())
    at = content.index(like.encode()) // 4096 * 4096
    content[at : at + 4096] = b"\xa5" * 4096
    path.write_bytes(content)


async def test_a_whole_log_is_called_so_while_it_is_used_and_after(tmp_path: Path) -> None:
    log = await _written(tmp_path)
    found = verify(tmp_path)
    assert (found.count, found.events, found.left_out) == (0, COUNT - 6, "Flux is running")
    await log.close()
    found = verify(tmp_path)
    assert (found.count, found.events, found.left_out) == (0, COUNT - 6, "")


@pytest.mark.parametrize(
    ("statement", "told"),
    [
        (
            "UPDATE events SET frame = zeroblob(9) WHERE sequence = 77",
            "event 77: its ch",
        ),
        ("UPDATE events SET subject = 'a.9' WHERE sequence = 77", "event 77: its columns differ"),
        ("UPDATE events SET recorded_ns = 1 WHERE sequence = 77", "event 77: its columns differ"),
        ("UPDATE stream SET events = events + 1", "totals: events"),
        ("UPDATE stream SET bytes = 5", "totals: bytes"),
        ("UPDATE stream SET floor = 2", "totals: first sequence"),
        ("DELETE FROM events WHERE sequence = 3000", "totals: newest sequence"),
        ("UPDATE subjects SET last_sequence = 4 WHERE subject = 'a.4'", 'subject "a.4"'),
    ],
)
async def test_what_is_wrong_is_named(tmp_path: Path, statement: str, told: str) -> None:
    await (await _written(tmp_path)).close()
    _run(tmp_path, statement)
    found = verify(tmp_path)
    assert found.count
    assert any(told in one for one in found.told), found.told


async def test_a_damaged_page_is_found(tmp_path: Path) -> None:
    await (await _written(tmp_path)).close()
    _damage_a_page(tmp_path, "x1500")
    found = verify(tmp_path)
    assert any(low <= 1500 <= high for low, high in found.damaged)


async def test_where_there_is_no_log_it_says_so(tmp_path: Path) -> None:
    for tool in (verify, repair, lambda folder: back_up(folder, folder)):
        with pytest.raises(FailedPrecondition) as refused:
            tool(tmp_path)
        assert refused.value.reason == "NO_LOG"


async def test_a_repair_takes_out_what_is_damaged_and_readers_are_told(tmp_path: Path) -> None:
    log = await _written(tmp_path)
    before = {one.sequence: one for one in await read_all(log)}
    epoch, position = log.epoch, log.info().last_sequence
    with pytest.raises(FailedPrecondition) as refused:
        repair(tmp_path)
    assert refused.value.reason == "LOG_IN_USE"
    await log.close()
    _run(tmp_path, "UPDATE events SET frame = x'00' WHERE sequence IN (77, 78, 3000)")
    with pytest.raises(AitherError):
        await SqliteLog.open(tmp_path)
    done = repair(tmp_path)
    assert (done.events, done.lost) == (COUNT - 9, [(77, 78), (3000, 3000)])
    assert not done.epoch_changed
    assert done.damaged_file is not None
    assert done.damaged_file.exists()
    assert verify(tmp_path).told == []
    assert done.side_file is not None
    lines = [json.loads(line) for line in done.side_file.read_text().splitlines()]
    assert [(line["sequence"], line["id"]) for line in lines] == [
        (77, "x77"),
        (78, "x78"),
        (3000, "x3000"),
    ]
    log = await SqliteLog.open(tmp_path, clock=FakeClock())
    assert (log.epoch, log.info().last_sequence) == (epoch, position)
    after = {one.sequence: one for one in await read_all(log)}
    assert after == {n: one for n, one in before.items() if n not in (77, 78, 3000)}
    told = Counter[int]()
    for hole in await holes_of(log, max_events=4096):
        told[hole.reason] += hole.events
    assert told[GAP_REASON_UNREADABLE] == 3
    assert sum(told.values()) == 6
    assert (await log.read(76, max_events=1)).missing == (
        Missing(77, 78, 2, GAP_REASON_UNREADABLE),
    )
    # Subject a.4 ended with 3000, which is gone: no state until the next one.
    assert 3000 % 7 == 4
    assert len((await log.newest(bool)).sequences) == 6
    assert await log.expired(10**18 + 20) == [*range(4, 10), *range(12, 21)]
    assert await log.sequence_at(FakeClock().time_ns() + 6 * 10**9) == 2001
    repeated = await log.append([event("a.0", id="x77"), event("a.0", id="x10")])
    assert [(one.sequence, one.duplicate) for one in repeated] == [(77, True), (10, True)]
    assert (await log.append([event()]))[0].sequence == 3001
    await log.close()


async def test_a_page_that_is_damaged_costs_only_what_was_on_it(tmp_path: Path) -> None:
    await (await _written(tmp_path)).close()
    _damage_a_page(tmp_path, "x1500")
    done = repair(tmp_path, keep_damaged=False)
    assert COUNT - 60 < done.events < COUNT - 6
    assert done.damaged_file is None
    assert not list(tmp_path.glob("*.damaged-*"))
    assert verify(tmp_path).told == []
    log = await SqliteLog.open(tmp_path)
    missing = set(range(4, COUNT + 1)) - set(sequences(await read_all(log))) - {10, 11, 500}
    assert 1500 in missing
    assert all(any(low <= one <= high for low, high in done.lost) for one in missing)
    (hole,) = [one for one in await holes_of(log) if one.reason == GAP_REASON_UNREADABLE]
    assert hole.events == 0, "how many were on it is not known"
    await log.close()


@pytest.mark.parametrize("count", [COUNT, 2500])
async def test_a_bit_in_the_number_of_a_row_costs_no_event(tmp_path: Path, count: int) -> None:
    """By its number an event is searched in steps; the last one is whole or not."""
    log = await _written(tmp_path / "whole", count)
    before = await read_all(log)
    await log.close()
    whole = (tmp_path / "whole" / FILE_NAME).read_bytes()
    rng = random.Random(42)
    numbers = _row_numbers(whole)
    assert len(numbers) > count / 2
    for turn, (at, length) in enumerate(rng.sample(numbers, 20)):
        content = bytearray(whole)
        content[at + rng.randrange(length)] ^= 1 << rng.randrange(7)
        folder = tmp_path / str(turn)
        folder.mkdir()
        (folder / FILE_NAME).write_bytes(content)
        assert verify(folder).count, "it is seen"
        done = repair(folder)
        log = await SqliteLog.open(folder)
        assert await read_all(log) == before, (turn, at, done)
        await log.close()
        assert not verify(folder).count


async def test_a_damaged_last_page_ends_no_repair(tmp_path: Path) -> None:
    log = await _written(tmp_path)
    before = sequences(await read_all(log))
    await log.close()
    _damage_a_page(tmp_path, f"x{COUNT}")
    done = repair(tmp_path)
    log = await SqliteLog.open(tmp_path)
    left = sequences(await read_all(log))
    assert left == before[: len(left)]
    assert 0 < COUNT - left[-1] < 60
    assert done.lost == [(left[-1] + 1, COUNT)]
    await log.close()


async def test_a_damaged_oldest_event_is_told(tmp_path: Path) -> None:
    log = await _written(tmp_path)
    await log.close()
    _run(tmp_path, "UPDATE events SET frame = x'00' WHERE sequence = 4")
    assert repair(tmp_path).lost == [(4, 4)]


def _row_numbers(content: bytes) -> list[tuple[int, int]]:
    """Where the numbers of rows of events stand, and how long they are.

    https://www.sqlite.org/fileformat2.html#b_tree_pages
    """
    found = []
    for page in range(4096, len(content), 4096):
        if content[page] != 0x0D:  # no leaf of a table
            continue
        for cell in range(int.from_bytes(content[page + 3 : page + 5])):
            pointer = page + 8 + 2 * cell
            at = page + int.from_bytes(content[pointer : pointer + 2])
            while content[at] & 0x80:
                at += 1
            begin = at = at + 1
            while content[at] & 0x80:
                at += 1
            if b"payloadpayload" in content[at : at + 120]:
                found.append((begin, at + 1 - begin))
    return found


async def test_a_repair_that_is_broken_off_is_not_taken_for_a_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = await _written(tmp_path)
    before = sequences(await read_all(log))
    await log.close()
    for step in ("link", "sync_folder", "replace"):
        with monkeypatch.context() as patch:

            def die(*_given: object) -> None:
                raise KeyboardInterrupt

            patch.setattr(repair_room if step == "sync_folder" else os, step, die)
            with pytest.raises(KeyboardInterrupt):
                repair(tmp_path)
        if step == "link":
            await (await SqliteLog.open(tmp_path)).close()
        else:
            assert (tmp_path / REPAIR_MARK).exists()
            with pytest.raises(FailedPrecondition) as refused:
                await SqliteLog.open(tmp_path)
            assert refused.value.reason == "REPAIR_UNFINISHED"
        repair(tmp_path)
        log = await SqliteLog.open(tmp_path)
        assert sequences(await read_all(log)) == before
        await log.close()


async def test_a_repair_of_frames_that_are_not_bytes_any_more(tmp_path: Path) -> None:
    """The kind of a column is one bit in the head of its record."""
    await (await _written(tmp_path)).close()
    _run(tmp_path, "UPDATE events SET frame = 'text' WHERE sequence = 77")
    _run(tmp_path, "UPDATE events SET frame = 7 WHERE sequence = 79")
    assert verify(tmp_path).damaged == [(77, 77), (79, 79)]
    assert repair(tmp_path).lost == [(77, 77), (79, 79)]
    assert verify(tmp_path).told == []


async def test_a_repair_loses_no_event_whose_columns_alone_are_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = await _written(tmp_path)
    before = await read_all(log)
    await log.close()
    _run(tmp_path, "UPDATE events SET subject = 'a.99', recorded_ns = 1 WHERE sequence = 77")
    _run(tmp_path, "UPDATE events SET source = x'80', id = 7 WHERE sequence = 3000")
    _run(tmp_path, "UPDATE events SET source = CAST(x'80' AS TEXT) WHERE sequence = 2999")
    with pytest.raises(DataLoss, match="aither flux repair"):
        await SqliteLog.open(tmp_path)
    assert verify(tmp_path).damaged == [(77, 77), (2999, 2999), (3000, 3000)]
    assert main(["repair", "--data-dir", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "whole, with columns written anew: 77, 2999, 3000\n" in said
    assert "taken out" not in said
    assert not list(tmp_path.glob("*.jsonl"))
    assert verify(tmp_path).told == []
    log = await SqliteLog.open(tmp_path)
    assert await read_all(log) == before
    (again,) = await log.append([event("a.4", id="x3000")])
    assert (again.sequence, again.duplicate) == (3000, True)
    assert len((await log.newest(bool)).sequences) == 7
    await log.close()


async def test_a_repair_without_room_says_so_and_leaves_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    await (await _written(tmp_path)).close()

    def small(path: Path, *, read_only: bool = False) -> sqlite3.Connection:
        connection = connect(path, read_only=read_only)
        if not read_only:
            limit_size(connection, 100_000)
        return connection

    monkeypatch.setattr(repair_room, "connect", small)
    assert main(["repair", "--data-dir", str(tmp_path)]) == 1
    assert "no space is left" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.new*")), "the room it took is given back"
    assert verify(tmp_path).told == []


async def test_what_no_repair_can_read_is_not_sent_to_a_repair(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    await (await _written(tmp_path)).close()
    path = tmp_path / FILE_NAME
    damaged = path.read_bytes().replace(b"CREATE TABLE stream (", b"CREATE TABLE stream <", 1)
    path.write_bytes(damaged)
    assert main(["repair", "--data-dir", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "restore a backup" in said
    assert "aither flux repair" not in said
    assert path.read_bytes() == damaged
    assert not list(tmp_path.glob("*.new*"))


async def test_what_cannot_be_opened_beside_its_write_ahead_log_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"no file of SQLite " * 400)
    (tmp_path / f"{FILE_NAME}-wal").write_bytes(b"nor its write-ahead log " * 400)
    assert main(["verify", "--data-dir", str(tmp_path)]) == 1
    assert "not a database" in capsys.readouterr().out


async def test_a_backup_leaves_what_else_is_in_its_folder(tmp_path: Path) -> None:
    await (await _written(tmp_path / "live")).close()
    other = tmp_path / "copy" / "unfinished" / "novel.txt"
    other.parent.mkdir(parents=True)
    other.write_text("Chapter one")
    back_up(tmp_path / "live", tmp_path / "copy")
    assert other.read_text() == "Chapter one"


async def test_a_backup_is_taken_while_the_log_is_written(tmp_path: Path) -> None:
    log = await _written(tmp_path / "live")
    made = back_up(tmp_path / "live", tmp_path / "copy")
    await log.append([event()])
    copy = await SqliteLog.open(tmp_path / "copy")
    assert sequences(await read_all(copy)) == sequences(await read_all(log))[:-1]
    assert made.found.events == COUNT - 6
    # The original has given out a sequence that the copy will give to another event.
    assert copy.epoch == made.epoch != log.epoch
    assert (await copy.append([event()]))[0].sequence == COUNT + 1
    await copy.close()
    await log.close()
    assert sorted(one.name for one in (tmp_path / "copy").iterdir()) == ["flux.db", "flux.lock"]


async def test_groups_go_with_the_log_and_into_its_epoch(tmp_path: Path) -> None:
    """With what they have parked and replay; what is parked of an older log stays of that one."""
    log = await _written(tmp_path / "live")
    header = Header(b"settings", log.epoch, 7)
    parked = [
        Parked(ParkedKey(sequence, epoch), b"frame", 3, "why", 9)
        for sequence, epoch in ((5, log.epoch), (6, log.epoch), (5, "older"))
    ]
    replayed = PendingRow(parked[1].key, 1, 0, "")
    store = await SqliteStore.open(tmp_path / "live")
    await store.write(
        Change("g", header=header, pending=[PendingRow(7, 1, 0, ""), replayed], parked=parked)
    )
    await store.write(Change("h", header=Header(b"settings", "older", 3)))
    made = back_up(tmp_path / "live", tmp_path / "copy")
    await store.close()
    await log.close()
    copy = await SqliteStore.open(tmp_path / "copy")
    stored = await copy.load()
    await copy.close()
    assert {name: one.header.epoch for name, one in stored.items()} == {
        "g": made.epoch,
        "h": "older",
    }
    five, six = (ParkedKey(sequence, made.epoch) for sequence in (5, 6))
    assert [row.key for row in stored["g"].pending] == [six, 7]
    assert stored["g"].parked == {five: 5, six: 5, ParkedKey(5, "older"): 5}


async def test_groups_of_schema_1_go_into_the_epoch_of_the_copy(tmp_path: Path) -> None:
    log = await _written(tmp_path / "live")
    with closing(sqlite3.connect(tmp_path / "live" / "groups.db")) as groups:
        groups.executescript(STEPS[0])
        groups.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        groups.execute("PRAGMA user_version = 1")
        groups.execute("INSERT INTO groups VALUES ('g', 's', ?, 7, 0, 0, 0, 0)", (log.epoch,))
        groups.execute("INSERT INTO parked VALUES ('g', 5, 3, 9, 'why', x'00')")
        groups.commit()
    made = back_up(tmp_path / "live", tmp_path / "copy")
    await log.close()
    copy = await SqliteStore.open(tmp_path / "copy")
    stored = (await copy.load())["g"]
    await copy.close()
    assert (stored.header.epoch, stored.parked) == (made.epoch, {ParkedKey(5, made.epoch): 1})


async def test_a_damaged_log_gives_no_backup_and_a_backup_overwrites_none(tmp_path: Path) -> None:
    await (await _written(tmp_path / "live")).close()
    back_up(tmp_path / "live", tmp_path / "copy")
    with pytest.raises(FailedPrecondition) as refused:
        back_up(tmp_path / "live", tmp_path / "copy")
    assert refused.value.reason == "TARGET_EXISTS"
    _run(tmp_path / "live", "UPDATE events SET crc = 1 WHERE sequence = 50")
    with pytest.raises(DataLoss, match="event 50"):
        back_up(tmp_path / "live", tmp_path / "other")
    assert list((tmp_path / "other").iterdir()) == []
