"""`aither stalls`: what it makes of the events, and what it says to do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from aither.flux.v1.event_pb2 import Event
from aither.runtime.v1 import runtime_events_pb2 as rt
from aither_cli.stall_advice import advice
from aither_cli.stalls import Told, fold, in_full, trace_id
from aither_sdk.events import new_event
from aither_sdk.publishing.publisher import Publisher
from tests.processes import ServiceProcess, running

TRACE = "0af7651916cd43dd8448eb211c80319c"
STACK = """\
Traceback (most recent call last):
  File "/usr/lib/python3.11/asyncio/events.py", line 80, in _run
  File "/srv/gateway/quotes.py", line 12, in refresh
  File "/usr/lib/python3.11/subprocess.py", line 1209, in communicate
"""


def stall(stall_id: str = "7f3a" * 8, **fields: object) -> rt.Stall:
    told = rt.Stall(
        stall_id=stall_id,
        service="gateway",
        cause=rt.STALL_CAUSE_BLOCKING_SYSCALL,
        stacktrace=STACK,
        task_name="refresh-quotes",
        traceparent=f"00-{TRACE}-b7ad6b7169203331-01",
    )
    told.culprit.MergeFrom(
        rt.CodeLocation(function_name="refresh", file_path="/srv/gateway/quotes.py", line_number=12)
    )
    told.stall_duration.FromMilliseconds(3250)
    told.start_time.FromSeconds(1_800_000_000)
    told.MergeFrom(rt.Stall(**fields))  # type: ignore[arg-type]
    return told


def said(news: rt.LoopStalled | rt.LoopStallDetected, sequence: int = 1) -> Event:
    event = new_event(f"runtime.{news.stall.service}.stall", news, source=news.stall.service)
    event.sequence = sequence
    return event


def test_detection_and_end_of_a_stall_are_one() -> None:
    newest_first = [
        said(rt.LoopStallDetected(stall=stall("b" * 32)), 3),
        said(rt.LoopStalled(stall=stall("a" * 32), number=1), 2),
        said(rt.LoopStallDetected(stall=stall("a" * 32)), 1),
    ]
    found = fold(newest_first)
    assert [(told.stall.stall_id[0], told.ended, told.sequence) for told in found] == [
        ("b", False, 3),
        ("a", True, 2),
    ]
    assert [told.sequence for told in fold(newest_first, "a")] == [2]
    (late,) = fold([said(rt.LoopStallDetected(stall=stall("a" * 32)), 4), newest_first[1]])
    assert late.ended, "a detection that came late opens nothing again"


def test_a_strangers_payload_on_the_subject_is_passed_over() -> None:
    stranger = new_event("runtime.gateway.stall", {"not": "a stall"}, source="x")
    damaged = said(rt.LoopStalled(stall=stall()))
    damaged.payload.value = b"\xff\xff\xff"
    assert fold([stranger, damaged, Event()]) == []


def test_in_full_has_the_stack_the_trace_and_what_to_do() -> None:
    (told,) = fold([said(rt.LoopStallDetected(stall=stall(wchan="do_wait")))])
    text = "\n".join(in_full(told))
    assert "refresh (/srv/gateway/quotes.py:12)" in text
    assert f"trace    {TRACE}" in text
    assert "blocked for over " in text
    assert "no end told" in text
    assert "the kernel says do_wait" in text
    assert "in communicate" in text
    assert "asyncio.create_subprocess_exec" in text


def test_a_stall_without_a_task_names_its_callback_or_says_that_nobody_saw_one() -> None:
    seen = stall(coroutine="app.tick")
    seen.task_name = ""
    assert "task     none; a bare callback, app.tick" in in_full(Told(seen, 1, ended=True))
    seen.coroutine = ""
    assert "task     not known" in in_full(Told(seen, 1, ended=True))


def test_a_stall_outside_a_trace_has_none() -> None:
    assert trace_id(rt.Stall()) == ""
    assert trace_id(rt.Stall(traceparent="garbage")) == ""
    own = rt.Stall(stall_traceparent=f"00-{TRACE}-b7ad6b7169203331-01")
    assert f"trace    none was open; its own is {TRACE}" in in_full(Told(own, 1, ended=True))


@pytest.mark.parametrize(
    ("fields", "source", "wanted"),
    [
        ({}, "", "asyncio.create_subprocess_exec"),
        ({"stacktrace": ""}, "time.sleep(3)", "asyncio.sleep"),
        ({"stacktrace": "", "wchan": "hrtimer_nanosleep"}, "", "asyncio.sleep"),
        ({"stacktrace": "", "wchan": "futex_wait_queue"}, "", "waits for a lock of a thread"),
        ({"stacktrace": ""}, "host = socket.getaddrinfo(name, 80)", "loop.getaddrinfo"),
        ({"stacktrace": ""}, "fcntl.flock(file, LOCK_EX)", "LOCK_NB"),
        ({"stacktrace": ""}, "rows = db.execute(QUERY)", "busy timeout"),
        ({"stacktrace": ""}, "page = requests.get(url)", "asynchronous HTTP client"),
        ({"cause": rt.STALL_CAUSE_CPU_ON_LOOP, "stacktrace": ""}, "json.loads(text)", "json holds"),
        ({"cause": rt.STALL_CAUSE_CPU_ON_LOOP, "stacktrace": ""}, "PATTERN.match(x)", "google-re2"),
        # The cause decides what a trace of a habit may mean: a sleep burns no CPU.
        ({"cause": rt.STALL_CAUSE_CPU_ON_LOOP, "stacktrace": ""}, "time.sleep(3)", "into pieces"),
        ({"cause": rt.STALL_CAUSE_GC}, "", "gc.freeze"),
        ({"cause": rt.STALL_CAUSE_HOST_STARVED}, "", "not to blame"),
        ({"cause": rt.STALL_CAUSE_THROTTLED}, "", "CPU limit"),
        ({"cause": rt.STALL_CAUSE_SUSPENDED}, "", "Nothing to mend"),
        ({"cause": rt.STALL_CAUSE_MANY_CALLBACKS}, "", "BoundedTasks"),
    ],
)
def test_the_advice_fits_the_kind(fields: dict[str, object], source: str, wanted: str) -> None:
    told = stall()
    for name, value in fields.items():
        setattr(told, name, value)
    assert wanted in " ".join(advice(told, source))


def test_every_cause_has_advice_even_one_that_is_not_known() -> None:
    for cause in rt.StallCause.values():
        assert advice(rt.Stall(cause=cause))
    assert "innermost frame" in " ".join(advice(rt.Stall(cause=99)))  # type: ignore[arg-type]


async def test_the_list_and_the_whole_story_come_from_a_real_flux(
    tmp_path: Path,
) -> None:
    with running("flux_svc", tmp_path) as flux:
        await _publish(flux)
        command = [sys.executable, "-P", "-m", "aither_cli", "stalls"]
        flags = ["--flux", flux.address]

        def told(*arguments: str) -> str:
            done = subprocess.run(
                [*command, *arguments, *flags], capture_output=True, text=True, timeout=30
            )
            assert done.returncode == 0, done.stderr
            return done.stdout

        # Of the gateway: on a busy machine Flux may have a stall of its own to tell of.
        table = told("--service", "gateway").splitlines()
        assert [line.split()[-1] for line in table] == ["id", "b" * 8, "a" * 8]
        assert "over 3.2 s, no end told" in table[1]
        assert TRACE in table[2]
        assert "asyncio.create_subprocess_exec" in told("show", "a")
        (only,) = [
            json.loads(line)
            for line in told("--service", "gateway", "--json", "--max", "1").splitlines()
        ]
        assert (only["stall_id"], only["ended"], only["trace_id"]) == ("b" * 32, False, TRACE)
        assert told("--service", "other") == ""


async def test_an_id_that_is_not_known_is_told(
    tmp_path: Path,
) -> None:
    with running("flux_svc", tmp_path) as flux:
        done = subprocess.run(
            [
                sys.executable,
                "-P",
                "-m",
                "aither_cli",
                "stalls",
                "show",
                "zz",
                "--flux",
                flux.address,
            ],
            capture_output=True,
            text=True,
            timeout=30,
        )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == 'aither: no stall with an id that begins with "zz"; see `aither stalls`\n'


async def _publish(flux: ServiceProcess) -> None:
    async with Publisher(flux.address, source="gateway") as publisher:
        for news in (
            rt.LoopStallDetected(stall=stall("a" * 32)),
            rt.LoopStalled(stall=stall("a" * 32), number=1),
            rt.LoopStallDetected(stall=stall("b" * 32)),
        ):
            await publisher.publish("runtime.gateway.stall", news)
