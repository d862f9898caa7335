"""Stacks as values, and whose code is to blame; pure. Never reads a source file."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

_MAX_FRAMES = 100
_DUMPED = re.compile(r'^  File "(?P<file>.*)", line (?P<line>\d+|\?\?\?) in (?P<function>.*)$')


@dataclass(frozen=True, slots=True)
class Frame:
    """One line of a stack."""

    function: str
    """Qualified as far as it is known."""
    file: str
    line: int

    def is_qualified_of(self, bare: Frame) -> bool:
        """Whether `bare`, of faulthandler, may be this function; that does not qualify names."""
        return self.file == bare.file and self.function.rpartition(".")[2] == bare.function

    def __str__(self) -> str:
        return f'  File "{self.file}", line {self.line}, in {self.function}'


def spell(text: str) -> str:
    """As it can be sent and printed: names of files and tasks may hold bytes that are no text, line
    ends and what a terminal obeys. Letter by letter, so that what begins alike still does."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


Stack = tuple[Frame, ...]
"""Outermost first, as Python prints it."""


def spell_stack(stack: Stack) -> str:
    """As Python prints a traceback, without the source lines."""
    return "\n".join(("Traceback (most recent call last):", *map(str, stack[-_MAX_FRAMES:])))


def parse_dump(text: str) -> Stack:
    """The first stack in what faulthandler wrote; lines that are cut off or foreign are left out.

    https://docs.python.org/3/library/faulthandler.html
    """
    found: list[Frame] = []
    for line in text.splitlines():
        if matched := _DUMPED.match(line):
            number = matched["line"]
            found.append(
                Frame(matched["function"], matched["file"], int(number) if number.isdigit() else 0)
            )
        elif found:
            break  # the next thread's
    return tuple(reversed(found))


@dataclass(frozen=True, slots=True)
class Territory:
    """Which files are whose."""

    user: tuple[str, ...]
    """Prefixes that count as the user's code wherever they lie."""
    library: tuple[str, ...]
    """Prefixes of code that others wrote."""
    machinery: tuple[str, ...]
    """Prefixes of Python's own code and of this SDK: blamed only when nothing else is there."""

    def rank(self, file: str) -> int:
        """0: the user's, 1: a library's, 2: machinery."""
        if file.startswith(self.user):
            return 0
        if file.startswith("<frozen") or not file:
            return 2
        if any(part in file for part in ("/site-packages/", "/dist-packages/")):
            return 1
        if file.startswith(self.machinery):
            return 2
        return 1 if file.startswith(self.library) else 0


def survey(user: Iterable[str] = (), library: Iterable[str] = ()) -> Territory:
    """The territory of this interpreter: `user` and `library` are paths or prefixes of paths."""
    # What sysconfig would say, without the megabyte that it reads first.
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    sdk = Path(__file__).resolve().parents[1]
    return Territory(
        user=tuple(map(spell, user)),
        library=tuple(map(spell, library)),
        machinery=(
            f"{sdk}/",
            f"{sdk.parent / 'generated'}/",
            f"{Path(os.__file__).parent}/",
            f"{sys.base_exec_prefix}/{sys.platlibdir}/{version}/",
        ),
    )


def find_culprit(stack: Stack, territory: Territory) -> Frame | None:
    """The innermost frame of the user's code; without one, of a library; without one, at all."""
    best: Frame | None = None
    best_rank = 3
    for frame in reversed(stack):
        rank = territory.rank(frame.file)
        if rank < best_rank:
            best, best_rank = frame, rank
    return best


def find_users(stack: Stack, territory: Territory) -> Frame | None:
    """The innermost frame of the user's code, if there is one."""
    found = find_culprit(stack, territory)
    return found if found is not None and territory.rank(found.file) == 0 else None


def find_culprit_in_dump(stack: Stack, territory: Territory) -> Frame | None:
    """Of a whole stack, of which nothing else is known: who runs the loop is not to blame for what
    runs in it, and nobody but the user's code where it runs no callback."""
    for at in reversed(range(len(stack))):
        place = (stack[at].file.rpartition("/asyncio/")[2], stack[at].function)
        if place == ("events.py", "_run"):
            return find_culprit(stack[at:], territory)
        if place == ("base_events.py", "_run_once"):
            return find_users(stack[at:], territory)
    return find_culprit(stack, territory)


def heaviest(culprits: Sequence[tuple[Frame, int]]) -> Frame | None:
    """Of frames with weights: the one of the function that weighs most; the first wins a tie."""
    weights: dict[tuple[str, str], int] = {}
    for frame, weight in culprits:
        key = (frame.file, frame.function)
        weights[key] = weights.get(key, 0) + weight
    if not weights:
        return None
    function = max(weights, key=lambda key: weights[key])
    lines: dict[Frame, int] = {}
    for frame, weight in culprits:
        if (frame.file, frame.function) == function:
            lines[frame] = lines.get(frame, 0) + weight
    return max(lines, key=lambda frame: lines[frame])
