"""Who is watched, and who said so: the fleet file, or RegisterTarget.

The only writer of definitions: it keeps the board and the prober in step and tells of changes.
"""

from __future__ import annotations

from collections.abc import Sequence

import structlog

from aither.pulse.v1.target_pb2 import Target, TargetStatus
from aither_sdk.errors import (
    AlreadyExists,
    FailedPrecondition,
    FieldViolation,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
)
from aither_sdk.yaml_file import dotted
from pulse_svc.board import Board
from pulse_svc.fleet import (
    MAX_MESSAGE_BYTES,
    MAX_TARGETS,
    dependency_violations,
    filled,
    target_violations,
)
from pulse_svc.news import News
from pulse_svc.prober import Prober

_log = structlog.get_logger()


class Roster:
    """Definitions by name. The fleet file wins over RegisterTarget."""

    def __init__(self, board: Board, prober: Prober, news: News) -> None:
        self._board = board
        self._prober = prober
        self._news = news
        self._filed: dict[str, Target] = {}
        self._registered: dict[str, Target] = {}

    def apply(self, targets: Sequence[Target]) -> None:
        """Makes these, valid and filled, the fleet of the file.

        Those that did not change keep their state and are not told of. Raises ResourceExhausted
        when they do not fit; nothing is done then.
        """
        wanted = {target.name: target for target in targets}
        registered = {n: t for n, t in self._registered.items() if n not in wanted}
        if len(wanted) + len(registered) > MAX_TARGETS:
            raise ResourceExhausted(
                f"{len(wanted)} targets of the file and {len(registered)} registered ones are more "
                f"than {MAX_TARGETS}, the most in a fleet; deregister some",
                reason="FLEET_FULL",
            )
        before = {**self._filed, **self._registered}
        removed = sorted(self._filed.keys() - wanted.keys())
        added = sorted(wanted.keys() - before.keys())
        updated = sorted(n for n in wanted.keys() & before.keys() if wanted[n] != before[n])
        taken_over = self._registered.keys() & wanted.keys()
        self._filed, self._registered = wanted, registered
        for name in removed:
            self._remove(name)
        for name in {*added, *updated, *taken_over}:
            self._put(wanted[name], from_fleet=True)
        if added or removed or updated:
            self._news.fleet_changed(added=added, removed=removed, updated=updated)
            _log.info("fleet.changed", added=added, removed=removed, updated=updated)

    def register(self, target: Target) -> TargetStatus:
        """Adds or replaces one that is not in the file. Errors are those of RegisterTarget."""
        violations = target_violations(target)
        dependencies = {n: t.depends_on for n, t in {**self._filed, **self._registered}.items()}
        violations += dependency_violations(target, dependencies)
        if violations:
            raise InvalidArgument.of(
                [FieldViolation(dotted(("target", *v.key)), v.message) for v in violations]
            )
        if target.name in self._filed:
            raise AlreadyExists(f'the fleet file defines "{target.name}"; edit the file instead')
        new = target.name not in self._registered
        if new and len(self._board) >= MAX_TARGETS:
            raise ResourceExhausted(
                f"the fleet has {MAX_TARGETS} targets, the most; deregister one first",
                reason="FLEET_FULL",
            )
        full = filled(target)
        if new or self._registered[full.name] != full:
            self._registered[full.name] = full
            self._put(full, from_fleet=False)
            names = [full.name]
            self._news.fleet_changed(added=names if new else [], updated=[] if new else names)
        status = self._board.status(full.name)
        assert status is not None
        return status

    def deregister(self, name: str) -> None:
        """Removes one that `register` added. Errors are those of DeregisterTarget."""
        if name in self._filed:
            raise FailedPrecondition(f'the fleet file defines "{name}"; edit the file instead')
        if self._registered.pop(name, None) is None:
            raise _unknown(name)
        self._remove(name)
        self._news.fleet_changed(removed=[name])

    def beat(self, name: str, ok: bool, message: str) -> None:
        """Hands a Beat on. Errors are those of the RPC."""
        if len(message.encode()) > MAX_MESSAGE_BYTES:
            told = f"{len(message.encode())} bytes; {MAX_MESSAGE_BYTES} at most"
            raise InvalidArgument.of([FieldViolation("message", told)])
        if name not in self._board:
            raise _unknown(name)
        if not self._prober.beat(name, ok, message):
            raise FailedPrecondition(
                f'"{name}" is asked by Pulse; to report by itself it needs a heartbeat check',
                reason="NOT_A_HEARTBEAT",
            )

    def _put(self, target: Target, *, from_fleet: bool) -> None:
        self._prober.put(target)
        self._board.put(target, from_fleet=from_fleet)

    def _remove(self, name: str) -> None:
        self._prober.remove(name)
        self._board.remove(name)


def _unknown(name: str) -> NotFound:
    shown = name if len(name) <= 63 else name[:60] + "..."
    return NotFound(f'no target "{shown}" is watched; ListTargets names those that are')
