"""The stream that the groups are kept in, and the fence in it: who may write."""

from __future__ import annotations

import asyncio
import json
from base64 import b64decode
from typing import NamedTuple

from aither_sdk.errors import FailedPrecondition, Unavailable
from flux_svc.logs.jetstream.faults import (
    NAME_TAKEN,
    NO_MESSAGE,
    NOT_FOUND,
    WRONG_LAST_SEQUENCE,
    StreamRefused,
)
from flux_svc.logs.jetstream.follower import survey
from flux_svc.logs.jetstream.messages import EXPECTED_SUBJECT, place_of
from flux_svc.logs.jetstream.wire import Headers, Message, Wire

OF_SUBJECT = "Nats-Expected-Last-Subject-Sequence-Subject"
ROLLUP = {"Nats-Rollup": "sub"}
"""The message takes the place of those before it on its subject."""
FRAME_BYTES = "Aither-Frame-Bytes"
"""On a parked copy, so that the list is known without the copies; what took a copy's place when it
was let go has none."""
_PIECE = 256
_BEHIND_S = 0.05
_BEHIND_TRIES = 40


class Fence(NamedTuple):
    """Who keeps the groups."""

    sequence: int
    """Of the message that says so; 0: there never was one."""
    node: str
    """Empty: nobody; it left in peace."""


class Kept(NamedTuple):
    """One parked copy."""

    subject: str
    """The end of it: "SEQUENCE.EPOCH", or "SEQUENCE" from the first version of Flux."""
    at: int
    """Where it stands in the stream."""
    frame_bytes: int


class Place:
    """Where things stand in the stream. Raises StreamRefused and Unavailable LOG_UNREACHABLE."""

    def __init__(self, log_stream: str, replicas: int) -> None:
        self.stream = f"{log_stream}_GROUPS"
        self.nodes = f"{log_stream}_GROUPS_NODES"
        """Before the subjects on which nodes talk; no stream keeps those."""
        self.replicas = replicas
        self.fence_subject = f"{self.stream}.j._fence"

    def journal(self, group: str) -> str:
        return f"{self.stream}.j.{group}"

    def parked(self, group: str, key: str) -> str:
        """`key` is `Kept.subject`; ">" stands for all of them."""
        return f"{self.stream}.p.{group}.{key}"

    async def make(self, wire: Wire) -> None:
        """Makes the stream where it is missing. Raises FailedPrecondition STREAM_NOT_OURS."""
        config = {
            "name": self.stream,
            "description": "Consumer groups of Flux: positions, attempts, parked events.",
            "subjects": [f"{self.stream}.>"],
            "storage": "file",
            "num_replicas": self.replicas,
            "allow_direct": True,
            "allow_rollup_hdrs": True,
        }
        try:
            await wire.ask(f"STREAM.CREATE.{self.stream}", config)
        except StreamRefused as refused:
            if refused.code != NAME_TAKEN:
                raise
            present = (await wire.ask(f"STREAM.INFO.{self.stream}", {}))["config"]
            for key in ("subjects", "allow_direct", "allow_rollup_hdrs"):
                if present.get(key) != config[key]:
                    raise FailedPrecondition(
                        f'the stream "{self.stream}" cannot keep the groups: {key} is '
                        f"{present.get(key)}, not {config[key]}; mend it, or move it away",
                        reason="STREAM_NOT_OURS",
                    ) from refused

    async def fence(self, wire: Wire) -> Fence:
        """As the stream's leader knows it."""
        try:
            answer = await wire.ask(
                f"STREAM.MSG.GET.{self.stream}", {"last_by_subj": self.fence_subject}
            )
        except StreamRefused as refused:
            if refused.code == NO_MESSAGE:
                return Fence(0, "")
            raise
        message = answer["message"]
        return Fence(message["seq"], json.loads(b64decode(message["data"]))["node"])

    async def set_fence(self, wire: Wire, last: int, node: str) -> int | None:
        """The fence's new sequence; None when somebody was faster."""
        headers = {EXPECTED_SUBJECT: str(last), **ROLLUP}
        body = json.dumps({"node": node}).encode()
        try:
            return int((await wire.post(self.fence_subject, body, headers))["seq"])
        except StreamRefused as refused:
            if refused.code in WRONG_LAST_SEQUENCE:
                return None
            raise

    def behind(self, fence: int) -> Headers:
        """The condition that the fence stands where it stood."""
        return {EXPECTED_SUBJECT: str(fence), OF_SUBJECT: self.fence_subject}

    async def journals(self, wire: Wire, fence: int) -> list[tuple[str, int, bytes]]:
        """Group, sequence and body of every entry before this fence."""
        found: list[tuple[str, int, bytes]] = []
        following, tries = 1, 0
        while tries < _BEHIND_TRIES:
            request = {"seq": following, "batch": _PIECE, "next_by_subj": f"{self.stream}.j.>"}
            messages, _ = await wire.collect(self.stream, request)
            for message in messages:
                headers = message.headers or {}
                at, subject = int(headers["Nats-Sequence"]), headers["Nats-Subject"]
                if at >= fence:
                    return found
                following = at + 1
                if subject != self.fence_subject:
                    found.append((subject.rpartition(".")[2], at, message.data))
            if not messages:  # a replica that is behind: the fence is there
                tries += 1
                await asyncio.sleep(_BEHIND_S)
        raise Unavailable(
            "the replicas of the groups' stream lack what its leader has; repeat in a moment",
            reason="LOG_BEHIND",
            retry_after_s=0.5,
        )

    async def copies(self, wire: Wire, fence: int) -> dict[str, list[Kept]]:
        """What lies on the parked lists before this fence, by group."""
        found: dict[str, list[Kept]] = {}
        seen: list[int] = []

        def take(message: Message) -> None:
            at = place_of(message.reply).sequence
            if at >= fence:
                seen.append(at)
                return
            headers = message.headers or {}
            _, _, group, subject = message.subject.split(".", 3)
            if FRAME_BYTES in headers:
                found.setdefault(group, []).append(Kept(subject, at, int(headers[FRAME_BYTES])))

        which = {
            "deliver_policy": "last_per_subject",
            "filter_subjects": [f"{self.stream}.p.>", self.fence_subject],
        }
        for _ in range(_BEHIND_TRIES):
            found.clear()
            await survey(wire, self.stream, which, fence, take)
            if seen:
                return found
            await asyncio.sleep(_BEHIND_S)
        raise Unavailable(
            "the replicas of the groups' stream lack what its leader has; repeat in a moment",
            reason="LOG_BEHIND",
            retry_after_s=0.5,
        )

    async def message(self, wire: Wire, at: int) -> Message | None:
        """The message at a place; None: there is none on the replica that was asked."""
        messages, _ = await wire.collect(self.stream, {"seq": at, "batch": 1})
        found = messages[0] if messages else None
        if found is None or int((found.headers or {})["Nats-Sequence"]) != at:
            return None
        return found

    async def purge(self, wire: Wire, subject: str, before: int) -> None:
        """Removes what stands on a subject before a place."""
        await wire.ask(f"STREAM.PURGE.{self.stream}", {"filter": subject, "seq": before})

    async def delete(self, wire: Wire, at: int) -> None:
        try:
            await wire.ask(f"STREAM.MSG.DELETE.{self.stream}", {"seq": at, "no_erase": True})
        except StreamRefused as refused:
            if refused.code not in NOT_FOUND:
                raise
