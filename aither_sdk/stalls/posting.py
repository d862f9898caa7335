"""Brings the events of stalls to Flux from a thread of its own, over a connection of its own: the
loop that publishes everything else is the one that stands."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import grpc
from google.protobuf.message import Message
from opentelemetry import metrics

from aither_sdk.addresses import refuse_own
from aither_sdk.backoff import FullJitter
from aither_sdk.errors import AitherError
from aither_sdk.stalls.words import say

if TYPE_CHECKING:
    from aither.flux.v1.event_pb2 import Event

_WAITING_EVENTS = 128
"""Two a stall, some 20 kB each; more wait only while Flux is away."""
_CALL_TIMEOUT_S = 2.0
_MOST_S = 5.0
"""Between two attempts while Flux is away."""
_WORTH_REPEATING = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.ABORTED,
}
_CHANNEL_OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)

Publish = Callable[[str, Sequence["Event"]], None]
"""Has one node, by its address, take the events. Blocking; raises grpc.RpcError or AitherError."""


def publish(address: str, events: Sequence[Event]) -> None:
    """`FluxService/Publish` over a connection that lasts as long as the call."""
    from aither.flux.v1.flux_service_pb2 import PublishRequest, PublishResponse

    refuse_own(address)
    with grpc.insecure_channel(address, options=_CHANNEL_OPTIONS) as channel:
        call = channel.unary_unary(
            "/aither.flux.v1.FluxService/Publish",
            request_serializer=PublishRequest.SerializeToString,
            response_deserializer=PublishResponse.FromString,
        )
        call(PublishRequest(events=events), timeout=_CALL_TIMEOUT_S)


class StallPost:
    """Takes events at any time and from any thread, and brings them to Flux, in order, as soon as
    it is told where Flux is.

    An event has the id of what it tells, so that a repeat is no second event. Once it is opened,
    what finds no room, is refused, or is left when the post closes is counted
    (`event_loop.stalls.events_lost`) and said in the log; before, nobody asked for it on Flux.
    """

    def __init__(self, source: str, *, publish: Publish = publish) -> None:
        self._source = source
        self._subject = f"runtime.{source}.stall"
        self._publish = publish
        self._addresses: list[str] = []
        self._waiting: deque[Event] = deque()
        self._changed = threading.Condition()
        self._closing_at_s: float | None = None
        self._thread: threading.Thread | None = None
        self._silent = False
        """Flux was away at the last attempt, and that was said."""
        self.lost_events = 0
        self._lost = metrics.get_meter("aither_sdk").create_counter(
            "event_loop.stalls.events_lost",
            unit="{event}",
            description="Events of stalls that did not come to Flux",
        )

    def open(self, addresses: str) -> None:
        """Where Flux is: "host:port", or several nodes of one bus. Only the first call counts."""
        with self._changed:
            if self._thread is not None or self._closing_at_s is not None:
                return
            self._addresses = [address.strip() for address in addresses.split(",")]
            self._thread = threading.Thread(target=self._run, name="stall-post", daemon=True)
        self._thread.start()

    @property
    def opened(self) -> bool:
        return self._thread is not None

    def post(self, news: Sequence[Message]) -> None:
        """LoopStallDetected or LoopStalled messages. Never blocks."""
        events = [self._event_of(message) for message in news]
        with self._changed:
            self._waiting.extend(events)
            over = max(0, len(self._waiting) - _WAITING_EVENTS)
            for _ in range(over):
                self._waiting.popleft()
            self._changed.notify()
        if self.opened:
            self._lose(over, "more stalls than Flux could be told of")

    def close(self, timeout_s: float = 2.0) -> None:
        """Brings what waits, within `timeout_s`. Blocking."""
        with self._changed:
            self._closing_at_s = time.monotonic() + timeout_s
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(timeout_s + 0.1)
            with self._changed:
                left = len(self._waiting)
                self._waiting.clear()
            self._lose(left, "Flux was away to the end")

    def _event_of(self, message: Message) -> Event:
        # Imported with the first stall: a program that tells no Flux needs no stubs.
        from aither_sdk.events import new_event

        stall_id, kind = message.stall.stall_id, message.DESCRIPTOR.name  # type: ignore[attr-defined]
        return new_event(
            self._subject, message, source=self._source, id=f"{stall_id}-{kind}", cause=None
        )

    def _run(self) -> None:
        backoff = FullJitter(most_s=_MOST_S)
        while (events := self._next()) is not None:
            try:
                why = self._bring(events)
            except Exception as error:  # a defect must not silence the next
                self._drop(events, f"{type(error).__name__}: {error}")
                continue
            if why is None:
                self._drop(events, "")
                backoff.reset()
                self._silent = False
                continue
            if not self._silent:
                self._silent = True
                say("warning", "stall.flux_is_away", why=why, waiting=len(self._waiting))
            if not self._wait(backoff.next_s(0.05)):
                return

    def _wait(self, seconds: float) -> bool:
        """Before another attempt; False: there is no time for one any more."""
        with self._changed:
            if self._closing_at_s is None:
                self._changed.wait_for(lambda: self._closing_at_s is not None, seconds)
            else:
                self._changed.wait(seconds)
            closing_at_s = self._closing_at_s
        return closing_at_s is None or time.monotonic() < closing_at_s

    def _next(self) -> list[Event] | None:
        """Waits for events; None: it closes, and there are none."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing_at_s is not None)
            return list(self._waiting) or None

    def _bring(self, events: Sequence[Event]) -> str | None:
        """Why no node took them for now; None: one did, or none ever will, which is said."""
        why = ""
        for address in self._addresses:
            try:
                self._publish(address, events)
                return None
            except grpc.RpcError as error:
                why = f"{address}: {error.details()}"
                if error.code() not in _WORTH_REPEATING:
                    self._lose(len(events), why)
                    return None
            except AitherError as error:
                self._lose(len(events), error.message)
                return None
        return why

    def _drop(self, events: Sequence[Event], lost_why: str) -> None:
        """They wait no longer; a flood may have pushed some of them out meanwhile."""
        gone = {event.id for event in events}
        with self._changed:
            self._waiting = deque(event for event in self._waiting if event.id not in gone)
        if lost_why:
            self._lose(len(events), lost_why)

    def _lose(self, events: int, why: str) -> None:
        if events:
            self.lost_events += events
            self._lost.add(events)
            say("warning", "stall.not_on_flux", events=events, why=why)
