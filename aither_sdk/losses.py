"""Work that was not done because a bound was reached: counted at once, told now and then."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from opentelemetry import metrics

FULL = "full"
"""There was no room; it was never begun."""
TIMEOUT = "timeout"
"""It was begun, and given up."""
BREAKER_OPEN = "breaker_open"
"""What it needs had failed too often; it was never begun."""
SHUTDOWN = "shutdown"
"""Its owner had closed."""

TELL_INTERVAL_S = 5.0
"""Between two words about losses: a flood of them is one event with a count."""
_KEPT = 64
"""Owners and reasons that are told singly; both are names from the code, so that there are few."""
_OTHER = "other"
_OUTLIVED_KEPT = 100


@dataclass(frozen=True, slots=True)
class Loss:
    """What one owner lost for one reason since it was told last."""

    owner: str
    reason: str
    task: str
    """The newest of them."""
    count: int


class Losses:
    """Where owners of bounds say what they did not do. Owned by one loop; `note` never waits."""

    def __init__(self) -> None:
        self.total = 0
        """Since it was made."""
        self._untold: dict[tuple[str, str], Loss] = {}
        self.outlived_tasks: deque[str] = deque(maxlen=_OUTLIVED_KEPT)
        """Names of tasks that were cancelled because their owner ended; the newest of them."""
        self._labels: set[str] = set()
        self._arrived = asyncio.Event()
        self._counter = metrics.get_meter("aither_sdk").create_counter(
            "aither.tasks.dropped", unit="{task}", description="Work refused or given up, by owner"
        )

    def note(self, owner: str, task: str, reason: str) -> None:
        """One more piece of work that will not be done."""
        if owner not in self._labels and len(self._labels) >= _KEPT:
            owner = _OTHER
        else:
            self._labels.add(owner)
        self.total += 1
        self._counter.add(1, {"owner": owner, "reason": reason})
        known = self._untold.get((owner, reason))
        count = 1 if known is None else known.count + 1
        self._untold[owner, reason] = Loss(owner, reason, task, count)
        self._arrived.set()

    def outlived(self, tasks: Iterable[str]) -> None:
        """These did not end with their owner and were cancelled; `ServiceStopped` names them."""
        self.outlived_tasks.extend(tasks)

    def pop(self) -> Loss | None:
        """The oldest that was not told yet; it counts as told from now on."""
        if not self._untold:
            self._arrived.clear()
            return None
        return self._untold.pop(next(iter(self._untold)))

    def put_back(self, loss: Loss) -> None:
        """It could not be told after all; the next word about it counts it too."""
        newer = self._untold.get((loss.owner, loss.reason))
        task, more = (newer.task, newer.count) if newer is not None else (loss.task, 0)
        merged = Loss(loss.owner, loss.reason, task, loss.count + more)
        self._untold[loss.owner, loss.reason] = merged
        self._arrived.set()

    async def until_any(self) -> None:
        """Waits until there is something to tell."""
        await self._arrived.wait()
