"""How much one client may publish: events and bytes a second, with a burst.

A client is an event's `source`. Flux authenticates nobody, so this is a fence against accidents (a
loop without a pause, a job that was started a thousand times), not a wall against somebody who
gives another name with every event. The peer's address would be no better: behind a proxy it names
the proxy, and one process may open a hundred connections.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

from aither.flux.v1.event_pb2 import Event
from aither_sdk.errors import ResourceExhausted
from aither_sdk.settings import QuotaSettings
from flux_svc.gcra import Rate, charged, wait_ns

_NS = 1_000_000_000


class Claim(NamedTuple):
    """What one client wants to publish."""

    client: str
    events: int
    bytes: int


@dataclass(slots=True)
class QuotaStatistics:
    """Counts since the start."""

    slowed_batches: int = 0
    """Of publish streams, that had to wait."""
    slowed_s: float = 0.0
    """How long in all."""
    forgotten_clients: int = 0
    """Put out of the full table while they were ahead of their rate: they began anew."""


def claims_of(events: Iterable[Event]) -> Sequence[Claim]:
    """One for each source, over the encoded sizes of its events."""
    found: dict[str, Claim] = {}
    for event in events:
        _, count, total = found.get(event.source, ("", 0, 0))
        found[event.source] = Claim(event.source, count + 1, total + event.ByteSize())
    return list(found.values())


class Quotas:
    """All clients' accounts; owned by the loop.

    A client at rest needs no account. The table holds `clients` of them, the latest; about 300
    bytes each with a name of usual length, so 3 MB for 10,000.
    """

    def __init__(
        self,
        *,
        events: Rate | None = None,
        bytes: Rate | None = None,
        clients: int = 10_000,
        now_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """`None`: no limit of that kind. `now_ns` only ever rises."""
        self.statistics = QuotaStatistics()
        self._limits = _limits(events, bytes)
        self._clients = clients
        self._now_ns = now_ns
        self._accounts: dict[str, list[int]] = {}
        """Client -> one arrival time for each limit; the one used last is the last."""

    @classmethod
    def of(cls, settings: QuotaSettings) -> Quotas:
        def rate(per_s: float | None) -> Rate | None:
            return None if per_s is None else Rate(per_s, settings.burst_s)

        events, size = rate(settings.events_per_s), rate(settings.bytes_per_s)
        return cls(events=events, bytes=size, clients=settings.clients)

    @property
    def limited(self) -> bool:
        """Whether there is any limit; without one nothing needs to be claimed."""
        return bool(self._limits)

    @property
    def clients(self) -> int:
        """Accounts held."""
        return len(self._accounts)

    def take(self, claims: Sequence[Claim]) -> None:
        """All of it now, or nothing. Raises ResourceExhausted: QUOTA_EXCEEDED with the time to
        wait, BATCH_TOO_LARGE where waiting would never help."""
        now_ns = self._now_ns()
        for claim in claims:
            for limit in self._limits:
                late_ns = self._wait_ns(claim, limit, now_ns)
                if late_ns:
                    raise _exceeded(claim, limit, self._longest_ns(claims, now_ns) / _NS)
        self._charge(claims, now_ns)

    def reserve(self, claims: Sequence[Claim]) -> float:
        """Takes all of it and answers how many seconds to wait before using it: those who ask
        later wait behind. Raises ResourceExhausted BATCH_TOO_LARGE where no wait is enough."""
        now_ns = self._now_ns()
        wait_s = self._longest_ns(claims, now_ns) / _NS
        self._charge(claims, now_ns)
        if wait_s:
            self.statistics.slowed_batches += 1
            self.statistics.slowed_s += wait_s
        return wait_s

    def give_back(self, claims: Sequence[Claim]) -> None:
        """What was taken or reserved was not published."""
        for claim in claims:
            account = self._accounts.get(claim.client)
            if account is None:
                continue
            for limit in self._limits:
                account[limit.slot] -= limit.cost_ns(claim)

    def _longest_ns(self, claims: Sequence[Claim], now_ns: int) -> int:
        return max(
            self._wait_ns(claim, limit, now_ns) for claim in claims for limit in self._limits
        )

    def _wait_ns(self, claim: Claim, limit: _Limit, now_ns: int) -> int:
        if limit.amount(claim) > limit.rate.capacity:
            raise _never_fits(claim, limit)
        account = self._accounts.get(claim.client)
        tat_ns = 0 if account is None else account[limit.slot]
        return wait_ns(tat_ns, now_ns, limit.cost_ns(claim), limit.rate.tolerance_ns)

    def _charge(self, claims: Sequence[Claim], now_ns: int) -> None:
        for claim in claims:
            account = self._accounts.pop(claim.client, None)
            if account is None:
                self._make_room(now_ns)
                account = [0] * len(self._limits)
            self._accounts[claim.client] = [
                charged(account[limit.slot], now_ns, limit.cost_ns(claim)) for limit in self._limits
            ]

    def _make_room(self, now_ns: int) -> None:
        if len(self._accounts) >= self._clients:
            longest_silent = next(iter(self._accounts))
            account = self._accounts.pop(longest_silent)
            self.statistics.forgotten_clients += any(tat_ns > now_ns for tat_ns in account)


@dataclass(frozen=True, slots=True)
class _Limit:
    name: str
    """Its key in the settings."""
    rate: Rate
    amount: Callable[[Claim], int]
    slot: int
    """Of its arrival time in an account."""

    def cost_ns(self, claim: Claim) -> int:
        return self.rate.cost_ns(self.amount(claim))


def _limits(events: Rate | None, bytes: Rate | None) -> list[_Limit]:
    limits: list[_Limit] = []
    if events is not None:
        limits.append(_Limit("events_per_s", events, attrgetter("events"), len(limits)))
    if bytes is not None:
        limits.append(_Limit("bytes_per_s", bytes, attrgetter("bytes"), len(limits)))
    return limits


def _exceeded(claim: Claim, limit: _Limit, late_s: float) -> ResourceExhausted:
    return ResourceExhausted(
        f'"{claim.client}" is over its quota, {limit.rate.per_s:g} {limit.name}; nothing was '
        f"stored. Repeat with the same ids in {late_s:.3f} s, use PublishStream, which waits by "
        f"itself, or raise flux.quotas.{limit.name}",
        reason="QUOTA_EXCEEDED",
        metadata=_metadata(claim, limit),
        retry_after_s=late_s,
    )


def _never_fits(claim: Claim, limit: _Limit) -> ResourceExhausted:
    what = limit.name.removesuffix("_per_s")
    return ResourceExhausted(
        f'{limit.amount(claim)} {what} of "{claim.client}" in one batch; its quota never lets more '
        f"than {limit.rate.capacity} pass at once: send smaller batches, or raise "
        f"flux.quotas.{limit.name} or burst_s",
        reason="BATCH_TOO_LARGE",
        metadata=_metadata(claim, limit),
    )


def _metadata(claim: Claim, limit: _Limit) -> dict[str, str]:
    return {
        "client": claim.client,
        "limit": f"flux.quotas.{limit.name}",
        "per_s": f"{limit.rate.per_s:g}",
        "burst": str(limit.rate.capacity),
        "asked": str(limit.amount(claim)),
    }
