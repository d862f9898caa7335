"""A service's life as its starter sees it: real processes, real signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.processes import running
from tests.stopwatch import Stopwatch

SCRIPT = """
import asyncio, sys, time
from aither_sdk import Life, run

async def body(life: Life) -> None:
{body}

run("probe", body)
"""


@contextmanager
def service(body: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    indented = "\n".join("    " + line for line in body.strip().splitlines())
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(body=indented)],
        env={**os.environ, "AITHER_TELEMETRY__LOG_FORMAT": "json", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=15)


def until_it_says(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if word in line:
            return
    raise AssertionError(f"it ended without saying {word}")


WAITING = """
life.serving()
print("serving", flush=True)
await life.until_stop()
print("draining", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_ends_with_status_0(number: signal.Signals) -> None:
    with service(WAITING) as process:
        until_it_says(process, "serving")
        process.send_signal(number)
        output, _ = process.communicate(timeout=20)
        assert process.returncode == 0
        assert "draining" in output


def test_a_drain_that_takes_too_long_is_cut_off_and_names_what_is_left() -> None:
    body = WAITING + "\nawait asyncio.sleep(600)"
    with service(body, AITHER_DRAIN_TIMEOUT_S="0.3") as process:
        until_it_says(process, "serving")
        watch = Stopwatch()
        process.terminate()
        _, errors = process.communicate(timeout=20)
        assert process.returncode == 3
        assert watch.calm_s < 10
        assert "service.drain_timeout" in errors
        assert "probe:body" in errors


def test_a_second_signal_ends_it_at_once() -> None:
    with service(WAITING + "\nawait asyncio.sleep(600)", AITHER_DRAIN_TIMEOUT_S="60") as process:
        until_it_says(process, "serving")
        process.terminate()
        until_it_says(process, "draining")
        process.terminate()
        process.communicate(timeout=20)
        assert process.returncode == 128 + signal.SIGTERM


def test_a_body_that_fails_ends_with_status_1_and_is_logged() -> None:
    with service("raise RuntimeError('on purpose')") as process:
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 1
        assert "service.failed" in errors
        assert "on purpose" in errors


STARTING = """
print("starting", flush=True)
while not life.stopping:
    await asyncio.sleep(0.01)
"""


def test_a_stop_during_the_start_ends_a_subscriber_that_is_made_later() -> None:
    body = (
        STARTING
        + """
async with life.subscriber(["a.>"]) as events:
    life.serving()
    async for event in events:
        pass
early = life.subscriber(["a.>"])
await asyncio.sleep(0.1)
async with early as events:
    async for event in events:
        pass
"""
    )
    with service(body) as process:
        until_it_says(process, "starting")
        process.terminate()
        _, errors = process.communicate(timeout=20)
        assert process.returncode == 0, errors


def test_who_was_asked_to_stop_while_starting_never_calls_itself_ready() -> None:
    body = STARTING + "\nlife.serving()\nprint(life.health.status('readiness'), flush=True)"
    with service(body) as process:
        until_it_says(process, "starting")
        process.terminate()
        output, _ = process.communicate(timeout=20)
        assert (process.returncode, output.split()) == (0, ["2"])


def test_a_thread_that_does_not_end_does_not_hold_up_a_drain_for_ever() -> None:
    body = WAITING + "\nawait asyncio.to_thread(time.sleep, 30)"
    with service(body, AITHER_DRAIN_TIMEOUT_S="0.3") as process:
        until_it_says(process, "serving")
        watch = Stopwatch()
        process.terminate()
        _, errors = process.communicate(timeout=25)
        assert process.returncode == 3
        assert watch.calm_s < 10
        assert "service.exit_at_once" in errors


def test_a_collector_that_is_away_does_not_hold_up_the_end() -> None:
    with service(WAITING, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9") as process:
        until_it_says(process, "serving")
        watch = Stopwatch()
        process.terminate()
        process.communicate(timeout=25)
        assert process.returncode == 0
        assert watch.calm_s < 4.5


@pytest.mark.parametrize(("began", "status"), [("", 2), ("life.serving()\n", 1)])
def test_an_error_of_aither_is_one_of_the_start_only_until_it_serves(
    began: str, status: int
) -> None:
    body = f"{began}from aither_sdk.errors import Unavailable\nraise Unavailable('on purpose')"
    with service(body) as process:
        _, errors = process.communicate(timeout=30)
        assert process.returncode == status
        assert ("service.cannot_start" in errors) is (status == 2)
        assert "on purpose" in errors


def test_a_starter_that_is_gone_ends_its_service() -> None:
    reader, writer = os.pipe()
    os.set_inheritable(reader, True)
    indented = "\n".join("    " + line for line in WAITING.strip().splitlines())
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(body=indented)],
        env={**os.environ, "AITHER_LIFELINE_FD": str(reader)},
        pass_fds=(reader,),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    os.close(reader)
    try:
        until_it_says(process, "serving")
        os.close(writer)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.communicate()


def test_tasks_that_did_not_end_are_named_in_the_farewell() -> None:
    body = """
async def say(subject, payload):
    print(subject, list(getattr(payload, "cancelled_tasks", [])), flush=True)

async def stubborn():
    await asyncio.sleep(600)

async with life.announcing(say):
    life.tasks.spawn("stubborn", stubborn)
    life.serving()
    await life.until_stop()
"""
    with service(body) as process:
        until_it_says(process, "runtime.probe.started")
        process.terminate()
        output, _ = process.communicate(timeout=20)
        assert "runtime.probe.stopped ['probe:stubborn']" in output


def test_work_that_a_part_drops_or_leaves_is_told_by_its_service() -> None:
    body = """
async def say(subject, payload):
    print(subject, " ".join(str(payload).split()), flush=True)

async def stubborn():
    await asyncio.sleep(600)

async with life.announcing(say):
    life.serving()
    async with life.bounded_tasks("part", 1, close_timeout_s=0.05) as tasks:
        tasks.spawn("stubborn", stubborn)
        for number in range(3):
            tasks.try_spawn(f"late {number}", stubborn)
        await life.until_stop()
"""
    with service(body) as process:
        until_it_says(process, 'task_dropped service: "probe" owner: "part" task_name: "late 2"')
        process.terminate()
        output, _ = process.communicate(timeout=20)
        assert 'cancelled_tasks: "part:stubborn"' in output


WORKER = """
async def handle(event):
    print("handling", event.subject, flush=True)
    await publisher.publish("demo.handled")
    await asyncio.sleep(0.3)
    print("handled", flush=True)

async with (
    life.publisher() as publisher,
    life.worker(new_consumer("demo", ["demo.task"]), handle) as worker,
):
    life.serving()
    print("ready" if life.health.status("readiness") == 1 else "waits", flush=True)
    await worker.until_started(20)
    print("ready" if life.health.status("readiness") == 1 else "waits", flush=True)
    await publisher.publish("demo.task")  # after the line above: its handler writes one, too
    await worker.until_over()
print("drained", worker.statistics().acked, flush=True)
"""


def test_a_worker_of_a_life_is_a_condition_of_readiness_and_drains(tmp_path: Path) -> None:
    script = "from aither_sdk import new_consumer\n" + SCRIPT
    indented = "\n".join("    " + line for line in WORKER.strip().splitlines())
    with running("flux_svc", tmp_path) as flux:
        process = subprocess.Popen(
            [sys.executable, "-c", script.format(body=indented)],
            env={**os.environ, "AITHER_FLUX__ADDRESS": flux.address},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        try:
            until_it_says(process, "waits")
            until_it_says(process, "ready")
            until_it_says(process, "handling demo.task")
            process.terminate()
            output, _ = process.communicate(timeout=20)
            assert output.split("\n")[:2] == ["handled", "drained 1"]
            assert process.returncode == 0
        finally:
            process.kill()
            process.communicate()


def test_a_service_of_seventeen_lines_answers_and_drains(tmp_path: Path) -> None:
    """The shipped example, against a real Flux."""
    example = Path(__file__).parents[2] / "examples" / "07_new_service.py"
    follow = """
async with life.publisher() as publisher, life.subscriber(["demo.greeted"]) as answers:
    life.serving()
    await answers.until_started(20)
    asking = asyncio.create_task(ask(publisher))
    async for event in answers:
        print("greeted", event.causation_id, flush=True)
        break
    asking.cancel()
"""
    ask = """
async def ask(publisher):
    for _ in range(200):
        await publisher.publish("demo.hello")
        await asyncio.sleep(0.1)

async def body(life: Life) -> None:
"""
    with running("flux_svc", tmp_path) as flux:
        environment = {**os.environ, "AITHER_FLUX__ADDRESS": flux.address}
        greeter = subprocess.Popen(
            [sys.executable, str(example)], env=environment, stderr=subprocess.DEVNULL
        )
        try:
            indented = "\n".join("    " + line for line in follow.strip().splitlines())
            script = SCRIPT.replace("async def body(life: Life) -> None:\n", ask)
            heard = subprocess.run(
                [sys.executable, "-c", script.format(body=indented)],
                env=environment,
                capture_output=True,
                text=True,
                timeout=50,
                check=False,
            )
            assert heard.returncode == 0, heard.stderr
            assert heard.stdout.startswith("greeted probe/")
            greeter.terminate()
            assert greeter.wait(15) == 0
        finally:
            greeter.kill()
            greeter.wait()
