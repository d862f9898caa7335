"""The error families of Aither: few, typed, and each says what happened, to what, and what to do.

A servicer raises one of these and the error interceptor turns it into a rich gRPC status
(`rpc_status.py` holds the one table); a client gets the same class back from the wire.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import grpc

DOMAIN = "aither"
"""`google.rpc.ErrorInfo.domain` of every error that Aither raises."""


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field that is wrong: its path (`events[3].subject`) and what would be right."""

    field: str
    description: str


@dataclass(frozen=True, slots=True)
class Fault:
    """One mistake in a configuration: where it stands and what would be right."""

    file: str
    """Path of the file, or the name of the source, e.g. "environment"."""
    line: int | None
    """1 and up; None where the source has no lines."""
    key: str
    """Dotted path of the key, e.g. `targets[2].check.kind`."""
    message: str

    def __str__(self) -> str:
        where = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{where}: {self.key}: {self.message}" if self.key else f"{where}: {self.message}"


class AitherError(Exception):
    """Root of all errors of Aither.

    `reason` is an UPPER_SNAKE word for programs, the message is for people, `retry_after_s` is set
    when waiting that long helps, `violations` name the wrong fields of a request.
    """

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN
    default_reason: ClassVar[str] = "UNKNOWN"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
        violations: Sequence[FieldViolation] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.metadata = dict(metadata or {})
        self.retry_after_s = retry_after_s
        self.violations = tuple(violations)


class InvalidArgument(AitherError):
    """Raised when a request is wrong whatever the state of the server; repeat it corrected."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    default_reason = "INVALID_ARGUMENT"

    @classmethod
    def of(cls, violations: Sequence[FieldViolation]) -> InvalidArgument:
        """All violated fields in one error."""
        told = "; ".join(f"{v.field}: {v.description}" for v in violations[:8])
        more = f"; and {len(violations) - 8} more" if len(violations) > 8 else ""
        return cls(told + more, violations=violations)


class NotFound(AitherError):
    """Raised when the thing that was named does not exist."""

    code = grpc.StatusCode.NOT_FOUND
    default_reason = "NOT_FOUND"


class AlreadyExists(AitherError):
    """Raised when the name is taken."""

    code = grpc.StatusCode.ALREADY_EXISTS
    default_reason = "ALREADY_EXISTS"


class FailedPrecondition(AitherError):
    """Raised when the state of the server forbids it; repeating it unchanged does not help."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    default_reason = "FAILED_PRECONDITION"


class OutOfRange(AitherError):
    """Raised when a position lies outside what exists."""

    code = grpc.StatusCode.OUT_OF_RANGE
    default_reason = "OUT_OF_RANGE"


class ResourceExhausted(AitherError):
    """Raised when a bound is reached: a queue, a quota, a disk. Waiting may help."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    default_reason = "RESOURCE_EXHAUSTED"


class TooSlow(ResourceExhausted):
    """Raised to a subscriber with slow policy DISCONNECT that fell behind. All before it was handed
    out; `metadata` has `epoch` and `sequence` to resume with, as `Subscriber.position` does."""

    default_reason = "TOO_SLOW"


class Unavailable(AitherError):
    """Raised when the service cannot answer at this moment; repeat after a while."""

    code = grpc.StatusCode.UNAVAILABLE
    default_reason = "UNAVAILABLE"


class DeadlineExceeded(AitherError):
    """Raised when there was no answer in time; what was asked may or may not have happened."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED
    default_reason = "DEADLINE_EXCEEDED"


class Unimplemented(AitherError):
    """Raised by what the contract names and this version does not do."""

    code = grpc.StatusCode.UNIMPLEMENTED
    default_reason = "UNIMPLEMENTED"


class PermissionDenied(AitherError):
    """Raised when the caller may not do this."""

    code = grpc.StatusCode.PERMISSION_DENIED
    default_reason = "PERMISSION_DENIED"


class DataLoss(AitherError):
    """Raised when stored data is damaged; what was read before it is good."""

    code = grpc.StatusCode.DATA_LOSS
    default_reason = "DATA_LOSS"


class Internal(AitherError):
    """Raised for a defect of Aither itself; details are in the server's log, never on the wire."""

    code = grpc.StatusCode.INTERNAL
    default_reason = "INTERNAL"


class SelfDialError(FailedPrecondition):
    """Raised when a service dials its own address: a self-call on one loop is always a bug."""

    default_reason = "SELF_DIAL"


class ConfigError(AitherError):
    """Raised when a configuration is wrong; `faults` holds every mistake, not only the first."""

    code = grpc.StatusCode.FAILED_PRECONDITION
    default_reason = "BAD_CONFIGURATION"

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__("\n".join(str(fault) for fault in faults))
        self.faults = tuple(faults)
