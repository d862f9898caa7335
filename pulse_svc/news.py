"""What happened since the last batch went out, at most one piece a target.

Bounded by the fleet: a second change of a target before the batch goes out is merged into the
first, so a batch tells from what, to what, with the newest result.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence

from aither.pulse.v1.pulse_events_pb2 import FleetChanged, TargetChanged

_MAX_FAULTS = 100


class News:
    """What waits to be published. Filled by the board and the roster, emptied by the tick."""

    def __init__(self) -> None:
        self.arrived = asyncio.Event()
        """Set while there is any."""
        self._changes: dict[str, TargetChanged] = {}
        self._added: set[str] = set()
        self._removed: set[str] = set()
        self._updated: set[str] = set()
        self._faults: tuple[str, ...] = ()
        self._told = False
        """Whether the whole fleet was told of once."""

    def changed(self, change: TargetChanged) -> None:
        before = self._changes.pop(change.name, None)
        if before is not None:
            change.from_state = before.from_state
            change.previous_duration.CopyFrom(before.previous_duration)
            if not change.HasField("result") and before.HasField("result"):
                change.result.CopyFrom(before.result)
            if change.from_state == change.to_state:
                return  # within one batch it went and came back: it did not change
        self._changes[change.name] = change
        self.arrived.set()

    def blame(self, name: str, root_cause: str) -> None:
        """Another root was found for a change that waits still."""
        if name in self._changes:
            self._changes[name].root_cause = root_cause

    def fleet_changed(
        self,
        *,
        added: Collection[str] = (),
        removed: Collection[str] = (),
        updated: Collection[str] = (),
    ) -> None:
        for name in added:
            replaced = name in self._removed
            self._removed.discard(name)
            (self._updated if replaced else self._added).add(name)
        for name in removed:
            self._changes.pop(name, None)
            self._updated.discard(name)
            if name in self._added:
                self._added.discard(name)
            else:
                self._removed.add(name)
        self._updated |= {name for name in updated if name not in self._added}
        self.arrived.set()

    def fleet_refused(self, faults: Sequence[str]) -> None:
        """The fleet file was refused; only the newest refusal is told."""
        self._faults = tuple(faults[:_MAX_FAULTS])
        self.arrived.set()

    def take(self) -> tuple[FleetChanged | None, list[TargetChanged]]:
        """Everything, and forgets it."""
        fleet = FleetChanged(
            added=sorted(self._added),
            removed=sorted(self._removed),
            updated=sorted(self._updated),
            faults=self._faults,
            # A new Pulse cannot know what the one before it watched, so it tells all it watches.
            whole=bool(self._added) and not self._told,
        )
        self._told |= fleet.whole
        changes = list(self._changes.values())
        for names in (self._added, self._removed, self._updated):
            names.clear()
        self._faults = ()
        self._changes.clear()
        self.arrived.clear()
        return (fleet if fleet.ByteSize() else None), changes
