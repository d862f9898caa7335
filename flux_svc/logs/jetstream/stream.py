"""The stream itself: made where it is missing, looked at, judged, cut.

Its epoch stands in its metadata. It is written with the stream's creation, which one node wins: the
others find the name taken and read what is there. A stream that is deleted and made again has
another one.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import structlog

from flux_svc.logs.jetstream.faults import (
    NAME_TAKEN,
    NO_MESSAGE,
    NO_STREAM,
    NOT_FOUND,
    StreamRefused,
    foreign,
    too_old,
)
from flux_svc.logs.jetstream.messages import time_text
from flux_svc.logs.jetstream.wire import Wire

logger = structlog.get_logger()

OLDEST = (2, 12, 1)
"""Of nats-server: 2.11 knows no atomic batches, 2.12.0 takes no ids in them."""
_EPOCH = "aither-epoch"
_NEEDED = {"allow_direct": True, "allow_atomic": True, "allow_msg_ttl": True}
_NS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class StreamPlan:
    """What the settings say."""

    name: str
    replicas: int = 1
    duplicate_window_s: float = 120.0

    @property
    def prefix(self) -> str:
        """Before each event's subject."""
        return f"{self.name}."


@dataclass(frozen=True, slots=True)
class StreamState:
    """What the stream's leader says of it."""

    epoch: str
    first_sequence: int
    """All events below it are gone."""
    last_sequence: int
    events: int
    bytes: int
    """As the storage counts them, with headers."""
    synced: bool
    """Whether an acknowledged event was fsynced, as far as the stream's own settings say."""


class Stream:
    """Asks the stream's leader, over whichever connection is given. Raises StreamRefused and
    Unavailable LOG_UNREACHABLE."""

    def __init__(self, plan: StreamPlan) -> None:
        self.plan = plan

    async def make(self, wire: Wire) -> StreamState:
        """Makes the stream, or takes the one that is there. Raises FailedPrecondition
        STREAM_NOT_OURS when that one cannot be the log, NATS_TOO_OLD when nats-server cannot keep
        it."""
        plan = self.plan
        if (0, 0, 0) < wire.server_version < OLDEST:
            raise too_old(wire.server_version)
        config = {
            "name": plan.name,
            "description": "The log of Flux. Each message is an event; sequences are its own.",
            "subjects": [plan.prefix + ">"],
            "retention": "limits",
            "storage": "file",
            "num_replicas": plan.replicas,
            "duplicate_window": int(plan.duplicate_window_s * _NS),
            "metadata": {_EPOCH: uuid.uuid4().hex},
            **_NEEDED,
        }
        try:
            await wire.ask(f"STREAM.CREATE.{plan.name}", config)
        except StreamRefused as refused:
            if refused.code != NAME_TAKEN:
                raise
            await self._adopt(wire)
        answer = await self._info(wire)
        if _lacking(answer["config"]):
            # The leader is older than who answers here: it leaves out what it has not heard of, and
            # would take a batch for single events.
            raise too_old()
        return _state_of(answer)

    async def mend(self, wire: Wire) -> None:
        """Sets again what the log cannot do without, where somebody has edited the stream."""
        await self._have_needed(wire, (await self._info(wire))["config"])

    async def state(self, wire: Wire) -> StreamState:
        return _state_of(await self._info(wire))

    async def exists(self, wire: Wire) -> bool:
        try:
            await self._info(wire)
        except StreamRefused as refused:
            if refused.code == NO_STREAM:
                return False
            raise
        return True

    async def purge(self, wire: Wire, before_sequence: int, subject: str = "") -> None:
        """Removes all below; with `subject` (the message's), all of that below."""
        request: dict[str, Any] = {"seq": before_sequence}
        if subject:
            request["filter"] = subject
        await wire.ask(f"STREAM.PURGE.{self.plan.name}", request)

    async def delete(self, wire: Wire, sequence: int) -> None:
        """Removes one message. What it was is not overwritten."""
        await wire.ask(f"STREAM.MSG.DELETE.{self.plan.name}", {"seq": sequence, "no_erase": True})

    async def holds(self, wire: Wire, sequence: int) -> bool:
        """As the leader knows it."""
        try:
            await wire.ask(f"STREAM.MSG.GET.{self.plan.name}", {"seq": sequence})
        except StreamRefused as refused:
            if refused.code in NOT_FOUND:
                return False
            raise
        return True

    async def first_since(self, wire: Wire, at_ns: int) -> int | None:
        """The first message at or after a time; None where there is none."""
        return await self._first(wire, {"start_time": time_text(at_ns)})

    async def first_from(self, wire: Wire, sequence: int) -> int | None:
        """The first message held from this sequence on; None where there is none."""
        return await self._first(wire, {"seq": sequence, "next_by_subj": f"{self.plan.prefix}>"})

    async def begin_anew(self, wire: Wire, epoch: str) -> None:
        """Gives the stream another epoch, unless somebody did already."""
        answer = await self._info(wire)
        if _epoch(answer) == epoch:
            await self._update(wire, answer["config"], {_EPOCH: uuid.uuid4().hex}, {})

    async def _first(self, wire: Wire, request: Mapping[str, Any]) -> int | None:
        try:
            answer = await wire.ask(f"STREAM.MSG.GET.{self.plan.name}", request)
        except StreamRefused as refused:
            if refused.code == NO_MESSAGE:
                return None
            raise
        return int(answer["message"]["seq"])

    async def _adopt(self, wire: Wire) -> None:
        """Takes a stream that somebody else made, perhaps another node a moment ago."""
        config = (await self._info(wire))["config"]
        wrong = [
            f"{key} is {config.get(key)}"
            for key, bad in (
                ("subjects", config.get("subjects") != [self.plan.prefix + ">"]),
                ("retention", config.get("retention") != "limits"),
                ("mirror", bool(config.get("mirror"))),
                ("sources", bool(config.get("sources"))),
                ("sealed", bool(config.get("sealed"))),
            )
            if bad
        ]
        if wrong:
            raise foreign(self.plan.name, ", ".join(wrong))
        await self._have_needed(wire, config)

    async def _have_needed(self, wire: Wire, config: Mapping[str, Any]) -> None:
        if missing := _lacking(config):
            logger.warning("jetstream.stream_mended", stream=self.plan.name, settings=[*missing])
            await self._update(wire, config, {}, missing)

    async def _update(
        self,
        wire: Wire,
        config: Mapping[str, Any],
        metadata: Mapping[str, str],
        changes: Mapping[str, Any],
    ) -> None:
        merged = {**config.get("metadata", {}), **metadata}
        request = {**config, **changes, "metadata": merged}
        await wire.ask(f"STREAM.UPDATE.{self.plan.name}", request)

    async def _info(self, wire: Wire) -> dict[str, Any]:
        return await wire.ask(f"STREAM.INFO.{self.plan.name}", {})


def _epoch(answer: Mapping[str, Any]) -> str:
    """A stream that somebody made by hand is known by the moment it was made."""
    metadata = answer["config"].get("metadata", {})
    return str(metadata.get(_EPOCH) or answer["created"])


def _lacking(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the log cannot do without and a stream does not have."""
    return {key: value for key, value in _NEEDED.items() if config.get(key) != value}


def _state_of(answer: Mapping[str, Any]) -> StreamState:
    config, state = answer["config"], answer["state"]
    return StreamState(
        epoch=_epoch(answer),
        first_sequence=max(1, state["first_seq"]),
        last_sequence=state["last_seq"],
        events=state["messages"],
        bytes=state["bytes"],
        synced=config.get("storage") == "file" and config.get("persist_mode") != "async",
    )
