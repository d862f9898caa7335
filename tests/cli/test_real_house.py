"""`aither up` with the real services: what a newcomer sees first."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

from tests.cli.aither_process import PATIENCE_S, aither
from tests.stopwatch import Stopwatch


async def test_the_whole_house_comes_up_is_well_survives_a_kill_and_drains(tmp_path: Path) -> None:
    data = str(tmp_path / "data")
    async with aither("up", "--port-base", "0", "--data-dir", data) as up:
        flux = (await up.until("^flux .* ready$")).split()[1]
        for name in ("pulse", "genesis"):
            await up.until(f"^{name} .* ready$")
        base = str(int(flux.rpartition(":")[2]) - 1)

        async with aither("tail", "demo.>", "--max", "1", "--from", "last", "--flux", flux) as tail:
            async with aither("publish", "demo.hello", '{"a": 1}', "--flux", flux) as publish:
                code, said = await publish.end()
                assert (code, said[:24]) == (0, "published demo.hello as "), said
            assert 'demo.hello aither-cli {"a":1}' in await tail.until("demo.hello")
            assert (await tail.end())[0] == 0

        await _until_well(base)
        pid = await up.pid_of("pulse")
        os.kill(pid, signal.SIGKILL)
        await up.until(r"pulse +died: killed by SIGKILL; restarting in 1 s")
        await up.until(r"pulse +runs again \(pid \d+\)")
        await up.until(r"pulse +started .* \(pid \d+, 127")
        await _until_well(base)

        watch = Stopwatch()
        up.signal(signal.SIGINT)
        code, said = await up.end()
        assert code == 0, said
        assert watch.calm_s < 5
        assert "SIGKILL" not in said


async def _until_well(base: str) -> None:
    """Asks `aither status` until it says that all is well; targets need two good checks first."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            async with aither("status", "--port-base", base) as status:
                code, said = await status.end()
            if code == 0 and " UP" in said and "UNKNOWN" not in said:
                return
            await asyncio.sleep(0.2)
