"""Each kind of check against real servers that are killed, stopped and brought back."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from aither.pulse.v1.target_pb2 import (
    Check,
    CheckFailure,
    CheckResult,
    GrpcCheck,
    HttpCheck,
    ProcessCheck,
    TcpCheck,
)
from aither_sdk.addresses import serving_at
from aither_sdk.clock import SystemClock
from pulse_svc.checks import CheckTools, open_check
from pulse_svc.checks.base import TIMEOUT, bad, clipped
from pulse_svc.checks.grpc import in_plain_words
from pulse_svc.checks.http import open_session
from pulse_svc.lag import LagMeter
from pulse_svc.threads import Threads
from tests.processes import suspend
from tests.pulse.building import target
from tests.pulse.peers import Peer, eventually, peers
from tests.stopwatch import Stopwatch

TIMEOUT_S = 0.4
PATIENT_S = 10.0
"""For answers that do come: a busy machine must not fail a test."""


class Bench:
    """Checks with the tools that they share."""

    def __init__(self, tools: CheckTools) -> None:
        self._tools = tools

    @asynccontextmanager
    async def open(self, check: Check) -> AsyncIterator[Probe]:
        opened = open_check(target("x", check=check), self._tools)

        async def probe(timeout_s: float = PATIENT_S) -> CheckResult:
            try:
                async with asyncio.timeout(timeout_s):
                    result = await opened.probe(timeout_s)
            except TimeoutError:
                return bad(TIMEOUT, "ended from outside")
            assert result is not None
            return result

        try:
            yield Probe(probe)
        finally:
            await opened.aclose()

    async def once(self, check: Check, timeout_s: float = PATIENT_S) -> CheckResult:
        async with self.open(check) as probe:
            return await probe(timeout_s)


class Probe:
    def __init__(self, probe: object) -> None:
        self._probe = probe

    async def __call__(self, timeout_s: float = PATIENT_S) -> CheckResult:
        assert callable(self._probe)
        result = await self._probe(timeout_s)
        assert isinstance(result, CheckResult)
        return result

    async def until_ok(self) -> float:
        """Seconds until it was good."""
        watch = Stopwatch()
        while not (await self(1.0)).ok:
            assert watch.elapsed_s < 20
            await asyncio.sleep(0.02)
        return watch.calm_s


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    clock = SystemClock()
    names = Threads("names", 4)
    async with open_session(names) as session:
        yield Bench(CheckTools(clock, LagMeter(clock), session, names, Threads("processes", 4)))


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, Peer]]:
    with peers("http", "tcp", "grpc") as started:
        yield {peer.kind: peer for peer in started}


def http(peer: Peer, path: str = "/", *, expect: tuple[int, ...] = (), method: str = "") -> Check:
    url = f"http://{peer.address}{path}"
    return Check(http=HttpCheck(url=url, expect_status=expect, method=method))


def check_of(peer: Peer) -> Check:
    match peer.kind:
        case "http":
            return http(peer)
        case "tcp":
            return Check(tcp=TcpCheck(address=peer.address))
        case _:
            return Check(grpc=GrpcCheck(address=peer.address))


@pytest.mark.parametrize("kind", ["http", "tcp", "grpc"])
async def test_a_server_that_is_killed_is_refused_and_found_again_at_once(
    bench: Bench, servers: dict[str, Peer], kind: str
) -> None:
    peer = servers[kind]
    async with bench.open(check_of(peer)) as probe:
        assert (await probe()).ok
        peer.kill()
        results = [await probe() for _ in range(5)]
        peer.start()
        await asyncio.to_thread(peer.wait)
        for result in results:
            assert (result.ok, result.failure) == (False, CheckFailure.CHECK_FAILURE_REFUSED)
        # The first look may still find the connection from before, in the moment of its end.
        assert all("refused" in result.message for result in results[1:])
        assert (await probe()).ok, "the first look after it listens again"


@pytest.mark.parametrize("kind", ["http", "grpc"])
async def test_a_server_that_is_stopped_times_out_and_is_well_when_it_goes_on(
    bench: Bench, servers: dict[str, Peer], kind: str
) -> None:
    peer = servers[kind]
    async with bench.open(check_of(peer)) as probe:
        assert (await probe()).ok
        peer.stop()
        try:
            for _ in range(2):
                watch = Stopwatch()
                result = await probe(TIMEOUT_S)
                assert result.failure == CheckFailure.CHECK_FAILURE_TIMEOUT
                assert watch.calm_s < TIMEOUT_S + 1.0
        finally:
            peer.go_on()
        assert await probe.until_ok() < 3.0


async def test_a_stopped_server_still_accepts_tcp_as_the_docstring_warns(
    bench: Bench, servers: dict[str, Peer]
) -> None:
    peer = servers["tcp"]
    peer.stop()
    try:
        assert (await bench.once(check_of(peer))).ok
    finally:
        peer.go_on()


async def test_http_judges_by_the_status_and_follows_no_redirect(
    bench: Bench, servers: dict[str, Peer]
) -> None:
    peer = servers["http"]
    result = await bench.once(http(peer, "/503"))
    assert (result.failure, result.message) == (
        CheckFailure.CHECK_FAILURE_BAD_ANSWER,
        "GET answered 503, expected 200",
    )
    assert (await bench.once(http(peer, "/503", expect=(200, 503)))).ok
    assert (await bench.once(http(peer, "/302", expect=(302,)))).ok
    assert (await bench.once(http(peer, "/large"))).ok
    assert (await bench.once(http(peer, method="HEAD"))).ok


async def test_http_takes_an_answer_that_is_no_http_for_a_bad_one(
    bench: Bench, servers: dict[str, Peer]
) -> None:
    url = f"http://{servers['tcp'].address}/"
    result = await bench.once(Check(http=HttpCheck(url=url)))
    assert not result.ok
    tls = f"https://{servers['http'].address}/"
    assert not (await bench.once(Check(http=HttpCheck(url=tls)))).ok


async def test_grpc_judges_by_the_status_of_the_service(
    bench: Bench, servers: dict[str, Peer]
) -> None:
    address = servers["grpc"].address

    async def ask(service: str) -> CheckResult:
        return await bench.once(Check(grpc=GrpcCheck(address=address, service=service)))

    assert (await ask("well")).ok
    assert (await ask("ill")).message == "NOT_SERVING"
    assert (await ask("nobody")).message == 'knows no service "nobody"'


async def test_grpc_says_in_plain_words_why_there_is_no_answer(
    bench: Bench, servers: dict[str, Peer]
) -> None:
    def grpc_at(address: str) -> Check:
        return Check(grpc=GrpcCheck(address=address))

    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        result = await bench.once(grpc_at(address))
    assert result.message == f"{address}: Connection refused"
    result = await bench.once(grpc_at(servers["http"].address))
    assert (result.failure, result.message) == (
        CheckFailure.CHECK_FAILURE_BAD_ANSWER,
        "does not speak gRPC",
    )


@pytest.mark.parametrize(
    ("details", "told"),
    [
        (
            "failed to connect to all addresses; last error: UNKNOWN: ipv6:%5B::1%5D:1: "
            "Failed to connect to remote host: Connection refused",
            "Connection refused",
        ),
        (
            "last error: UNAVAILABLE: ipv4:127.0.0.1:1: recvmsg:Connection reset by peer (104)",
            "Connection reset by peer (104)",
        ),
        ("Stream removed (Transport closed (Socket closed))", "connection closed"),
        ("connection attempt timed out before receiving SETTINGS frame", "no answer in time"),
        ("the log is being repaired: 3 of 4", "the log is being repaired: 3 of 4"),
        ("", "no connection"),
    ],
)
def test_what_grpc_wraps_around_the_systems_words_is_taken_off(details: str, told: str) -> None:
    assert in_plain_words(details) == told


async def test_grpc_does_not_call_pulse_itself(bench: Bench) -> None:
    with serving_at("127.0.0.1", 7402):
        result = await bench.once(Check(grpc=GrpcCheck(address="localhost:7402")))
    assert result.failure == CheckFailure.CHECK_FAILURE_INTERNAL
    assert "is Pulse itself" in result.message


@pytest.mark.parametrize(
    "check",
    [
        Check(tcp=TcpCheck(address="no-such-host.invalid:80")),
        Check(http=HttpCheck(url="http://no-such-host.invalid/")),
        Check(grpc=GrpcCheck(address="no-such-host.invalid:80")),
    ],
)
async def test_a_name_that_does_not_exist_is_a_bad_result(bench: Bench, check: Check) -> None:
    result = await bench.once(check, timeout_s=5.0)
    assert not result.ok
    # A machine without a name server may need longer than anybody waits to find out.
    assert result.failure in (
        CheckFailure.CHECK_FAILURE_NOT_FOUND,
        CheckFailure.CHECK_FAILURE_TIMEOUT,
    )


async def test_a_name_is_resolved(bench: Bench, servers: dict[str, Peer]) -> None:
    port = servers["tcp"].port
    assert (await bench.once(Check(tcp=TcpCheck(address=f"localhost:{port}")))).ok
    url = f"http://localhost:{servers['http'].port}/"
    assert (await bench.once(Check(http=HttpCheck(url=url)))).ok


def process(**selector: object) -> Check:
    made = ProcessCheck()
    for key, value in selector.items():
        setattr(made, key, value)
    return Check(process=made)


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    marker = f"sleeper-{os.getpid()}-{time.monotonic_ns()}"
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", marker])
    try:
        eventually(lambda: marker in Path(f"/proc/{child.pid}/cmdline").read_text())
        yield child
    finally:
        child.kill()
        child.wait()


async def test_a_process_is_well_stopped_a_zombie_or_gone(
    bench: Bench, sleeper: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    pid_file = tmp_path / "x.pid"
    pid_file.write_text(f"{sleeper.pid}\n")
    assert isinstance(sleeper.args, list)
    marker = str(sleeper.args[-1])
    selectors: list[dict[str, object]] = [
        {"pid": sleeper.pid},
        {"pid_file": str(pid_file)},
        {"command": marker},
    ]

    def state_is(letter: str) -> bool:
        return f") {letter} " in Path(f"/proc/{sleeper.pid}/stat").read_text()

    for selector in selectors:
        async with bench.open(process(**selector)) as probe:
            assert (await probe()).ok, selector
            suspend(sleeper.pid)
            assert (await probe()).message == f"process {sleeper.pid} is stopped"
            os.kill(sleeper.pid, signal.SIGCONT)
            eventually(lambda: not state_is("T"))
            assert (await probe()).ok
    async with bench.open(process(pid=sleeper.pid)) as probe:
        assert (await probe()).ok
        sleeper.kill()
        eventually(lambda: state_is("Z"))
        assert "is a zombie" in (await probe()).message
        sleeper.wait()
        assert (await probe()).failure == CheckFailure.CHECK_FAILURE_NOT_FOUND
    for selector in selectors:
        result = await bench.once(process(**selector))
        assert result.failure == CheckFailure.CHECK_FAILURE_NOT_FOUND, selector


async def test_a_pid_file_that_is_missing_or_holds_something_else_is_told(
    bench: Bench, tmp_path: Path
) -> None:
    path = tmp_path / "x.pid"
    assert "No such file" in (await bench.once(process(pid_file=str(path)))).message
    path.write_text("soon")
    result = await bench.once(process(pid_file=str(path)))
    assert 'holds "soon", not a process id' in result.message


async def test_a_thread_that_hangs_keeps_its_place_and_harms_no_other_threads() -> None:
    threads = Threads("test", 1)
    let_go = asyncio.Event()
    loop = asyncio.get_running_loop()

    def hang() -> None:
        asyncio.run_coroutine_threadsafe(let_go.wait(), loop).result()

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await threads.run(hang)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await threads.run(lambda: 1)
    assert await Threads("other", 1).run(lambda: 2) == 2
    let_go.set()
    async with asyncio.timeout(10):
        assert await threads.run(lambda: 3) == 3


async def test_what_a_thread_raises_comes_to_the_caller() -> None:
    def fail() -> None:
        raise ValueError("as told")

    with pytest.raises(ValueError, match="as told"):
        await Threads("test", 1).run(fail)


def test_a_message_is_one_line_of_512_bytes_of_utf8() -> None:
    assert clipped("a\n b\t c") == "a b c"
    assert len(clipped("ä" * 1000).encode()) == 512
    assert clipped("a" + "ä" * 1000) == "a" + "ä" * 255
    assert clipped("\ud800") == "?"
