"""What Genesis wants published, and what of it has not come round yet."""

from __future__ import annotations

from dataclasses import dataclass

from google.protobuf.message import Message

from aither.flux.v1 import event_pb2


@dataclass(frozen=True, slots=True)
class Outgoing:
    """An event to publish; judged here, made and sent by the engine."""

    subject: str
    payload: Message
    id: str = ""
    """Empty: any."""
    cause: event_pb2.Event | None = None
    awaited: bool = False
    """Whether the next judgement depends on it: it is `Underway` until it was folded in."""
    agent: str = ""
    """Awaited: the agent that is busy with it meanwhile."""


@dataclass(slots=True)
class _Sent:
    agent: str
    sequence: int | None = None
    """None: not acknowledged."""


class Underway:
    """Events that were sent and do not show in the world yet, so that no tick sends them again.

    Changed by the tick (`add`, `settle`) and by the engine when Flux answers (`acknowledge`,
    `lose`). What is lost is simply judged again at the next tick.
    """

    def __init__(self) -> None:
        self._sent: dict[str, _Sent] = {}

    def __contains__(self, event_id: str) -> bool:
        return event_id in self._sent

    def __len__(self) -> int:
        return len(self._sent)

    def keeps(self, agent: str) -> bool:
        """Whether an order for this agent is under way."""
        return any(sent.agent == agent for sent in self._sent.values())

    def add(self, outgoing: Outgoing) -> None:
        self._sent[outgoing.id] = _Sent(outgoing.agent)

    def acknowledge(self, event_id: str, sequence: int) -> None:
        """It stands in the log."""
        sent = self._sent.get(event_id)
        if sent is not None:
            sent.sequence = sequence

    def lose(self, event_id: str) -> None:
        """It does not stand in the log, as far as known."""
        self._sent.pop(event_id, None)

    def settle(self, world_sequence: int) -> None:
        """Forgets what the world has seen."""
        self._sent = {
            key: sent
            for key, sent in self._sent.items()
            if sent.sequence is None or sent.sequence > world_sequence
        }

    def clear(self) -> None:
        """The log is another one."""
        self._sent.clear()
