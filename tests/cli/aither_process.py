"""`aither` as a child process of a test: its lines, its exit code, its end in every case."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
PATIENCE_S = 30.0
"""Nothing here takes a tenth of it; a busy machine may."""


@dataclass
class Aither:
    """A running `aither ...`."""

    process: asyncio.subprocess.Process
    lines: list[str] = field(default_factory=list)
    """What it said on stdout, as far as it was read."""

    async def until(self, pattern: str) -> str:
        """Reads stdout up to the line that matches and answers it."""
        seen = list(self.lines)
        for line in seen:
            if re.search(pattern, line):
                return line
        assert self.process.stdout is not None
        async with asyncio.timeout(PATIENCE_S):
            while raw := await self.process.stdout.readline():
                line = raw.decode().rstrip("\n")
                self.lines.append(line)
                if re.search(pattern, line):
                    return line
        raise AssertionError(f"no line matched {pattern!r} in:\n" + "\n".join(self.lines))

    async def pid_of(self, service: str) -> int:
        """As the table says."""
        return int((await self.until(rf"^{service} .* ready$")).split()[3])

    def stop_reading(self) -> None:
        """Closes our end of its stdout, as `| head` does."""
        transport = self.process._transport.get_pipe_transport(1)  # type: ignore[attr-defined]
        transport.close()

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def end(self) -> tuple[int, str]:
        """Waits for its end; exit code and the rest of what it said, stderr after stdout."""
        async with asyncio.timeout(PATIENCE_S):
            out, err = await self.process.communicate()
        assert self.process.returncode is not None
        return self.process.returncode, out.decode() + err.decode()


@asynccontextmanager
async def aither(*arguments: str, env: Mapping[str, str] | None = None) -> AsyncIterator[Aither]:
    """Runs `python -m aither_cli ...`; asks it to stop, and kills it if need be, at the end."""
    environment = {key: value for key, value in os.environ.items() if "AITHER_" not in key}
    path = os.pathsep.join([str(ROOT), str(ROOT / "generated")])
    environment |= {"PYTHONPATH": path, **(env or {})}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",
        "-m",
        "aither_cli",
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment,
    )
    try:
        yield Aither(process)
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                async with asyncio.timeout(8):
                    await process.communicate()
            except TimeoutError:
                process.kill()
                await process.communicate()


def fakes(folder: Path) -> dict[str, str]:
    """Environment in which flux, pulse and genesis are stand-ins (`fake_service.py`)."""
    for name in ("flux", "pulse", "genesis"):
        package = folder / f"{name}_svc"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("")
        (package / "__main__.py").write_text(
            "import sys\n"
            "from tests.cli.fake_service import main\n"
            f"if __name__ == '__main__':\n    sys.exit(main({name!r}))\n"
        )
    path = [str(folder), str(ROOT), str(ROOT / "generated")]
    return {"PYTHONPATH": os.pathsep.join(path)}
