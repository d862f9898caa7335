"""`aither flux ...` as a user runs it, beside a real Flux."""

from __future__ import annotations

import re
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from aither_sdk.publishing.publisher import Publisher
from tests.cli.test_commands import COMMAND, environment
from tests.processes import ServiceProcess, running


def _aither(*arguments: str | Path) -> tuple[int, str]:
    done = subprocess.run(
        [*COMMAND, "flux", *map(str, arguments)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


async def _publish(flux: ServiceProcess, count: int) -> int:
    async with Publisher(flux.address, source="t") as publisher:
        results = [await publisher.publish(f"a.{n % 3}", {"n": n}) for n in range(count)]
    return results[-1].sequence


async def test_a_log_is_backed_up_damaged_verified_and_repaired(tmp_path: Path) -> None:
    live, copy = tmp_path / "live", tmp_path / "copy"
    with running("flux_svc", live) as flux:
        last = await _publish(flux, 20)
        code, said = _aither("backup", copy, "--data-dir", live)
        assert code == 0, said
        # Flux itself tells of its stalls on a busy machine, so there may be more.
        found = re.search(rf"(\d+) events, .* MiB in {copy}, read back and whole", said)
        assert found is not None, said
        assert int(found[1]) >= last
        code, said = _aither("repair", "--data-dir", live)
        assert (code, "in use by process" in said) == (1, True), said
        assert str(flux.pid) in said
        # Another Flux on the same folder says by whom it is used.
        second = ServiceProcess("flux_svc", live, {})
        with pytest.raises(AssertionError, match=f"in use by process {flux.pid}"):
            second.start()
    with closing(sqlite3.connect(live / "flux.db")) as file:
        file.execute("UPDATE events SET crc = crc + 1 WHERE sequence = 5")
        file.commit()
    code, said = _aither("verify", "--data-dir", live)
    assert (code, "event 5: its checksum is wrong" in said) == (1, True), said
    assert "damaged: 5\n1 thing is wrong" in said
    code, said = _aither("repair", "--data-dir", live)
    assert (code, "taken out: 5\n" in said) == (0, True), said
    code, said = _aither("verify", "--data-dir", live)
    assert (code, "the log is whole" in said) == (0, True), said
    with running("flux_svc", copy) as flux:
        assert await _publish(flux, 1) > last


def test_mistakes_are_told_in_one_line(tmp_path: Path) -> None:
    code, said = _aither("verify", "--data-dir", tmp_path)
    assert (code, said.count("\n")) == (1, 1)
    assert said.startswith("aither: there is no log in")
    code, said = _aither("backup")
    assert (code, "TARGET" in said.upper()) == (2, True)
