"""What a long-running command says: lines and one table, on a thread of its own.

A terminal that is paused (Ctrl-S, `| less`) blocks whoever writes to it. Supervision must go on
meanwhile, so lines wait in a bounded queue; what finds no room is counted and said later.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import TextIO

_QUEUE_LINES = 2_000
"""About 200 kB of text at the worst."""
_WHO_WIDTH = 13


class Teller:
    """Says things on `out`. `on_gone` is called, on the teller's thread, when nobody reads."""

    def __init__(self, out: TextIO, on_gone: Callable[[], None] = lambda: None) -> None:
        self._out = out
        self._on_gone = on_gone
        self._rich = out.isatty()
        self._left_out = 0  # lines that found no room; the asking thread counts, the writer clears
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(_QUEUE_LINES)
        self._writer = threading.Thread(target=self._write, name="teller", daemon=True)
        self._writer.start()

    def say(self, text: str) -> None:
        """A line as it is."""
        self._put(lambda: self._print(text))

    def tell(self, who: str, text: str, *, bad: bool = False, at: str = "") -> None:
        """A line with the time (`at`, or now) and who it is about."""
        line = f"{at or time.strftime('%H:%M:%S')} {who:<{_WHO_WIDTH}} {text}"
        self._put(lambda: self._print(line, "bold red" if bad else ""))

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table: framed on a terminal, aligned columns elsewhere."""
        self._put(lambda: self._print_table(head, rows))

    def close(self, timeout_s: float = 1.0) -> None:
        """Writes what waits, for at most that long."""
        try:
            self._queue.put(None, timeout=timeout_s)
        except queue.Full:
            return
        self._writer.join(timeout_s)

    def _put(self, write: Callable[[], None]) -> None:
        try:
            self._queue.put_nowait(write)
        except queue.Full:
            self._left_out += 1

    def _write(self) -> None:
        while (write := self._queue.get()) is not None:
            try:
                write()
                if self._left_out:
                    count, self._left_out = self._left_out, 0
                    self._print(f"({count} lines left out: this output was not read)")
            except (OSError, ValueError):
                self._on_gone()
                return

    def _print(self, text: str, style: str = "") -> None:
        if self._rich and style:
            from rich.console import Console

            console = Console(file=self._out, soft_wrap=True, highlight=False, markup=False)
            console.print(text, style=style)
        else:
            self._out.write(text + "\n")
        self._out.flush()

    def _print_table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        if self._rich:
            from rich.console import Console

            Console(file=self._out, highlight=False).print(rich_table(head, rows))
        else:
            for line in columns([head, *rows]):
                self._out.write(line + "\n")
        self._out.flush()


def let_go_of_stdout() -> None:
    """Nobody reads stdout any more, as after `| head`: what is still buffered goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines with aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def rich_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> object:
    """The same for a terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(*head, box=box.ROUNDED, header_style="bold")
    for row in rows:
        table.add_row(*(Text(cell, _COLOURS.get(cell, "")) for cell in row))
    return table


_COLOURS = {"ready": "green", "not ready": "yellow", "stalled": "red", "not reached": "red"}
