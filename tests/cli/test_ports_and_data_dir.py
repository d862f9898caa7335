"""Ports and the data dir: what is free, what is ours, and what is said when it is not."""

from __future__ import annotations

import os
import random
import shutil
import socket
from pathlib import Path

import pytest

from aither_cli import data_dir as rooms
from aither_cli.data_dir import ChildLog, held
from aither_cli.failures import Failure
from aither_cli.ports import OFFSETS, check_ports, free_base
from aither_cli.services import Place, chosen, installed, place_of
from aither_sdk.listening import bind_fault
from aither_sdk.settings import Settings


def test_a_free_base_has_all_its_ports_free() -> None:
    base = free_base(random.Random(1))
    assert all(bind_fault("127.0.0.1", base + offset) is None for offset in OFFSETS)


def test_a_port_that_somebody_listens_on_is_named_with_who_and_what_to_do() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert bind_fault("127.0.0.1", port) is not None
        with pytest.raises(Failure, match=f"port {port} of flux is taken") as raised:
            check_ports([Place("flux", "127.0.0.1", port, 0)])
        assert f"by pid {os.getpid()}" in str(raised.value)
        assert "--port-base" in str(raised.value)
        with pytest.raises(Failure, match=f"health port {port} of genesis is taken"):
            check_ports([Place("genesis", "127.0.0.1", None, port)])
    check_ports([Place("flux", "127.0.0.1", port, port)])


def test_an_address_of_another_machine_is_said_to_be_one() -> None:
    with pytest.raises(Failure, match="is not an address of this machine"):
        check_ports([Place("flux", "192.0.2.1", 7401, 7501)])


def test_connections_that_linger_do_not_make_a_port_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        accepted, _ = server.accept()
        accepted.close()  # the side that closes first is the one that lingers
        client.close()
    assert bind_fault("127.0.0.1", port) is None


def test_places_follow_the_port_base() -> None:
    settings = Settings(port_base=9000)
    assert place_of("flux", settings) == Place("flux", "127.0.0.1", 9001, 9101)
    assert place_of("constellation", settings) == Place("constellation", "127.0.0.1", 9080, 9105)
    genesis = place_of("genesis", settings)
    assert (genesis.address, genesis.health_address) == ("", "127.0.0.1:9104")


def test_a_service_bound_to_every_address_is_dialled_on_loopback() -> None:
    assert Place("flux", "0.0.0.0", 7401, 7501).address == "127.0.0.1:7401"
    assert Place("flux", "::", 7401, 7501).health_address == "[::1]:7501"


def test_only_chooses_in_the_order_of_start() -> None:
    assert chosen("pulse, flux") == ["flux", "pulse"]
    assert chosen(None) == installed()
    assert installed()[0] == "flux"


@pytest.mark.parametrize("only", ["", " , ", "flux,nonsense"])
def test_only_refuses_what_does_not_exist(only: str) -> None:
    with pytest.raises(Failure, match="choose from flux") as raised:
        chosen(only)
    assert raised.value.exit_code == 2


def test_the_data_dir_is_made_and_held_by_one(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with held(folder):
        assert (folder / "logs").is_dir()
        told = rf"already running on data dir .* \(pid {os.getpid()}\)"
        with pytest.raises(Failure, match=told), held(folder):
            raise AssertionError("held twice")
    with held(folder):
        pass


def test_a_data_dir_that_is_a_file_is_said_to_be_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    told = r"file is no folder; name one with --data-dir"
    with pytest.raises(Failure, match=told), held(tmp_path / "file"):
        raise AssertionError("held")


@pytest.fixture
def log(tmp_path: Path) -> ChildLog:
    (tmp_path / "logs").mkdir()
    return ChildLog(tmp_path, "flux")


def write(log: ChildLog, text: str) -> None:
    with log.open_run() as fd:
        os.write(fd, text.encode())


def test_the_last_lines_are_those_of_the_newest_run(log: ChildLog) -> None:
    assert log.last_lines(5) == []
    write(log, "old 1\nold 2\n")
    write(log, "".join(f"new {n}\n\n" for n in range(9)))
    assert log.last_lines(3) == ["new 6", "new 7", "new 8"]
    assert log.last_lines(50)[0] == "new 0"


def test_long_lines_and_damaged_text_are_shown_as_far_as_they_go(log: ChildLog) -> None:
    with log.open_run() as fd:
        os.write(fd, b"x" * 1_000 + b"\n\xff\xfe\n")
    first, second = log.last_lines(2, width=10)
    assert first == "xxxxxxxxx…"
    assert second == "��"


def test_a_start_keeps_the_log_of_the_time_before(log: ChildLog) -> None:
    write(log, "before\n")
    log.rotate()
    write(log, "after\n")
    assert log.path.read_text() == "after\n"
    assert log.path.with_name("flux.log.1").read_text() == "before\n"


def test_a_log_that_grows_too_large_is_moved_while_it_is_written(
    log: ChildLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rooms, "LOG_BYTES", 100)
    with log.open_run() as fd:
        os.write(fd, b"a" * 101 + b"\n")
        log.trim()
        os.write(fd, b"goes on\n")
        log.trim()
    assert log.path.read_text() == "goes on\n", "the writer appends, so no hole is left"
    assert log.path.with_name("flux.log.1").stat().st_size == 102
    assert log.last_lines(1) == ["goes on"]


def test_the_last_words_of_a_service_on_a_full_disk_are_why_there_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = ChildLog(tmp_path, "flux")
    assert log.last_lines(8) == []
    usage = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    (tmp_path / "logs").mkdir()
    assert log.last_lines(8) == [f"no space is left on the disk of {tmp_path}; free some"]
