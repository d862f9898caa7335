"""Programs that no tutorial shows: they stall at the very end, run their loop by fits and starts,
recurse deeply, fork, name files as they like, enter a watch where none can be."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import aither_sdk
from aither.runtime.v1 import runtime_events_pb2 as pb
from aither_sdk.beat import BeatCell
from aither_sdk.errors import FailedPrecondition, InvalidArgument
from aither_sdk.stalls import sampling
from aither_sdk.stalls.gauges import Collections, LoopGauge
from aither_sdk.stalls.quota import Quota
from aither_sdk.stalls.record import FinishedSpan, message_of
from aither_sdk.stalls.sampling import Seen, look, running_tasks
from aither_sdk.stalls.stacks import Frame, spell, survey
from aither_sdk.stalls.telling import Teller
from aither_sdk.witness.parent import Witness
from tests.stalls.test_record import WHOLE, S

LIMIT_S = 30.0


def told_to(watch: aither_sdk.Watch) -> list[Any]:
    """Its events from now on."""
    told: list[Any] = []
    watch.announce = told.extend
    return told


async def test_a_stall_that_lasts_to_the_end_of_the_block_is_told() -> None:
    watch = aither_sdk.watch()
    told = told_to(watch)
    with watch:
        time.sleep(0.4)  # noqa: ASYNC251
    assert watch.stalls == 1
    assert [type(one) for one in told] == [pb.LoopStallDetected, pb.LoopStalled]
    assert told[1].stall.stall_duration.ToMilliseconds() >= 300


def test_a_loop_that_nobody_runs_does_not_stall() -> None:
    loop, watch = asyncio.new_event_loop(), aither_sdk.watch()
    told = told_to(watch)

    async def enter() -> None:
        watch.__enter__()
        await asyncio.sleep(0.06)

    async def leave() -> None:
        await asyncio.sleep(0.06)
        watch.__exit__(None, None, None)

    loop.run_until_complete(enter())
    time.sleep(1.0)
    loop.run_until_complete(leave())
    loop.close()
    lasted_ms = [one.stall.stall_duration.ToMilliseconds() for one in told]
    assert [one for one in lasted_ms if one > 800] == []


def test_a_stall_ends_with_the_run_of_its_loop() -> None:
    loop, watch = asyncio.new_event_loop(), aither_sdk.watch()
    told = told_to(watch)

    async def enter() -> None:
        watch.__enter__()

    def block() -> None:
        loop.stop()  # after this turn, so that no beat comes
        time.sleep(0.4)

    loop.run_until_complete(enter())
    loop.call_soon(block)
    loop.run_forever()
    end_s = time.monotonic() + LIMIT_S
    while not _ended(told) and time.monotonic() < end_s:
        time.sleep(0.02)
    assert _ended(told)[-1].stall.stall_duration.ToMilliseconds() >= 300
    loop.close()
    watch.__exit__(None, None, None)  # late, and in no loop
    assert watch.stalls == 1


def _ended(told: list[Any]) -> list[pb.LoopStalled]:
    return [one for one in list(told) if isinstance(one, pb.LoopStalled)]


def seen_in(action: Callable[[], object], event: threading.Event) -> Seen:
    """A look at a loop that does `action` in a task, which waits for `event`."""
    found: list[Seen] = []
    begun: list[bool] = []  # to start a thread is to wait, too
    loop, ident = asyncio.get_running_loop(), threading.get_ident()

    def watch() -> None:
        end_s = time.monotonic() + LIMIT_S
        while time.monotonic() < end_s and not found:
            time.sleep(0.005)
            frame = sys._current_frames()[ident]
            if begun and frame.f_code is threading.Condition.wait.__code__:
                seen = look(loop, ident)
                assert seen is not None
                found.append(seen)
        event.set()

    watching = threading.Thread(target=watch)
    watching.start()
    begun.append(True)
    action()
    watching.join(LIMIT_S)
    return found[0]


async def test_the_callback_under_a_deep_recursion_is_found() -> None:
    event = threading.Event()

    def down(levels: int) -> None:
        down(levels - 1) if levels else event.wait(LIMIT_S)

    seen = seen_in(lambda: down(400), event)
    task = asyncio.current_task()
    assert task is not None
    assert (seen.task_name, seen.handle is not None) == (task.get_name(), True)
    # Both ends of the stack are told, and how much is not.
    assert len(seen.stack) <= 100
    assert seen.stack[-1].function == "threading.Condition.wait"
    assert seen.stack[0].function == "asyncio.events.Handle._run"
    assert any("frames left out" in frame.function for frame in seen.stack)


async def test_who_runs_the_loop_is_not_to_blame_for_its_callbacks() -> None:
    seen = seen_in(lambda: event.wait(LIMIT_S), event := threading.Event())
    assert seen.within[0].function == "asyncio.events.Handle._run"
    assert len(seen.within) < len(seen.stack)


async def test_a_callback_without_a_frame_is_named() -> None:
    loop, ident = asyncio.get_running_loop(), threading.get_ident()
    lock = threading.Lock()
    lock.acquire()
    found: list[Seen] = []

    def watch() -> None:
        end_s = time.monotonic() + LIMIT_S
        while time.monotonic() < end_s and not (found and len(found[-1].within) == 1):
            time.sleep(0.005)
            found.extend(filter(None, (look(loop, ident),)))
        lock.release()

    watching = threading.Thread(target=watch)
    watching.start()
    loop.call_soon(lock.acquire)
    async with asyncio.timeout(LIMIT_S):
        await asyncio.to_thread(watching.join)
    assert found[-1].within[0].function == "lock.acquire"


async def test_a_look_that_meets_the_beat_blames_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    with aither_sdk.watch() as watch:
        beat = Seen((Frame("a", "/a.py", 1),), watch.heart._timer)
        monkeypatch.setattr("aither_sdk.stalls.watchdog.look", lambda *_: beat)
        open_ = watch._watchdog._open(watch.heart.mark, 0, 0)
        watch._watchdog._look(open_)
        assert open_.looks == []
        monkeypatch.undo()


async def test_of_very_many_tasks_the_rest_is_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_MAX_TASKS", 5)
    tasks = [asyncio.create_task(asyncio.sleep(60)) for _ in range(12)]
    counted = dict(running_tasks(asyncio.get_running_loop()))
    for task in tasks:
        task.cancel()
    assert counted["(not looked at)"] >= 8
    assert counted.get("sleep", 0) <= 5


async def test_a_refused_watch_costs_no_descriptor_and_closes_none_of_others() -> None:
    gc.collect()
    watch = aither_sdk.watch()
    before = len(os.listdir("/proc/self/fd"))
    with watch:
        gc.disable()
        for _ in range(5):
            with pytest.raises(FailedPrecondition, match="has a watch already"), aither_sdk.watch():
                pass
        inside = len(os.listdir("/proc/self/fd"))
    gc.enable()
    foreign = os.open("/dev/null", os.O_RDONLY)  # with the number that the cell had
    with pytest.raises(FailedPrecondition, match="entered once"), watch:
        pass
    watch._cell.close()
    os.fstat(foreign)
    os.close(foreign)
    assert inside - before <= 6  # the watch's own: what the kernel tells of the loop's thread


def test_a_watch_that_is_forgotten_frees_its_memory() -> None:
    cell = BeatCell.create()
    fd = cell.fd
    del cell
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_watch_without_a_loop_says_where_it_belongs() -> None:
    with pytest.raises(FailedPrecondition, match="in a coroutine"), aither_sdk.watch():
        pass


@pytest.mark.parametrize(
    "wrong",
    [{"stall_after_s": 0}, {"error_after_s": -1}, {"stalls_per_minute": 0}, {"health_port": 65536}],
)
def test_what_a_watch_cannot_do_is_refused_at_once(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match=next(iter(wrong))):
        aither_sdk.watch(**wrong)


async def test_a_forked_child_that_leaves_the_block_ends_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watch = aither_sdk.watch()
    watch.__enter__()
    with monkeypatch.context() as child:
        child.setattr(os, "getpid", lambda: 1)
        watch.__exit__(None, None, None)
        await watch.__aexit__(None, None, None)
    assert watch.heart._timer is not None
    watch.__exit__(None, None, None)
    assert watch.heart._timer is None


def test_a_thread_that_has_ended_is_measured_as_nothing() -> None:
    made: list[LoopGauge] = []
    thread = threading.Thread(target=lambda: made.append(LoopGauge(Collections(lambda _: None))))
    thread.start()
    thread.join()
    clock, end_s = made[0]._clock, time.monotonic() + LIMIT_S
    assert clock is not None
    with suppress(OSError):  # Python knows that it ended a moment before the kernel does
        while time.monotonic() < end_s:
            time.clock_gettime_ns(clock)
    made[0].from_outside()
    made[0].close()


def test_names_that_are_no_text_are_sent_and_printed(tmp_path: Path) -> None:
    code = compile("import sys\nframe = sys._getframe()", "caf\udce9\n/m\x1b[31m.py", "exec")
    space: dict[str, Any] = {"__name__": "m\udcff"}
    exec(code, space)
    frame = sampling._frame(space["frame"])
    assert frame == Frame("m\\udcff.<module>", "caf\\udce9\\n/m\\x1b[31m.py", 2)
    space.clear()
    told = message_of(_blaming(frame))
    assert told.SerializeToString()
    # What is named as one's own is found again.
    assert survey(["caf\udce9\n/"]).rank(frame.file) == 0
    assert spell("/home/josé/my app.py") == "/home/josé/my app.py"


def _blaming(frame: Frame) -> Any:
    from dataclasses import replace

    return replace(WHOLE, culprit=frame, stack=(frame,))


def test_a_collector_that_hangs_does_not_take_the_log_lines_along(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    monkeypatch.setattr(
        "aither_sdk.stalls.telling.say", lambda _level, event, **_fields: said.append(event)
    )

    class Hanging:
        failures, last_failure = 0, "no answer"

        def __init__(self) -> None:
            self._closed = threading.Event()

        def prepare(self) -> None: ...

        def export(self, spans: Sequence[FinishedSpan], timeout_s: float) -> bool:
            self._closed.wait(LIMIT_S)
            return False

        def close(self) -> None:
            self._closed.set()

    quota = Quota(10, S, 5 * S)
    teller = Teller(Hanging(), quota, quota, S // 2, None)
    teller.start()
    for _ in range(3):
        teller.tell(WHOLE)
    teller.stop(timeout_s=0.1)
    assert sum(line.startswith("EVENT LOOP STALL #33") for line in said) == 3


def test_a_witness_starts_beside_files_named_like_pythons_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "queue.py").write_text("raise SystemExit('not this one')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    cell = BeatCell.create()
    witness = Witness(cell, "127.0.0.1", 0, [])
    try:
        witness.start()
        assert witness.address
    finally:
        with suppress(OSError):
            witness.stop()
        cell.close()
