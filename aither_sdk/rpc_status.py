"""The border between Aither's errors and gRPC's: the only table from one to the other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from aither_sdk import errors
from aither_sdk.errors import AitherError, FieldViolation

_FAMILIES: dict[grpc.StatusCode, type[AitherError]] = {
    family.code: family
    for family in (
        errors.InvalidArgument,
        errors.NotFound,
        errors.AlreadyExists,
        errors.FailedPrecondition,
        errors.OutOfRange,
        errors.ResourceExhausted,
        errors.Unavailable,
        errors.DeadlineExceeded,
        errors.Unimplemented,
        errors.PermissionDenied,
        errors.DataLoss,
        errors.Internal,
    )
}
_BAD_REQUEST_BYTES = 3072
"""Of violations told one by one. They travel in trailing metadata, of which a client of gRPC takes
8 KiB, and a call with more ends as RESOURCE_EXHAUSTED instead of what it is."""
_MESSAGE_BYTES = 1536
_TEXT_BYTES = 256
"""Of one violation or one value of the metadata; what a client sent may be in it, of any length."""
_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


def to_status(error: AitherError) -> status_pb2.Status:
    """`google.rpc.Status` with ErrorInfo always, BadRequest and RetryInfo where they apply."""
    details: list[any_pb2.Any] = [_packed(_error_info(error))]
    if error.violations:
        details.append(_packed(_bad_request(error.violations)))
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        details.append(_packed(error_details_pb2.RetryInfo(retry_delay=delay)))
    message = _clipped(error.message, _MESSAGE_BYTES)
    return status_pb2.Status(code=error.code.value[0], message=message, details=details)


def from_status(status: status_pb2.Status) -> AitherError:
    """The typed error that `to_status` was given; details of other domains keep their reason."""
    code = _CODES.get(status.code, grpc.StatusCode.UNKNOWN)
    reason: str | None = None
    metadata: dict[str, str] = {}
    retry_after_s: float | None = None
    violations: list[FieldViolation] = []
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        retry = error_details_pb2.RetryInfo()
        bad = error_details_pb2.BadRequest()
        if detail.Unpack(info):
            reason, metadata = info.reason, dict(info.metadata)
        elif detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
        elif detail.Unpack(bad):
            violations = [FieldViolation(v.field, v.description) for v in bad.field_violations]
    return _build(code, status.message, reason, metadata, retry_after_s, violations)


def from_rpc_error(error: grpc.RpcError) -> AitherError:
    """The typed error of a failed call; plain gRPC errors (no details) come back typed as well."""
    status = None
    try:
        # Typed for the sync API; the aio error offers the same accessors.
        status = rpc_status.from_call(error)  # type: ignore[arg-type]
    except (ValueError, DecodeError):  # details of somebody else's, perhaps a proxy's
        status = None
    if status is not None:
        return from_status(status)
    code = error.code() if isinstance(error, grpc.aio.AioRpcError) else grpc.StatusCode.UNKNOWN
    message = error.details() if isinstance(error, grpc.aio.AioRpcError) else str(error)
    return _build(code, message or code.name, None, {}, None, ())


def _build(
    code: grpc.StatusCode,
    message: str,
    reason: str | None,
    metadata: dict[str, str],
    retry_after_s: float | None,
    violations: Iterable[FieldViolation],
) -> AitherError:
    family = _FAMILIES.get(code, AitherError)
    return family(
        message,
        reason=reason or (code.name if family is AitherError else None),
        metadata=metadata,
        retry_after_s=retry_after_s,
        violations=tuple(violations),
    )


def _error_info(error: AitherError) -> error_details_pb2.ErrorInfo:
    metadata = {key: _clipped(value, _TEXT_BYTES) for key, value in error.metadata.items()}
    return error_details_pb2.ErrorInfo(reason=error.reason, domain=errors.DOMAIN, metadata=metadata)


def _bad_request(violations: Sequence[FieldViolation]) -> error_details_pb2.BadRequest:
    bad = error_details_pb2.BadRequest()
    for told, violation in enumerate(violations, start=1):
        bad.field_violations.add(
            field=_clipped(violation.field, _TEXT_BYTES),
            description=_clipped(violation.description, _TEXT_BYTES),
        )
        if bad.ByteSize() > _BAD_REQUEST_BYTES and told < len(violations):
            bad.field_violations.add(description=f"and {len(violations) - told} more like these")
            break
    return bad


def _clipped(text: str, most_bytes: int) -> str:
    """Cut off where it takes more than this on the wire, which writes three bytes for each that is
    not plain ASCII."""
    left = most_bytes
    for index, character in enumerate(text):
        plain = " " <= character <= "~" and character != "%"
        left -= 1 if plain else 3 * len(character.encode(errors="replace"))
        if left < 0:
            return text[:index] + "..."
    return text


def _packed(
    detail: error_details_pb2.ErrorInfo
    | error_details_pb2.BadRequest
    | error_details_pb2.RetryInfo,
) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed
