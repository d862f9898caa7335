"""Accounts of clients: each its own, bounded in number, and exact about how long to wait."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aither_sdk.errors import ConfigError, ResourceExhausted
from aither_sdk.settings_sources import load_settings
from flux_svc.gcra import Rate
from flux_svc.quotas import Claim, Quotas, claims_of
from tests.conformance.log_house import event

SECOND = 1_000_000_000


class Time:
    def __init__(self) -> None:
        self.ns = 10**15

    def __call__(self) -> int:
        return self.ns

    def advance(self, seconds: float) -> None:
        self.ns += round(seconds * SECOND)


def claim(client: str = "a", events: int = 1, size: int = 100) -> list[Claim]:
    return [Claim(client, events, size)]


def refused(quotas: Quotas, claims: list[Claim]) -> ResourceExhausted:
    with pytest.raises(ResourceExhausted) as caught:
        quotas.take(claims)
    return caught.value


def test_a_client_over_its_quota_is_told_exactly_when_to_come_back() -> None:
    time = Time()
    quotas = Quotas(events=Rate(100, 2), now_ns=time)
    quotas.take(claim(events=200))
    error = refused(quotas, claim(events=50))
    assert error.reason == "QUOTA_EXCEEDED"
    assert error.retry_after_s == pytest.approx(0.5)
    assert error.metadata == {
        "client": "a",
        "limit": "flux.quotas.events_per_s",
        "per_s": "100",
        "burst": "200",
        "asked": "50",
    }
    assert "flux.quotas.events_per_s" in error.message
    time.advance(0.49)
    refused(quotas, claim(events=50))
    time.advance(0.01)
    quotas.take(claim(events=50))


def test_clients_do_not_pay_for_each_other() -> None:
    quotas = Quotas(events=Rate(1, 10), now_ns=Time())
    quotas.take(claim("a", 10))
    refused(quotas, claim("a"))
    quotas.take(claim("b", 10))


def test_bytes_are_counted_beside_events_and_the_longer_wait_is_told() -> None:
    quotas = Quotas(events=Rate(10, 10), bytes=Rate(1000, 10), now_ns=Time())
    quotas.take(claim(events=1, size=10_000))
    error = refused(quotas, claim(events=1, size=2_000))
    assert error.metadata["limit"] == "flux.quotas.bytes_per_s"
    assert error.retry_after_s == pytest.approx(2.0)


def test_a_batch_of_two_clients_is_taken_whole_or_not_at_all() -> None:
    quotas = Quotas(events=Rate(1, 10), now_ns=Time())
    events = [event(source="a"), event(source="b"), event(source="a")]
    both = claims_of(events)
    sizes = [one.ByteSize() for one in events]
    assert both == [Claim("a", 2, sizes[0] + sizes[2]), Claim("b", 1, sizes[1])]
    quotas.take(claim("b", 10))
    assert refused(quotas, list(both)).metadata["client"] == "b"
    quotas.take(claim("a", 10))  # nothing was taken from it


@pytest.mark.parametrize("ask", [Quotas.take, Quotas.reserve])
def test_what_can_never_fit_is_refused_as_too_large(ask) -> None:  # type: ignore[no-untyped-def]
    quotas = Quotas(events=Rate(1, 10), now_ns=Time())
    with pytest.raises(ResourceExhausted, match="send smaller batches") as caught:
        ask(quotas, claim(events=11))
    assert caught.value.reason == "BATCH_TOO_LARGE"
    assert caught.value.retry_after_s is None  # waiting does not help
    quotas.take(claim(events=10))


def test_reservations_wait_one_behind_the_other() -> None:
    quotas = Quotas(events=Rate(10, 1), now_ns=Time())
    waits = [quotas.reserve(claim(events=10)) for _ in range(4)]
    assert waits == pytest.approx([0, 1, 2, 3])
    assert (quotas.statistics.slowed_batches, quotas.statistics.slowed_s) == (3, 6)


@given(
    st.lists(
        st.tuples(st.integers(1, 100), st.floats(0, 3), st.booleans()), min_size=1, max_size=40
    )
)
def test_what_is_given_back_never_lifts_the_rate(steps: list[tuple[int, float, bool]]) -> None:
    """Reserves at any moments; some give up while they wait. What the others use, at the times they
    were told, keeps to the rate in every window."""
    time, rate = Time(), Rate(100, 1)
    quotas = Quotas(events=rate, now_ns=time)
    used: list[tuple[int, int]] = []
    for amount, pause_s, gives_up in steps:
        wait_s = quotas.reserve(claim(events=amount))
        if gives_up and wait_s > 0:
            quotas.give_back(claim(events=amount))
        else:
            used.append((time.ns + round(wait_s * SECOND), amount))
        time.advance(pause_s)
    used.sort()
    for first, (begin_ns, _) in enumerate(used):
        total = 0
        for at_ns, amount in used[first:]:
            total += amount
            assert total <= rate.per_s * ((at_ns - begin_ns) / SECOND + rate.burst_s) + 1e-3


def test_the_table_is_bounded_and_forgets_who_was_silent_longest() -> None:
    quotas = Quotas(events=Rate(1, 10), clients=3, now_ns=Time())
    for name in ("a", "b", "c"):
        quotas.take(claim(name, 10))
    refused(quotas, claim("a"))
    quotas.take(claim("d", 10))
    assert quotas.clients == 3
    quotas.take(claim("a", 10))  # forgotten, so it begins anew: the price of the bound
    refused(quotas, claim("d"))
    assert quotas.statistics.forgotten_clients == 2


def test_forgetting_a_client_at_rest_changes_nothing_and_is_not_counted() -> None:
    time = Time()
    quotas = Quotas(events=Rate(1, 10), clients=1, now_ns=time)
    quotas.take(claim("a", 5))
    time.advance(5)
    quotas.take(claim("b", 5))
    assert quotas.statistics.forgotten_clients == 0


def test_without_a_limit_nothing_is_claimed() -> None:
    assert not Quotas().limited
    assert not Quotas.of(load_settings().flux.quotas).limited


def test_a_burst_that_no_batch_of_the_sdk_fits_into_is_a_fault_of_the_settings() -> None:
    with pytest.raises(ConfigError, match=r"never pass; use burst_s: 52") as caught:
        load_settings(overrides={"flux": {"quotas": {"events_per_s": 10}}})
    assert caught.value.faults[0].key == "flux.quotas"
    quotas = load_settings(overrides={"flux": {"quotas": {"events_per_s": 200}}}).flux.quotas
    assert Quotas.of(quotas).limited
