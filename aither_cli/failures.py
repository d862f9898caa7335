"""The ways in which a command fails, and how each is told: one line, with what to do."""

from __future__ import annotations

FAILED, USAGE = 1, 2
"""Exit codes: it did not work; it was asked wrongly."""


class Failure(Exception):
    """Raised when a command cannot go on. `str()` is what the user reads after "aither: "."""

    def __init__(self, told: str, *, exit_code: int = FAILED) -> None:
        super().__init__(told)
        self.exit_code = exit_code


def told_of(error: Exception) -> tuple[list[str], int] | None:
    """The lines and the exit code for an error that users may meet; None for a defect of ours."""
    if isinstance(error, Failure):
        return [str(error)], error.exit_code
    # Only now: whoever raised one of these has paid for gRPC already.
    from aither_sdk.errors import AitherError, ConfigError, InvalidArgument

    if isinstance(error, ConfigError):
        faults = sorted(error.faults, key=lambda fault: (fault.file, fault.line or 0))
        return [str(fault) for fault in faults], FAILED
    if isinstance(error, AitherError):
        wait = "" if error.retry_after_s is None else f"; try again in {error.retry_after_s:g} s"
        code = USAGE if isinstance(error, InvalidArgument) else FAILED
        return [" ".join(error.message.split()) + wait], code
    if isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        return [f"{error.strerror or error}{where}"], FAILED
    return None
