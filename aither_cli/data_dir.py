"""The data dir: may it be written, does another `aither up` use it; and the children's logs."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from aither_cli.failures import Failure

LOG_BYTES = 32 * 2**20
"""A log that grows beyond this is moved to `<name>.log.1`, so a service has twice this on disk."""
_TAIL_BYTES = 16 * 2**10
_LEAST_FREE_BYTES = 64 * 2**10


@contextmanager
def held(data_dir: Path) -> Iterator[None]:
    """The data dir as ours alone while the block lasts. Creates it; leaves `up.lock` behind.

    Raises Failure when it cannot be written or another `aither up` holds it. The lock is the
    kernel's (flock), so it ends with the process, however that ends.
    """
    path = data_dir / "up.lock"
    if data_dir.exists() and not data_dir.is_dir():
        raise Failure(f"data dir {data_dir} is no folder; name one with --data-dir")
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        (data_dir / "logs").mkdir(exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise Failure(
            f"data dir {data_dir} cannot be written: {error.strerror}; "
            "make it writable or choose another with --data-dir"
        ) from error
    try:
        _lock(fd, data_dir)
        _write_pid(fd, data_dir)
        yield
    finally:
        os.close(fd)


def _lock(fd: int, data_dir: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
        raise Failure(
            f"already running on data dir {data_dir} (pid {pid}); "
            "stop it, or choose another with --data-dir and --port-base"
        ) from None


def _write_pid(fd: int, data_dir: Path) -> None:
    """Also the proof that there is room for as much as one byte."""
    try:
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    except OSError as error:
        raise Failure(
            f"data dir {data_dir} cannot be written: {error.strerror}; "
            "make room or choose another with --data-dir"
        ) from error


class ChildLog:
    """What one service writes to stdout and stderr: `<data-dir>/logs/<service>.log`.

    The children write to the file themselves, so nothing of theirs depends on our reading.
    """

    def __init__(self, data_dir: Path, service: str) -> None:
        self.path = data_dir / "logs" / f"{service}.log"
        self._run_begins = 0  # where in the file the newest run of the child begins

    def rotate(self) -> None:
        """Keeps what is there as `.log.1`; called once, before the first run."""
        if self.path.exists():
            self.path.replace(self._older())

    @contextmanager
    def open_run(self) -> Iterator[int]:
        """A file descriptor for the next run of the child, which inherits it."""
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._run_begins = os.fstat(fd).st_size
            yield fd
        finally:
            os.close(fd)

    def note(self, line: str) -> None:
        """A line of ours among the child's, where there is room for it."""
        with suppress(OSError), self.path.open("a") as file:
            file.write(line + "\n")

    def trim(self) -> None:
        """Keeps the file within LOG_BYTES. The child goes on writing to it; a line that comes
        between the copy and the cut is lost."""
        try:
            if self.path.stat().st_size > LOG_BYTES:
                shutil.copyfile(self.path, self._older())
                os.truncate(self.path, 0)
                self._run_begins = 0
        except OSError:
            return  # a log that cannot be trimmed must not end what it is about

    def last_lines(self, count: int, width: int = 300) -> list[str]:
        """The last lines of the newest run, each cut to `width` characters; and that the disk is
        full, where it is: then what explains an end could not be written."""
        return [*self._written(count, width), *self._full_disk()]

    def _written(self, count: int, width: int) -> list[str]:
        try:
            with self.path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(self._run_begins, size - _TAIL_BYTES))
                text = file.read().decode(errors="replace")
        except OSError:
            return []
        lines = [line.rstrip() for line in text.splitlines() if line.strip()]
        return [line if len(line) <= width else line[: width - 1] + "…" for line in lines[-count:]]

    def _full_disk(self) -> list[str]:
        try:
            free_bytes = shutil.disk_usage(self.path.parent).free
        except OSError:
            return []
        if free_bytes >= _LEAST_FREE_BYTES:
            return []
        return [f"no space is left on the disk of {self.path.parent.parent}; free some"]

    def _older(self) -> Path:
        return self.path.with_name(self.path.name + ".1")
