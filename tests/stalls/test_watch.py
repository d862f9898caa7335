"""`with aither_sdk.watch():` in programs of all sorts: plain asyncio, forks, other loops, signals
that are taken, platforms that lack something."""

from __future__ import annotations

import asyncio
import ctypes
import faulthandler
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import aither_sdk
from aither_sdk.beat import _AT_FACTS, BeatCell, Phase
from aither_sdk.errors import FailedPrecondition
from aither_sdk.stalls import evidence, gauges, sampling
from aither_sdk.stalls.evidence import EvidenceLine, Unavailable, ask_thread
from aither_sdk.stalls.stacks import parse_dump
from aither_sdk.stalls.waking import Waking, asking_ns
from aither_sdk.witness.parent import Witness, _first_line

LIMIT_S = 30.0


def run_script(body: str, *prefix: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*prefix, sys.executable, "-c", body],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


TWO_LINES = """
import asyncio, logging, time
import aither_sdk
logging.basicConfig(format="%(name)s %(levelname)s %(message)s")
async def main():
    with aither_sdk.watch():
        await asyncio.sleep(0.2)
        time.sleep(0.4)
        await asyncio.sleep(0.2)
asyncio.run(main())
"""


def test_two_lines_make_any_program_tell_of_its_stalls() -> None:
    ended = run_script(TWO_LINES)
    assert ended.returncode == 0, ended.stderr
    assert "EVENT LOOP STALL #1: blocked for 0." in ended.stderr
    assert "__main__.main (<string>:8)" in ended.stderr
    assert "beyond expected 0.025s (total=" in ended.stderr
    assert ended.stdout == ""


def test_a_certificate_that_cannot_be_read_silences_no_stall(tmp_path: Path) -> None:
    missing = str(tmp_path / "ca.pem")
    ended = run_script(
        TWO_LINES,
        OTEL_EXPORTER_OTLP_ENDPOINT="https://127.0.0.1:9",
        OTEL_EXPORTER_OTLP_CERTIFICATE=missing,
    )
    assert ended.returncode == 0, ended.stderr
    assert "EVENT LOOP STALL #1: blocked for 0." in ended.stderr
    assert ended.stderr.count("stall.spans_do_not_arrive") == 1
    assert missing in ended.stderr
    assert "Traceback" not in ended.stderr


KEPT_GIL_AND_SIGNALS = """
import asyncio, ctypes, json, logging, os, signal, threading, time
import aither_sdk
from aither_sdk.stalls.telling import Teller
told = []
tell = Teller.tell
Teller.tell = lambda self, stall: (told.append(stall), tell(self, stall))
def keep_gil():
    ctypes.PyDLL(None).usleep(300_000)
def on_signal(*_):
    time.sleep(0.3)
async def main():
    signal.signal(signal.SIGUSR1, on_signal)
    ctypes.PyDLL(None).usleep(1)  # what it needs is in memory from here on
    with aither_sdk.watch():
        await asyncio.sleep(0.2)
        keep_gil()
        await asyncio.sleep(0.2)
        threading.Thread(target=keep_gil).start()
        await asyncio.sleep(0.5)
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        await asyncio.sleep(0.6)
asyncio.run(main())
print(json.dumps([(s.cause, s.culprit.function if s.culprit else "") for s in told if s.ended]))
"""


def test_a_call_that_keeps_the_gil_and_a_signals_handler_are_not_excused() -> None:
    wanted = {"__main__.keep_gil", "__main__.on_signal", "gil_held_elsewhere"}

    def seen() -> set[str]:
        ended = run_script(KEPT_GIL_AND_SIGNALS)
        assert ended.returncode == 0, ended.stderr
        told = json.loads(ended.stdout)
        print(told)
        blamed = {function for cause, function in told if cause == "blocking_syscall"}
        return wanted & (blamed | {cause for cause, _ in told})

    assert in_one_of_three(lambda: seen() == wanted)


def test_who_asked_for_the_gil_is_told_from_who_was_stopped() -> None:
    def waits_are_told_apart() -> bool:
        cell, waking = BeatCell.create(), []
        begun = threading.Event()

        def sleep_once() -> None:
            waking.append(Waking(cell, threading.Event()))
            waking[0].begin()
            begun.set()
            waking[0].sleep(0.05)

        sleeper = threading.Thread(target=sleep_once)
        sleeper.start()
        begun.wait()
        ctypes.PyDLL(None).usleep(300_000)
        sleeper.join()
        asked_ns, late_ns = waking[0].asked_ns, waking[0].late_ns
        waking[0].close()
        cell.close()
        assert asked_ns <= late_ns
        # The second: of a sleep through which nobody keeps it.
        return asked_ns > 40_000_000 and asking_ns(3) < 40_000_000

    assert in_one_of_three(waits_are_told_apart)


def in_one_of_three(holds: Callable[[], bool]) -> bool:
    """For what a machine that takes the CPU away for a third of a second hides, counted nowhere."""
    return any(holds() for _ in range(3))


def test_a_witness_whose_first_word_is_not_understood_cannot_serve() -> None:
    for word in ("a library's warning", "[]", "{}"):
        with subprocess.Popen(["echo", word], stdout=subprocess.PIPE) as child:
            said = _first_line(child, threading.Event())
        assert said == {"error": f"its first word is not understood: {word}"}


async def test_a_loop_has_one_watch_and_another_after_it() -> None:
    again = aither_sdk.watch()
    with aither_sdk.watch(), pytest.raises(FailedPrecondition, match="has a watch already"):
        again.__enter__()
    with aither_sdk.watch() as second:
        await asyncio.sleep(0)
    assert second.heart.mark.sequence > 0


def test_two_loops_of_a_process_are_watched_each_for_itself() -> None:
    found: dict[str, int] = {}

    async def live(name: str, blocking_s: float) -> None:
        with aither_sdk.watch(name) as watch:
            await asyncio.sleep(0.1)
            time.sleep(blocking_s)  # noqa: ASYNC251
            await asyncio.sleep(0.3)
        found[name] = watch.stalls

    threads = [
        threading.Thread(target=asyncio.run, args=(live(name, blocking_s),))
        for name, blocking_s in (("still", 0.6), ("calm", 0.0))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    assert found["still"] >= 1
    assert found["calm"] < found["still"] + 3


FORKING = """
import asyncio, os, sys, time
import aither_sdk
async def main():
    loop = asyncio.get_running_loop()
    async with aither_sdk.watch(health_port=0) as watch:
        child = os.fork()
        if child == 0:
            before = watch.heart.cell.sequence
            watch.heart._beat(loop)
            os._exit(0 if watch.heart.cell.sequence == before else 7)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        holder = os.fork()
        if holder == 0:
            time.sleep(20)
            os._exit(0)
        print(watch.witness.pid, holder, flush=True)
        os.kill(os.getpid(), 9)
asyncio.run(main())
"""


def test_a_forked_child_neither_beats_nor_keeps_the_witness_alive() -> None:
    process = subprocess.Popen([sys.executable, "-c", FORKING], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "0"
    witness, holder = map(int, process.stdout.readline().split())
    process.wait(LIMIT_S)
    process.stdout.close()
    try:
        end_s = time.monotonic() + 15
        while _there(witness) and time.monotonic() < end_s:
            time.sleep(0.05)
        assert not _there(witness)
        assert _there(holder)
    finally:
        os.kill(holder, signal.SIGKILL)


def _there(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


@pytest.fixture
def line() -> Any:
    opened = EvidenceLine.open()
    assert isinstance(opened, EvidenceLine)
    yield opened
    opened.close()


def read_dump(opened: EvidenceLine) -> str:
    time.sleep(0.05)
    return os.read(opened.read_fd, 65_536).decode()


def test_a_thread_that_is_asked_writes_its_stack(line: EvidenceLine) -> None:
    assert ask_thread(os.getpid(), threading.get_native_id(), line.number)
    stack = parse_dump(read_dump(line))
    assert "test_a_thread_that_is_asked_writes_its_stack" in [frame.function for frame in stack]


def test_signals_that_are_taken_stay_as_they_are(line: EvidenceLine) -> None:
    assert line.number >= signal.SIGRTMIN  # a program may want the others later
    received: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, _frame: received.append(number))
    try:
        second = EvidenceLine.open()
        assert isinstance(second, EvidenceLine)
        assert second.number not in (line.number, signal.SIGUSR2)
        second.close()
        os.kill(os.getpid(), signal.SIGUSR2)
        assert received == [signal.SIGUSR2]
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_a_users_own_faulthandler_is_left_alone(tmp_path: Any) -> None:
    with (tmp_path / "dump").open("w+") as file:
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=False)
        try:
            opened = EvidenceLine.open()
            assert isinstance(opened, EvidenceLine)
            assert opened.number != signal.SIGUSR1
            refused = EvidenceLine.open(signal.SIGUSR1)
            assert isinstance(refused, Unavailable)
            assert "has a handler already" in refused.why
            opened.close()
            os.kill(os.getpid(), signal.SIGUSR1)
            file.seek(0)
            assert "test_a_users_own_faulthandler_is_left_alone" in file.read()
        finally:
            faulthandler.unregister(signal.SIGUSR1)


def test_a_process_without_the_handler_is_never_signalled() -> None:
    child = subprocess.Popen(["sleep", "20"])
    try:
        assert not ask_thread(child.pid, child.pid, signal.SIGUSR1)
        assert child.poll() is None
    finally:
        child.kill()
        child.wait()


@pytest.mark.parametrize("lacking", ["tgkill", "proc"])
def test_what_the_platform_lacks_is_said(lacking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if lacking == "tgkill":
        monkeypatch.setattr(platform, "machine", lambda: "vax")
    else:
        monkeypatch.setattr(evidence, "caught_signals", lambda _pid: None)
    opened = EvidenceLine.open()
    assert isinstance(opened, Unavailable)
    assert lacking in opened.why


def test_without_memfd_the_cell_is_a_file_that_nobody_can_find(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.delattr(os, "memfd_create")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    cell = BeatCell.create()
    cell.write(Phase.SERVING, True)
    other = BeatCell(os.dup(cell.fd))
    beat = other.read()
    assert beat is not None
    assert beat.ready
    assert list(tmp_path.iterdir()) == []
    cell.close()
    other.close()


def test_without_proc_nothing_is_known_and_nothing_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gauges, "_PROC", "/nowhere")
    gauge = gauges.LoopGauge(gauges.Collections(lambda _since: None))
    assert gauge.here().run_wait_ns is None
    assert gauge.from_outside().loop_cpu_ns > 0
    gauge.close()
    assert gauges.thread_state(1, "none") == gauges.ThreadState()
    assert gauges.threads_of("none") == []


def test_a_cell_that_cannot_be_read_is_said_by_the_witness(tmp_path: Any) -> None:
    with (tmp_path / "empty").open("w+b") as file:
        cell = BeatCell.create()
        real, cell.fd = cell.fd, file.fileno()
        witness = Witness(cell, "127.0.0.1", 0, [])
        with pytest.raises(aither_sdk.AitherError, match="the beat cell cannot be read"):
            witness.start()
        cell.fd = real
        cell.close()


def test_facts_and_spans_pass_through_the_cell() -> None:
    from aither_sdk.beat import pack_span

    cell = BeatCell.create()
    assert cell.read_facts() == {}
    cell.write_facts({"flux stream up": True, "db": False})
    assert cell.read_facts() == {"flux stream up": True, "db": False}
    cell.write_facts({f"{number} {'x' * 100}": True for number in range(100)})
    kept = cell.read_facts()
    assert kept is not None
    assert 20 < len(kept) < 100
    assert all(len(name) > 100 for name in kept)
    cell._map[_AT_FACTS] |= 1  # an exception of a signal's ended a writing
    assert cell.read_facts() is None
    cell.write_facts({"db": True})
    assert cell.read_facts() == {"db": True}
    assert cell.running_span() is None
    cell.enter_span(pack_span(5, 6))
    assert cell.running_span() == (5, 6)
    cell.leave_span()
    assert cell.running_span() is None
    cell.close()


def heard_from(module: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What that room says in the log from now on."""
    said: list[str] = []
    monkeypatch.setattr(f"{module}.say", lambda _level, event, **_fields: said.append(event))
    return said


async def test_a_defect_in_the_judgement_of_one_stall_hides_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, failures = sampling.look, [RuntimeError("on purpose")]
    said = heard_from("aither_sdk.stalls.watchdog", monkeypatch)

    def fail_once(*arguments: Any) -> Any:
        if failures:
            raise failures.pop()
        return real(*arguments)

    monkeypatch.setattr("aither_sdk.stalls.watchdog.look", fail_once)
    with aither_sdk.watch() as watch:
        for _ in range(2):
            await asyncio.sleep(0.15)
            time.sleep(0.3)  # noqa: ASYNC251
        async with asyncio.timeout(LIMIT_S):
            while watch._watchdog.stalls < 2:
                await asyncio.sleep(0.02)
    assert watch.stalls >= 2
    assert said == ["stall.watchdog_failed"]


def test_a_forked_child_says_nothing_in_its_parents_cell() -> None:
    cell = BeatCell.create()
    cell.write(Phase.SERVING, True)
    child = os.fork()
    if child == 0:
        cell.collecting(5)
        cell.turn(Phase.STOPPED, False)
        cell.write_facts({"db": False})
        os._exit(0)
    os.waitpid(child, 0)
    beat = cell.read()
    assert beat is not None
    assert (beat.phase, beat.ready) == (Phase.SERVING, True)
    assert cell.collecting_since_ns == 0
    assert cell.read_facts() == {}
    cell.close()


def test_who_writes_to_a_closed_cell_harms_nobody() -> None:
    cell = BeatCell.create()
    cell.close()
    cell.write(Phase.STOPPED, False)
    cell.watchdog_alive(1)


def test_a_cell_with_an_impossible_phase_is_no_beat() -> None:
    cell = BeatCell.create()
    cell.write(Phase.SERVING, True)
    os.pwrite(cell.fd, b"\x63\x00", 4)
    assert cell.read() is None
    cell.close()


AS_ON_MACOS = """
import asyncio, faulthandler, logging, os, platform, time
from pathlib import Path
del os.memfd_create, faulthandler.register
from aither_sdk.stalls import gauges
gauges._PROC = "/nowhere"
gauges._read = lambda path: b""
import aither_sdk
logging.basicConfig(format="%(message)s")
async def main():
    async with aither_sdk.watch(health_port=0) as watch:
        await asyncio.sleep(0.2)
        time.sleep(0.5)
        await asyncio.sleep(0.2)
        print(watch.witness.address)
asyncio.run(main())
"""


def test_a_platform_without_memfd_signal_and_proc_is_watched_and_told_what_it_lacks() -> None:
    ended = run_script(AS_ON_MACOS)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("stall.no_evidence_without_gil") == 1
    assert "this platform has no faulthandler.register" in ended.stderr
    assert "blocking_syscall in __main__.main (<string>:13)" in ended.stderr
    assert ended.stdout.startswith("127.0.0.1:")


OWN_PROVIDER = """
import asyncio, time
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
told = []
class Kept(SpanExporter):
    def export(self, spans):
        now = time.monotonic()
        told.extend((span.name, span.context.trace_id, span.parent, now) for span in spans)
        return SpanExportResult.SUCCESS
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(Kept()))
trace.set_tracer_provider(provider)
import aither_sdk
async def main():
    with aither_sdk.watch("own"):
        await asyncio.sleep(0.2)
        with trace.get_tracer("own").start_as_current_span("mine") as mine:
            await asyncio.sleep(0)
            time.sleep(0.6)
            end = time.monotonic()
        await asyncio.sleep(0.3)
    trace_id = mine.get_span_context().trace_id
    for name, found, parent, at in told:
        if found == trace_id and parent is not None:
            print(name, at < end)
asyncio.run(main())
"""


def test_a_programs_own_tracer_provider_is_told_in_the_interrupted_trace() -> None:
    quiet = {name: "" for name in os.environ if name.startswith("OTEL_EXPORTER")}
    ended = run_script(OWN_PROVIDER, **quiet)
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.split("\n")
    assert "event_loop.stall.detected True" in lines, ended.stderr
    assert "event_loop.stall False" in lines


def test_another_loop_than_the_standard_one_is_looked_at_by_its_tasks() -> None:
    class Foreign:
        pass

    loop: Any = Foreign()
    assert sampling.is_foreign(loop)
    seen = sampling.look(loop, threading.get_ident())
    assert seen is not None
    assert seen.handle is not None  # this very function: no runner waits for events here
    assert seen.context is None
    own = asyncio.new_event_loop()
    standard = sampling.look(own, threading.get_ident())
    own.close()
    assert standard is not None
    assert standard.handle is None


def test_what_a_witness_says_that_is_no_evidence_stops_nobody_from_listening(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = heard_from("aither_sdk.witness.parent", monkeypatch)
    heard: list[Any] = []

    def hear(said: dict[str, Any]) -> None:
        heard.append(said["stall_id"])

    cell = BeatCell.create()
    witness = Witness(cell, "127.0.0.1", 0, [], heard=hear)
    for line in (b"a library's own words\n", b"{}\n", b"[]\n", b'{"stall_id": "1"}\n'):
        witness._hear(line)
    assert heard == ["1"]
    assert said == ["witness.not_understood"] * 3
    cell.close()


def test_a_witness_that_was_stopped_does_not_start() -> None:
    cell = BeatCell.create()
    witness = Witness(cell, "127.0.0.1", 0, [])
    witness.stop()
    with pytest.raises(aither_sdk.AitherError, match="the service ends"):
        witness.start()
    assert witness.pid == 0
    cell.close()


READ_ONLY = """
import asyncio, json, os, time
import aither_sdk
async def main():
    async with aither_sdk.watch(health_port=0) as watch:
        await asyncio.sleep(0.1)
        time.sleep(0.3)
        await asyncio.sleep(0.1)
    try:
        open("/tmp/aither-may-not-write", "w")
        writable = True
    except OSError:
        writable = False
    print(json.dumps({"pid": os.getpid(), "writable": writable, "stalls": watch.stalls,
        "children": open("/proc/thread-self/children").read().split()}))
asyncio.run(main())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="a read-only root needs a mount namespace")
def test_a_read_only_file_system_without_privileges_as_pid_1_is_enough() -> None:
    mounts = "mount -t proc proc /proc && mount --bind / / && mount -o remount,ro,bind / / && "
    command = mounts + 'exec setpriv --bounding-set=-all --inh-caps=-all "$@"'
    if run_script("", "unshare", "-mpf", "sh", "-c", mounts + 'exec "$@"', "sh").returncode:
        pytest.skip("no mount namespaces here")
    ended = run_script(READ_ONLY, "unshare", "-mpf", "sh", "-c", command, "sh")
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert told["pid"] == 1
    assert told["stalls"] >= 1
    assert told["writable"] is False
    assert told["children"] == []
