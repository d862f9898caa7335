"""What the loop asks of the writer of the SQLite log, and what it hears back."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from aither_sdk.errors import AitherError
from flux_svc.drafts import Draft
from flux_svc.frames import Record
from flux_svc.logs.base import Succession
from flux_svc.logs.sqlite.removal import Step
from flux_svc.sequencer import Appended, Expected


@dataclass(frozen=True, slots=True)
class AppendJob:
    drafts: Sequence[Draft]
    bytes: int
    fsync: bool
    expected: Expected
    succession: Succession
    answer: asyncio.Future[list[Appended]]

    @property
    def events(self) -> int:
        return len(self.drafts)

    @property
    def abandoned(self) -> bool:
        return self.answer.done()

    def refuse(self, error: AitherError) -> None:
        """On the loop, while the writer does not have it."""
        self.succession.error = self.succession.error or error
        if not self.answer.done():
            self.answer.set_exception(error)


@dataclass(frozen=True, slots=True)
class TrimJob:
    before_sequence: int
    answer: asyncio.Future[int]


@dataclass(frozen=True, slots=True)
class RemoveJob:
    sequences: Sequence[int]
    """Rising."""
    answer: asyncio.Future[int]


class StopJob:
    """The last one."""


Job = AppendJob | TrimJob | RemoveJob | StopJob


@dataclass(slots=True)
class Removal:
    """A job that goes on in steps."""

    job: TrimJob | RemoveJob
    events: int = 0
    """Taken out."""
    done: int = 0
    """How many of the sequences of a RemoveJob were looked at."""


@dataclass(frozen=True, slots=True)
class Group:
    """What became of some appends: an answer or an error for each, and what was stored."""

    jobs: list[AppendJob]
    outcomes: list[list[Appended] | AitherError]
    records: list[Record]


@dataclass(frozen=True, slots=True)
class TakenOut:
    """A step of a removal, and with the last one whom to answer: how many events it took out, or
    why it failed."""

    step: Step | None
    ended: TrimJob | RemoveJob | None = None
    events: int = 0
    error: AitherError | None = None
