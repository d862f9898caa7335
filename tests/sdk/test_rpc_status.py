from __future__ import annotations

import grpc

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


def test_an_error_with_foreign_details_is_still_typed() -> None:
    """A proxy may put anything there."""
    details = grpc.aio.Metadata(("grpc-status-details-bin", b"\xff\xff no protobuf"))
    error = grpc.aio.AioRpcError(
        grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.aio.Metadata(), details, details="slow down"
    )
    got = from_rpc_error(error)
    assert (type(got), got.message) == (ResourceExhausted, "slow down")
