"""Everybody who follows: how many there may be, how they stand, who is furthest behind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

from aither.flux.v1 import flux_service_pb2 as pb
from aither_sdk.errors import ResourceExhausted
from flux_svc.fanout.subscription import Subscription

MAX_INFO_BYTES = 2**20 * 3 // 2
"""Of the subscriptions in one GetStreamInfoResponse, which stays below 2 MiB with the rest."""
MAX_NAMES = 64
"""Client names that lags are told of one by one: each is a time series for the life of the
process, and clients choose their names."""
OTHER = "other"
_ELEMENT_BYTES = 5
"""Tag and length of one element, at most."""


class Audience:
    """The open subscriptions, in order of arrival. Owned by one loop; what exporters ask may be
    asked from their thread (`list` of a dict is one step for other threads)."""

    def __init__(self, max_subscriptions: int) -> None:
        self._max = max_subscriptions
        self._open: dict[Subscription, None] = {}
        self._names: set[str] = set()
        """Names that were given a time series; never more than MAX_NAMES."""

    def __len__(self) -> int:
        return len(self._open)

    @contextmanager
    def seated(self, subscription: Subscription) -> Iterator[None]:
        """Counts the subscription while the block lasts. Raises ResourceExhausted when it is
        full."""
        if len(self._open) >= self._max:
            raise ResourceExhausted(
                f"{self._max} subscriptions are open; close some or raise flux.max_subscriptions",
                reason="TOO_MANY_SUBSCRIPTIONS",
                retry_after_s=5.0,
            )
        self._open[subscription] = None
        try:
            yield
        finally:
            del self._open[subscription]

    def infos(self, most: int) -> list[pb.SubscriptionInfo]:
        """The first to come, as many as fit."""
        listed, size = [], 0
        for subscription in islice(self._open, most):
            info = subscription.info()
            size += info.ByteSize() + _ELEMENT_BYTES
            if size > MAX_INFO_BYTES:
                break
            listed.append(info)
        return listed

    def states(self) -> Counter[pb.SubscriptionState.ValueType]:
        """How many there are of each state."""
        return Counter(subscription.state for subscription in list(self._open))

    def max_lag_events(self) -> int:
        return max((subscription.lag_events for subscription in list(self._open)), default=0)

    def lags(self) -> dict[str, int]:
        """The longest lag by client name: of the first names that came, the rest as OTHER. A name
        whose clients are gone is left out."""
        lags: dict[str, int] = {}
        for subscription in list(self._open):
            name = self._series(subscription)
            lags[name] = max(lags.get(name, 0), subscription.lag_events)
        return lags

    def _series(self, subscription: Subscription) -> str:
        name = subscription.given_name
        if not name:
            return OTHER
        if name not in self._names:
            if len(self._names) >= MAX_NAMES:
                return OTHER
            self._names.add(name)
        return name
