"""`aither up` with real child processes, which are small stand-ins for the services."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from pathlib import Path

import pytest

from aither_cli.house import ONE_REQUEST_S
from tests.cli.aither_process import PATIENCE_S, Aither, aither, fakes
from tests.ports import free_port_base
from tests.stopwatch import Stopwatch


def up_arguments(tmp_path: Path, *more: str) -> list[str]:
    only = [] if "--only" in more else ["--only", "flux,pulse,genesis"]
    data = str(tmp_path / "data")
    base = str(free_port_base())
    return ["up", "--port-base", base, "--data-dir", data, "--no-follow", *only, *more]


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    return fakes(tmp_path / "fakes")


async def gone(pid: int) -> None:
    """Waits until there is no such process."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                return
            await asyncio.sleep(0.02)


async def stopped(up: Aither) -> tuple[int, str, float]:
    watch = Stopwatch()
    up.signal(signal.SIGINT)
    code, said = await up.end()
    return code, said, watch.calm_s


async def test_up_starts_all_tells_one_table_and_ctrl_c_drains_pulse_first_and_flux_last(
    tmp_path: Path, env: dict[str, str]
) -> None:
    async with aither(*up_arguments(tmp_path), env=env) as up:
        head = await up.until("^service")
        assert head.split() == ["service", "address", "health", "pid", "state"]
        pids = [await up.pid_of(name) for name in ("flux", "pulse", "genesis")]
        genesis = await up.until("^genesis")
        assert genesis.split()[1] == "-", "genesis has no data port"
        assert genesis.split()[2].startswith("127.0.0.1:")
        code, said, took_s = await stopped(up)
        assert code == 0, said
        assert took_s < 5
        for pid in pids:
            await gone(pid)
    drained = (tmp_path / "data" / "drained").read_text().split()
    assert drained == ["pulse", "genesis", "flux"]
    assert "here I am" in (tmp_path / "data" / "logs" / "flux.log").read_text()


async def test_pulse_is_told_which_services_run_so_that_no_other_is_missed(
    tmp_path: Path, env: dict[str, str]
) -> None:
    async with aither(*up_arguments(tmp_path, "--only", "flux,pulse"), env=env) as up:
        environ = Path(f"/proc/{await up.pid_of('pulse')}/environ").read_text().split("\0")
        assert 'AITHER_PULSE__SERVICES=["flux", "pulse"]' in environ


async def test_sigterm_drains_as_ctrl_c_does(tmp_path: Path, env: dict[str, str]) -> None:
    async with aither(*up_arguments(tmp_path, "--only", "flux"), env=env) as up:
        pid = await up.pid_of("flux")
        up.signal(signal.SIGTERM)
        code, _ = await up.end()
        assert code == 0
        await gone(pid)


async def test_a_service_that_dies_is_reported_and_restarted(
    tmp_path: Path, env: dict[str, str]
) -> None:
    async with aither(*up_arguments(tmp_path, "--only", "flux,pulse"), env=env) as up:
        pid = await up.pid_of("pulse")
        os.kill(pid, signal.SIGKILL)
        await up.until(r"pulse +died: killed by SIGKILL; restarting in 1 s")
        await up.until(r"    pulse says: here I am")
        again = await up.until(r"pulse +runs again \(pid \d+\)")
        assert f"(pid {pid})" not in again
        code, _, _ = await stopped(up)
        assert code == 0


async def test_ctrl_c_while_a_restart_is_waited_for_ends_at_once(
    tmp_path: Path, env: dict[str, str]
) -> None:
    async with aither(*up_arguments(tmp_path, "--only", "flux"), env=env) as up:
        os.kill(await up.pid_of("flux"), signal.SIGKILL)
        await up.until("restarting in")
        code, _, took_s = await stopped(up)
        assert code == 0
        assert took_s < 3


async def test_ctrl_c_before_everything_is_ready_drains_too(
    tmp_path: Path, env: dict[str, str]
) -> None:
    env["FAKE_PULSE"] = "unready"
    async with aither(*up_arguments(tmp_path), env=env) as up:
        log = tmp_path / "data" / "logs" / "pulse.log"
        async with asyncio.timeout(PATIENCE_S):
            while not (log.exists() and "here I am" in log.read_text()):  # a file
                await asyncio.sleep(0.02)
        code, said, took_s = await stopped(up)
    assert code == 0, said
    assert took_s < 5
    assert "flux" in (tmp_path / "data" / "drained").read_text()


async def test_a_service_that_ignores_sigterm_is_killed_in_time_and_it_is_told(
    tmp_path: Path, env: dict[str, str]
) -> None:
    env["FAKE_PULSE"] = "deaf"
    async with aither(*up_arguments(tmp_path), env=env) as up:
        pid = await up.pid_of("pulse")
        code, said, took_s = await stopped(up)
        assert code == 0
        assert took_s < 5
        assert "did not drain in time; ending it with SIGKILL" in said
        assert "did not drain in order" not in said, "it is told once"
        await gone(pid)
    drained = (tmp_path / "data" / "drained").read_text().split()
    assert drained == ["genesis", "flux"], "the others drained all the same"


async def test_a_second_ctrl_c_ends_everything_at_once(tmp_path: Path, env: dict[str, str]) -> None:
    env["FAKE_FLUX"] = "deaf"
    async with aither(*up_arguments(tmp_path, "--only", "flux"), env=env) as up:
        pid = await up.pid_of("flux")
        up.signal(signal.SIGINT)
        await up.until("draining")
        await asyncio.sleep(2 * ONE_REQUEST_S)  # a shorter pause would be the same Ctrl-C
        code, _, took_s = await stopped(up)
        assert code == 130
        assert took_s < 2
        await gone(pid)


async def test_one_ctrl_c_that_arrives_twice_is_one(tmp_path: Path, env: dict[str, str]) -> None:
    async with aither(*up_arguments(tmp_path, "--only", "flux"), env=env) as up:
        pid = await up.pid_of("flux")
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            up.signal(number)
        code, said = await up.end()
        assert code == 0, said
        await gone(pid)
    assert (tmp_path / "data" / "drained").read_text() == "flux\n"


async def test_a_service_that_cannot_start_ends_up_with_its_last_words(
    tmp_path: Path, env: dict[str, str]
) -> None:
    env["FAKE_PULSE"] = "exits"
    async with aither(*up_arguments(tmp_path), env=env) as up:
        code, said = await up.end()
    assert code == 1
    assert "aither: pulse cannot start: exit code 3; see " in said
    assert "my last words" in said
    assert "Traceback" not in said
    assert "flux" in (tmp_path / "data" / "drained").read_text(), "what had started was drained"


async def test_bad_settings_of_a_service_are_told_a_line_each(
    tmp_path: Path, env: dict[str, str]
) -> None:
    env["FAKE_PULSE"] = "refuses"
    async with aither(*up_arguments(tmp_path, "--only", "pulse"), env=env) as up:
        code, said = await up.end()
    assert code == 1
    lines = [line for line in said.splitlines() if not line.startswith("pulse waits for Flux")]
    assert lines[0].startswith("aither: pulse cannot start: exit code 2; see ")
    assert lines[1:] == [
        "  fleet.yaml:3: targets[0].check: no such kind",
        "  fleet.yaml:9: targets[1].name: stands here twice",
    ]


async def test_every_mistake_in_a_fleet_is_told(tmp_path: Path) -> None:
    fleet = tmp_path / "fleet.yaml"
    fleet.write_text(
        "targets:\n"
        "  - name: Bad Name\n    check: {kind: tcp, address: 127.0.0.1:1}\n"
        "  - name: b\n    check: {kind: telepathy}\n"
    )
    arguments = up_arguments(tmp_path, "--only", "pulse")
    async with aither(*arguments, env={"AITHER_PULSE__FLEET": str(fleet)}) as up:
        code, said = await up.end()
    assert code == 1
    lines = [line for line in said.splitlines() if str(fleet) in line]
    assert len(lines) >= 2, said
    assert any("Bad Name" in line for line in lines), said
    assert any("telepathy" in line for line in lines), said


async def test_an_empty_data_dir_is_refused(tmp_path: Path, env: dict[str, str]) -> None:
    for arguments, more, expected in (
        (["up", "--data-dir", ""], {}, 2),
        (["up"], {"AITHER_DATA_DIR": ""}, 1),
    ):
        async with aither(*arguments, env={**env, **more}) as up:
            code, said = await up.end()
        assert code == expected, said
        assert "empty; name a folder" in said


async def test_who_waits_for_a_flux_that_is_not_there_says_so_at_once(
    tmp_path: Path, env: dict[str, str]
) -> None:
    async with aither(*up_arguments(tmp_path, "--only", "genesis"), env=env) as up:
        await up.until("^genesis .* ready$")
        _, said, _ = await stopped(up)
    assert "genesis waits for Flux: nobody listens at 127.0.0.1:" in said


async def test_children_are_told_when_up_itself_is_killed(
    tmp_path: Path, env: dict[str, str]
) -> None:
    note = tmp_path / "note"
    env |= {"FAKE_FLUX": "orphan", "FAKE_NOTE": str(note)}
    async with aither(*up_arguments(tmp_path, "--only", "flux"), env=env) as up:
        pid = await up.pid_of("flux")
        up.signal(signal.SIGKILL)
        await gone(pid)
    assert note.read_text() == "flux heard it"


async def test_ctrl_c_in_a_terminal_reaches_only_the_parent(
    tmp_path: Path, env: dict[str, str]
) -> None:
    async with aither(*up_arguments(tmp_path, "--only", "flux"), env=env) as up:
        pid = await up.pid_of("flux")
        assert os.getpgid(pid) != os.getpgid(up.process.pid)
        assert os.getsid(pid) != os.getsid(up.process.pid)


async def test_a_reader_that_goes_away_stops_the_house(tmp_path: Path, env: dict[str, str]) -> None:
    async with aither(*up_arguments(tmp_path, "--only", "flux"), env=env) as up:
        pid = await up.pid_of("flux")
        up.stop_reading()
        os.kill(pid, signal.SIGKILL)  # its death is what shall be told
        async with asyncio.timeout(PATIENCE_S):
            assert await up.process.wait() == 0


async def test_two_on_the_same_data_dir_are_refused(tmp_path: Path, env: dict[str, str]) -> None:
    async with aither(*up_arguments(tmp_path, "--only", "flux"), env=env) as first:
        await first.pid_of("flux")
        async with aither(*up_arguments(tmp_path, "--only", "flux"), env=env) as second:
            code, said = await second.end()
        assert code == 1
        assert "aither: already running on data dir" in said
        assert f"(pid {first.process.pid})" in said
        assert len(said.splitlines()) == 1
        code, _, _ = await stopped(first)
        assert code == 0


async def test_a_taken_port_is_named_with_its_service_and_a_way_out(
    tmp_path: Path, env: dict[str, str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        env["AITHER_PULSE__PORT"] = str(port)
        async with aither(*up_arguments(tmp_path), env=env) as up:
            code, said = await up.end()
    assert code == 1
    assert f"aither: port {port} of pulse is taken" in said
    assert f"by pid {os.getpid()}" in said
    assert "--port-base" in said
    assert len(said.splitlines()) == 1


async def test_a_data_dir_that_cannot_be_written_is_named(
    tmp_path: Path, env: dict[str, str]
) -> None:
    (tmp_path / "file").write_text("")
    arguments = ["up", "--port-base", "0", "--data-dir", str(tmp_path / "file" / "data")]
    async with aither(*arguments, env=env) as up:
        code, said = await up.end()
    assert code == 1
    assert said.startswith("aither: data dir ")
    assert "cannot be written" in said
    assert "--data-dir" in said
    assert len(said.splitlines()) == 1


async def test_every_fault_of_the_settings_is_a_line(tmp_path: Path, env: dict[str, str]) -> None:
    config = tmp_path / "aither.yaml"
    config.write_text(
        "flux:\n  prot: 7401\n  log: paper\npulse:\n  bind: 0.0.0.0\n  max_checks: 0\n"
    )
    async with aither(*up_arguments(tmp_path, "--config", str(config)), env=env) as up:
        code, said = await up.end()
    assert code == 1
    lines = said.splitlines()
    assert all(line.startswith(f"aither: {config}:") for line in lines), said
    keys = ("flux.prot", "flux.log", "pulse.bind", "pulse.max_checks")
    assert all(any(key in line for line in lines) for key in keys), said


async def test_a_service_that_does_not_exist_is_a_usage_error(
    tmp_path: Path, env: dict[str, str]
) -> None:
    async with aither(*up_arguments(tmp_path, "--only", "flux,plse"), env=env) as up:
        code, said = await up.end()
    assert code == 2
    assert said.startswith('aither: there is no service "plse"; choose from flux, ')
    assert len(said.splitlines()) == 1
