from __future__ import annotations

from urllib.parse import quote

import grpc
import pytest

from aither_sdk.errors import FieldViolation, InvalidArgument, ResourceExhausted
from aither_sdk.rpc_status import from_rpc_error, from_status, to_status


def test_an_error_comes_back_as_it_was_sent() -> None:
    sent = ResourceExhausted("full", reason="FULL", metadata={"a": "b"}, retry_after_s=0.25)
    got = from_status(to_status(sent))
    assert type(got) is ResourceExhausted
    assert (got.message, got.reason, got.metadata, got.retry_after_s) == (
        "full",
        "FULL",
        {"a": "b"},
        0.25,
    )


def test_few_violations_are_all_told_and_many_are_counted() -> None:
    few = [FieldViolation(f"events[{n}].id", "empty") for n in range(20)]
    assert from_status(to_status(InvalidArgument.of(few))).violations == tuple(few)
    many = few * 100
    status = to_status(InvalidArgument.of(many))
    assert status.ByteSize() < 5000
    *told, rest = from_status(status).violations
    assert told == many[: len(told)]
    assert rest == FieldViolation("", f"and {len(many) - len(told)} more like these")


@pytest.mark.parametrize("text", ["x", "\N{HOT BEVERAGE}", "\N{PILE OF POO}", "%", "\n"])
def test_an_error_that_repeats_what_a_client_sent_still_fits_into_what_a_client_takes(
    text: str,
) -> None:
    endless = text * 100_000
    violations = [FieldViolation(endless, endless)] * 60
    for sent in (
        InvalidArgument.of(violations),
        ResourceExhausted(endless, metadata={"epoch": endless}, retry_after_s=1),
    ):
        status = to_status(sent)
        assert status.ByteSize() + len(quote(status.message)) < 7600  # of 8192, with other headers
        got = from_status(status)
        assert type(got) is type(sent)
        assert got.message.endswith("...")
        assert got.message[:20] == sent.message[:20]
    short = "\N{HOT BEVERAGE} is not ready, 100 % \n"
    assert from_status(to_status(ResourceExhausted(short))).message == short


def test_an_error_with_foreign_details_is_still_typed() -> None:
    """A proxy may put anything there."""
    details = grpc.aio.Metadata(("grpc-status-details-bin", b"\xff\xff no protobuf"))
    error = grpc.aio.AioRpcError(
        grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.aio.Metadata(), details, details="slow down"
    )
    got = from_rpc_error(error)
    assert (type(got), got.message) == (ResourceExhausted, "slow down")
