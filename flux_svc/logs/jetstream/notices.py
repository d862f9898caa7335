"""What the nodes of a log tell each other about removals, in a stream beside it.

A subject that loses its newest event has no state, also where older events of it are held. The
log's own stream cannot say that, since the older event looks like the newest then. So whoever
removes the newest event of a subject writes a notice first. Nodes that run hear it; nodes that
start later find it; and all have the same states.

The same stream has the lease of the one node that looks after the retention, and how far the events
that end by themselves are dealt with.
"""

from __future__ import annotations

import asyncio
import uuid
from base64 import b64decode
from collections.abc import Callable, Iterable

import structlog

from aither_sdk.errors import AitherError
from flux_svc.logs.jetstream.faults import (
    NAME_TAKEN,
    NO_MESSAGE,
    NO_STREAM,
    WRONG_LAST_SEQUENCE,
    StreamRefused,
    foreign,
)
from flux_svc.logs.jetstream.follower import Consumer, survey
from flux_svc.logs.jetstream.ledger import Ended
from flux_svc.logs.jetstream.messages import EXPECTED_SUBJECT, TTL, key_of, place_of
from flux_svc.logs.jetstream.stream import StreamPlan
from flux_svc.logs.jetstream.wire import Message, Wire

LEASE_S = 15
"""How long another node waits for one that went without a word. nats-server counts it, in whole
seconds."""
TRUST_S = 10.0
"""How long the holder believes in a lease that it has asked for."""
_RENEW_S = 5.0
_LONE_S = 3600
"""How long a notice is kept where no older event of the subject is held: only nodes that run now
have to hear of it."""
_AT, _LONE = "Aither-Sequence", "Aither-Lone"
_RETRY_S = 0.5
_TOGETHER = 256

logger = structlog.get_logger()


Hear = Callable[[str, Ended], None]


class Notices:
    """Of one life of the log: those of another epoch are not seen. Raises StreamRefused and
    Unavailable LOG_UNREACHABLE."""

    def __init__(self, plan: StreamPlan, epoch: str, hear: Hear) -> None:
        self.stream = f"{plan.name}_REMOVALS"
        self._replicas = plan.replicas
        self._token = key_of("epoch", epoch)
        self._ended = f"{self.stream}.{self._token}.ended."
        self._dealt = f"{self.stream}.{self._token}.expiries"
        self._sweeper = f"{self.stream}.sweeper"
        self._hear = hear
        self._position = 0
        """In this stream."""
        self._made = ""
        """When it was made: one that was made anew begins with 1."""
        self._node = uuid.uuid4().hex[:12]
        self._lease = 0
        """Sequence of this node's lease; 0: it has none."""
        self._asked_s = float("-inf")
        """When the lease was asked for that this node has."""

    # Notices

    async def begin(self, wire: Wire) -> None:
        """Makes the stream where it is missing, and hears what stands in it."""
        self._made, last = await self._make(wire)
        which = {"deliver_policy": "all", "filter_subject": f"{self._ended}>"}
        await survey(wire, self.stream, which, last, self._take)
        self._position = max(self._position, last)

    async def follow(self, wire: Wire) -> None:
        """Hears what comes, until the connection is lost."""
        told = ""
        while not wire.lost.is_set():
            try:
                await self._follow(wire)
                told = ""
            except (AitherError, StreamRefused) as error:
                if str(error) != told:
                    logger.warning("jetstream.notices_broken", reason=str(error))
                told = str(error)
                await asyncio.sleep(_RETRY_S)

    async def end(self, wire: Wire, subjects: Iterable[tuple[str, Ended]]) -> None:
        """Tells all nodes; returns when it is stored."""
        told = list(subjects)
        for start in range(0, len(told), _TOGETHER):
            some = told[start : start + _TOGETHER]
            await asyncio.gather(*(self._tell(wire, *one) for one in some))

    async def clean(self, wire: Wire, tells_nothing: Callable[[str, Ended], bool]) -> None:
        """Lets go of notices that tell nothing any more, and of those of former lives."""
        state = (await wire.ask(f"STREAM.INFO.{self.stream}", {}))["state"]
        gone: list[tuple[str, int]] = []

        def take(message: Message) -> None:
            subject = message.subject.removeprefix(self._ended)
            if subject == message.subject or tells_nothing(subject, _ended(message)):
                gone.append((message.subject, place_of(message.reply).sequence))

        which = {"deliver_policy": "all", "filter_subject": f"{self.stream}.*.ended.>"}
        await survey(wire, self.stream, which, state["last_seq"], take)
        for subject, at in gone:
            request = {"filter": subject, "seq": at + 1}
            await wire.ask(f"STREAM.PURGE.{self.stream}", request)

    # Events that end by themselves

    async def dealt_to(self, wire: Wire) -> int:
        """Up to this sequence no event is held that has an end. 0: nobody knows."""
        try:
            answer = await wire.ask(f"STREAM.MSG.GET.{self.stream}", {"last_by_subj": self._dealt})
        except StreamRefused as refused:
            if refused.code == NO_MESSAGE:
                return 0
            raise
        return int(b64decode(answer["message"]["data"]))

    async def set_dealt_to(self, wire: Wire, sequence: int) -> None:
        await wire.post(self._dealt, str(sequence).encode(), {})

    # The lease

    @property
    def leased(self) -> bool:
        """Whether this node may believe that it alone looks after the retention."""
        return bool(self._lease) and self._now_s() < self._asked_s + TRUST_S

    async def lease(self, wire: Wire) -> bool:
        """Takes or renews the lease. False: another node has it."""
        if self._lease and self._now_s() < self._asked_s + _RENEW_S:
            return True
        for expected in (self._lease, 0) if self._lease else (0,):
            asked_s = self._now_s()
            headers = {EXPECTED_SUBJECT: str(expected), TTL: f"{LEASE_S}s"}
            try:
                answer = await wire.post(self._sweeper, self._node.encode(), headers)
            except StreamRefused as refused:
                if refused.code not in WRONG_LAST_SEQUENCE:
                    raise
                self._lease = 0
                continue
            if not expected:
                logger.info("retention.kept_here", stream=self.stream)
            self._lease, self._asked_s = int(answer["seq"]), asked_s
            return True
        return False

    async def release(self, wire: Wire) -> None:
        """Lets another node begin at once."""
        lease, self._lease = self._lease, 0
        if lease:
            await wire.ask(f"STREAM.MSG.DELETE.{self.stream}", {"seq": lease, "no_erase": True})

    async def _make(self, wire: Wire) -> tuple[str, int]:
        """When it was made, and its last sequence."""
        config = {
            "name": self.stream,
            "description": "What was removed from the log of Flux, for all of its nodes.",
            "subjects": [f"{self.stream}.>"],
            "storage": "file",
            "num_replicas": self._replicas,
            "max_msgs_per_subject": 1,
            "allow_direct": True,
            "allow_msg_ttl": True,
        }
        try:
            answer = await wire.ask(f"STREAM.CREATE.{self.stream}", config)
        except StreamRefused as refused:
            if refused.code != NAME_TAKEN:
                raise
            answer = await wire.ask(f"STREAM.INFO.{self.stream}", {})
            for key in ("subjects", "max_msgs_per_subject", "allow_msg_ttl"):
                if answer["config"].get(key) != config[key]:
                    why = f"{key} is {answer['config'].get(key)}, not {config[key]}"
                    raise foreign(self.stream, why) from refused
        return answer["created"], int(answer["state"]["last_seq"])

    async def _follow(self, wire: Wire) -> None:
        consumer = Consumer(wire, self._take)
        try:
            found = await wire.ask(f"STREAM.INFO.{self.stream}", {})
            if found["created"] != self._made:  # anew, by another node
                self._position = 0
                await self.begin(wire)
            await consumer.start(
                self.stream,
                {
                    "deliver_policy": "by_start_sequence",
                    "opt_start_seq": self._position + 1,
                    "filter_subject": f"{self._ended}>",
                    "headers_only": True,
                },
            )
            await consumer.until_broken()
        except StreamRefused as refused:
            if refused.code != NO_STREAM:
                raise
            # Somebody deleted it. What it said is lost for nodes that come later.
            self._position = 0
            await self.begin(wire)
        finally:
            await consumer.stop()

    def _take(self, message: Message) -> None:
        self._position = max(self._position, place_of(message.reply).sequence)
        self._hear(message.subject[len(self._ended) :], _ended(message))

    async def _tell(self, wire: Wire, subject: str, ended: Ended) -> None:
        headers = {_AT: str(ended.sequence)}
        if ended.lone:
            headers |= {_LONE: "1", TTL: f"{_LONE_S}s"}
        await wire.post(self._ended + subject, b"", headers)

    def _now_s(self) -> float:
        return asyncio.get_running_loop().time()


def _ended(message: Message) -> Ended:
    headers = message.headers or {}
    return Ended(int(headers[_AT]), _LONE in headers)
