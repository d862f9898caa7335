"""`status`, `tail`, `publish` against a real Flux, and what they say when something is wrong."""

from __future__ import annotations

import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from aither_cli.main import run
from aither_cli.publish import payload_of
from aither_sdk.version import VERSION
from tests.cli.aither_process import ROOT
from tests.ports import free_port_base
from tests.processes import running
from tests.stopwatch import Stopwatch

COMMAND = [sys.executable, "-P", "-m", "aither_cli"]


def environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if "AITHER_" not in key}
    return {**kept, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'generated'}"}


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a real Flux that `aither up` keeps, with the memory log."""
    data = str(tmp_path_factory.mktemp("data"))
    base = str(free_port_base())
    arguments = ["--only", "flux", "--log", "memory", "--port-base", base, "--data-dir", data]
    with subprocess.Popen(
        [*COMMAND, "up", *arguments, "--no-follow"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment(),
        text=True,
    ) as process:
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said += line
            if line.startswith("flux "):
                break
        try:
            assert " ready" in said, said
            yield said.splitlines()[-1].split()[1]
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=20)
        assert process.returncode == 0


@pytest.fixture
def port_base(flux: str) -> str:
    return str(int(flux.rpartition(":")[2]) - 1)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings of the surroundings."""
    for key in [key for key in os.environ if key.startswith("AITHER_")]:
        monkeypatch.delenv(key)
    monkeypatch.chdir(tmp_path)


Captured = pytest.CaptureFixture[str]


def refused(capsys: Captured, *arguments: str) -> tuple[int, str]:
    """Exit code and the one line on stderr."""
    code = run(list(arguments))
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert err.startswith("aither: ")
    return code, err


# -- publish


def test_what_is_published_can_be_tailed(flux: str, capsys: Captured) -> None:
    assert run(["publish", "demo.hello", '{"a": 1}', "--flux", flux]) == 0
    match = re.fullmatch(r"published demo\.hello as (\d+)\n", capsys.readouterr().out)
    assert match is not None
    sequence = match[1]
    arguments = ["tail", "demo.>", "--from", sequence, "--max", "1", "--flux", flux]
    assert run(arguments) == 0
    out, err = capsys.readouterr()
    assert re.fullmatch(
        rf'\d\d:\d\d:\d\d\.\d{{3}} #{sequence} demo\.hello aither-cli {{"a":1}}\n', out
    )
    assert err == "", "the end of a finished tail is no news"
    assert run([*arguments, "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["sequence"] == sequence
    assert value["payload"]["value"] == {"a": 1}


def test_the_same_source_and_id_are_stored_once(flux: str, capsys: Captured) -> None:
    arguments = ["publish", "demo.once", "{}", "--id", "x", "--source", "me", "--flux", flux]
    assert run(arguments) == 0
    assert "published demo.once as" in capsys.readouterr().out
    assert run(arguments) == 0
    assert "demo.once was stored before as" in capsys.readouterr().out


def test_a_typed_payload_headers_and_no_payload(flux: str, capsys: Captured) -> None:
    kind = "aither.genesis.v1.DisableAgent"
    more = ["--flux", flux, "--header", "a=b=c", "--header", "d="]
    assert run(["publish", "demo.typed", '{"agent": "x"}', "--type", kind, *more]) == 0
    assert run(["publish", "demo.bare", "--flux", flux]) == 0
    capsys.readouterr()
    assert (
        run(
            ["tail", "demo.typed", "demo.bare", "--from", "last", "--max", "2", "--json", *more[:2]]
        )
        == 0
    )
    typed, bare = map(json.loads, capsys.readouterr().out.splitlines())
    assert typed["payload"] == {"@type": f"type.googleapis.com/{kind}", "agent": "x"}
    assert typed["headers"] == {"a": "b=c", "d": ""}
    assert "payload" not in bare


def test_a_dash_reads_the_payload_from_stdin(flux: str) -> None:
    done = subprocess.run(
        [*COMMAND, "publish", "demo.stdin", "-", "--flux", flux],
        input='{"from": "stdin"}',
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("published demo.stdin as ")


def test_an_empty_stdin_is_said_to_be_empty(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    code, err = refused(capsys, "publish", "demo.stdin", "-")
    assert (code, "nothing came on stdin" in err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["demo..x", "{}"], "empty token"),
        (["Demo", "{}"], "characters other than"),
        (["demo.*", "{}"], "wildcard"),
        (["demo.x", "{a: 1}"], "no JSON"),
        (["demo.x", ""], "no JSON"),
        (["demo.x", "[1]"], "a JSON object is needed, this is an array"),
        (["demo.x", "7"], "this is a number"),
        (["demo.x", '{"a": NaN}'], "NaN is no JSON"),
        (["demo.x", '{"a": 12345678901234567890}'], "would lose digits"),
        (["demo.x", "[" * 100_000], "no JSON"),
        (["demo.x", "{}", "--type", "aither.genesis.v1.DisableAgen"], "did you mean"),
        (["demo.x", '{"agnt": 1}', "--type", "aither.genesis.v1.DisableAgent"], "agnt"),
        (["demo.x", "{}", "--header", "a"], "is not KEY=VALUE"),
        (["demo.x", "{}", "--header", "A=b"], "lower case"),
        (["demo.x", "{}", "--source", ""], "source"),
        (["demo.x", "{}", "--id", "x" * 200], "id: 200 bytes"),
        (["demo.x", '{"a": "' + "x" * 2_000_000 + '"}'], "an event has 1048576 at most"),
        (["demo.x", "{}", "--flux", "nowhere"], "is not host:port"),
        ([], "see `aither publish --help`"),
        (["demo.x", '{"a": {"b": 1, "b": 2}}'], '"b" stands twice in one object; keep one'),
        (["demo.x", "{}", "--id", ""], "--id is empty; leave it out for a random one"),
    ],
)
def test_a_wrong_publish_says_what_would_be_right(
    capsys: Captured, arguments: list[str], told: str
) -> None:
    code, err = refused(capsys, "publish", *arguments)
    assert code == 2
    assert told in err


def test_numbers_and_nesting_survive_as_they_were_written() -> None:
    assert payload_of('{"a": [1, 2.5, {"b": null}], "c": 9007199254740992}', None) == {
        "a": [1, 2.5, {"b": None}],
        "c": 2**53,
    }
    assert payload_of(None, None) is None


# -- where nobody, or somebody else, listens


def test_nobody_listening_is_said_with_what_to_do(capsys: Captured) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    for command in (["publish", "demo.x"], ["tail", "demo.>"]):
        code, err = refused(capsys, *command, "--flux", address)
        assert code == 1
        assert f"nobody listens at {address}; start it with `aither up`" in err
        assert "--flux" in err


def test_of_several_nodes_the_first_that_is_there_is_asked(
    flux: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and no listen(): whoever dials is refused
        missing = f"127.0.0.1:{nobody.getsockname()[1]}"
        nodes = f"{missing},{flux}"
        assert run(["publish", "demo.nodes", "--flux", nodes]) == 0
        monkeypatch.setenv("AITHER_FLUX__ADDRESS", nodes)
        assert run(["tail", "demo.nodes", "--from", "last", "--max", "1"]) == 0
        assert "demo.nodes" in capsys.readouterr().out.splitlines()[-1]
        code, err = refused(capsys, "tail", "demo.>", "--flux", f"{flux},b")
        assert (code, '--flux: "b" is not host:port' in err) == (2, True)
        code, err = refused(capsys, "tail", "demo.>", "--flux", f"{missing},{missing}")
        assert (code, f"nobody listens at {missing};" in err) == (1, True)


def test_a_grpc_server_that_is_not_flux_is_told_apart(capsys: Captured, port_base: str) -> None:
    health = f"127.0.0.1:{int(port_base) + 101}"
    for command in (["publish", "demo.x"], ["tail", "demo.>"]):
        code, err = refused(capsys, *command, "--flux", health)
        assert code == 1
        assert f"{health} answers gRPC but is not Flux" in err


def test_a_server_that_does_not_speak_grpc_is_told_apart(capsys: Captured) -> None:
    class Quiet(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Quiet) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            address = f"127.0.0.1:{server.server_port}"
            code, err = refused(capsys, "publish", "demo.x", "--flux", address)
        finally:
            server.shutdown()
            thread.join()
    assert code == 1
    assert f"{address} is there but does not speak gRPC" in err


def test_a_flux_that_is_stopped_is_not_taken_for_another_server(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running("flux_svc", tmp_path, AITHER_FLUX__LOG="memory") as stopped:
        monkeypatch.setenv("AITHER_FLUX__PORT", str(stopped.port))
        monkeypatch.setenv("AITHER_FLUX__HEALTH_PORT", str(stopped.health_port))
        stopped.signal(signal.SIGSTOP)
        code, err = refused(capsys, "publish", "demo.x")
        status = run(["status", "--only", "flux"])
        out = capsys.readouterr().out
        stopped.signal(signal.SIGCONT)
    assert code == 1
    assert f"{stopped.address} accepts connections but does not answer" in err
    assert (status, "Flux did not answer within 2 s" in out) == (1, True), out


# -- tail


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["a.>.b"], "only be the whole last token"),
        ([""], "an empty filter"),
        (["a.>", "--from", "yesterday"], "is no place to begin; use new, earliest, last"),
        (["a.>", "--max", "0"], "--max"),
        ([], "see `aither tail --help`"),
    ],
)
def test_a_wrong_tail_says_what_would_be_right(
    capsys: Captured, arguments: list[str], told: str
) -> None:
    code, err = refused(capsys, "tail", *arguments)
    assert code == 2
    assert told in err


def test_a_position_beyond_the_log_is_refused(flux: str, capsys: Captured) -> None:
    code, err = refused(capsys, "tail", ">", "--from", "999999999", "--flux", flux)
    assert code == 1
    assert "--from 999999999 lies beyond the end of the log, whose last event is " in err
    assert "use --from new" in err


def test_a_time_is_a_place_to_begin(flux: str, capsys: Captured) -> None:
    assert run(["publish", "demo.time", "--flux", flux]) == 0
    capsys.readouterr()
    arguments = ["--from", "2001-01-01T00:00:00Z", "--max", "1", "--flux", flux]
    assert run(["tail", "demo.time", *arguments]) == 0
    assert "demo.time" in capsys.readouterr().out


def test_tail_into_head_ends_silently(flux: str) -> None:
    for number in range(3):
        assert run(["publish", "demo.head", f'{{"n": {number}}}', "--flux", flux]) == 0
    with subprocess.Popen(
        [*COMMAND, "tail", "demo.head", "--from", "earliest", "--flux", flux],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert b"demo.head" in process.stdout.readline()
        process.stdout.close()
        # It notices when it has something to say.
        assert run(["publish", "demo.head", "--flux", flux]) == 0
        assert process.stderr.read() == b""
        assert process.wait(20) == 0


def test_ctrl_c_ends_tail_with_0(flux: str) -> None:
    with subprocess.Popen(
        [*COMMAND, "tail", ">", "--from", "earliest", "--flux", flux],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
        assert (process.returncode, err) == (0, b"")


def has_begun(pid: int) -> bool:
    """Whether a command that was started with SIGINT ignored has taken SIGINT for itself."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"^SigIgn:\s+(\w+)$", status, re.M)
    return found is None or not int(found[1], 16) >> (signal.SIGINT - 1) & 1


def ended_by_sigint(arguments: list[str], delay_s: float) -> tuple[int, bytes]:
    """Starts a command as a script does in its background, with SIGINT ignored; exit code and
    stderr of its end by a SIGINT at this time after it began."""
    with subprocess.Popen(
        [*COMMAND, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    ) as process:
        try:
            end_s = time.monotonic() + 30
            while not has_begun(process.pid) and time.monotonic() < end_s:
                time.sleep(0.005)
            time.sleep(delay_s)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        return process.returncode, err


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize(
    "trials", [4, pytest.param(120, marks=[pytest.mark.slow, pytest.mark.timeout(600)])]
)
@pytest.mark.parametrize("command", ["tail", "publish", "status"])
def test_ctrl_c_ends_a_command_at_any_moment_and_silently(
    flux: str, port_base: str, trials: int, command: str
) -> None:
    arguments = {
        "tail": ["tail", ">", "--from", "earliest", "--flux", flux],
        "publish": ["publish", "demo.interrupted", "--flux", flux],
        "status": ["status", "--only", "flux", "--port-base", port_base],
    }[command]
    moments = random.Random(f"{command} {trials}")
    delays_s = [moments.random() * 1.2 for _ in range(trials)]
    with ThreadPoolExecutor(3) as pool:
        ends = list(pool.map(lambda delay_s: ended_by_sigint(arguments, delay_s), delays_s))
    # Before it begins: by the signal itself. Before its call: 130. It may also just have succeeded.
    for delay_s, (code, err) in zip(delays_s, ends, strict=True):
        assert (code in (0, 130, -signal.SIGINT), err) == (True, b""), (delay_s, code, err)


def test_ctrl_c_ends_a_tail_whose_reader_does_not_read(flux: str) -> None:
    """Its write blocks for ever, so nothing on its loop could notice."""
    for number in range(8):
        payload = f'{{"n": {number}, "filler": "{"x" * 30_000}"}}'
        assert run(["publish", "demo.blocked", payload, "--flux", flux]) == 0
    with subprocess.Popen(
        [*COMMAND, "tail", "demo.blocked", "--json", "--from", "earliest", "--flux", flux],
        stdout=subprocess.PIPE,
        env=environment(),
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(1) == b"{"
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0


# -- status


def test_status_tells_services_and_log(flux: str, port_base: str, capsys: Captured) -> None:
    assert run(["status", "--only", "flux", "--port-base", port_base]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"^flux +ready +{flux} +127\.0\.0\.1:\d+ +\d+ +{VERSION}$", out, re.M), out
    assert re.search(r"^log +memory: \d+ events", out, re.M), out


def test_status_as_json_is_one_object(flux: str, port_base: str, capsys: Captured) -> None:
    assert run(["status", "--only", "flux", "--json", "--port-base", port_base]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["well"] is True
    assert value["services"][0]["address"] == flux
    assert value["stream"]["log"] == "memory"
    assert value["targets"] is None


def test_a_service_that_is_not_there_is_not_well(
    flux: str, port_base: str, capsys: Captured
) -> None:
    assert run(["status", "--only", "flux,pulse", "--port-base", port_base]) == 1
    assert re.search(r"^pulse +not reached", capsys.readouterr().out, re.M)


def test_status_where_nothing_answers_exits_with_2(capsys: Captured) -> None:
    watch = Stopwatch()
    # Ports of the reserved range below 1024 that nothing listens on.
    assert run(["status", "--port-base", "600", "--only", "flux"]) == 2
    out, err = capsys.readouterr()
    assert "not reached" in out
    assert "no service answers (127.0.0.1:701)" in err
    assert "`aither up`" in err
    assert watch.calm_s < 10


# -- the rest


def test_the_version_is_told() -> None:
    done = subprocess.run(
        [*COMMAND, "--version"], capture_output=True, text=True, env=environment(), check=True
    )
    assert done.stdout == f"aither {VERSION}\n"


@pytest.mark.parametrize("command", [[], ["up"], ["status"], ["tail"], ["publish"]])
def test_every_help_has_examples(command: list[str], capsys: Captured) -> None:
    assert run([*command, "--help"]) == 0
    out = capsys.readouterr().out
    assert "Examples:" in out
    assert "aither " + " ".join(command) in out
    if command:
        assert "Exit: 0" in out


def test_no_arguments_show_the_help(capsys: Captured) -> None:
    assert run([]) == 0
    assert "Usage: aither" in capsys.readouterr().out


def test_tools_of_flux_without_a_command_are_a_usage_error_of_one_line(capsys: Captured) -> None:
    code, err = refused(capsys, "flux")
    assert (code, err) == (2, "aither: Missing command; see `aither flux --help`\n")


def test_an_unknown_command_is_a_usage_error(capsys: Captured) -> None:
    code, err = refused(capsys, "frobnicate")
    assert code == 2
    assert "frobnicate" in err


def test_help_does_not_pay_for_grpc() -> None:
    code = (
        "import sys, contextlib, io\n"
        "from aither_cli.main import run\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        "    run(['up', '--help'])\n"
        "slow = {'grpc', 'google.protobuf', 'rich', 'opentelemetry'}\n"
        "print(sorted(slow & sys.modules.keys()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        capture_output=True,
        text=True,
        env=environment(),
        check=True,
    )
    assert done.stdout == "[]\n"


def test_faults_of_the_settings_are_a_line_each(capsys: Captured, tmp_path: Path) -> None:
    (tmp_path / "aither.yaml").write_text("flux:\n  prot: 1\n  log: paper\n")
    assert run(["status"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(
        'aither: aither.yaml:2: flux.prot: no such key; did you mean "port"?'
    )
    assert lines[1].startswith("aither: aither.yaml:3: flux.log: ")
