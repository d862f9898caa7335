"""The ways to look at a target; `open_check` is the only place that knows them all."""

from __future__ import annotations

from aither.pulse.v1.target_pb2 import Target
from pulse_svc.checks.base import Check, CheckTools
from pulse_svc.checks.grpc import GrpcHealthCheck
from pulse_svc.checks.heartbeat import HeartbeatListener
from pulse_svc.checks.http import HttpStatusCheck
from pulse_svc.checks.process import ProcessStateCheck
from pulse_svc.checks.tcp import TcpConnectCheck

__all__ = ["Check", "CheckTools", "HeartbeatListener", "open_check"]


def open_check(target: Target, tools: CheckTools) -> Check:
    """The check of a target that is valid and filled. Opens no connection yet."""
    check = target.check
    match check.WhichOneof("kind"):
        case "grpc":
            return GrpcHealthCheck(check.grpc)
        case "http":
            return HttpStatusCheck(check.http, tools.session)
        case "tcp":
            return TcpConnectCheck(check.tcp, tools.names)
        case "process":
            return ProcessStateCheck(check.process, tools.processes)
        case "heartbeat":
            return HeartbeatListener(check.heartbeat, tools.clock, tools.lag)
        case _:
            raise ValueError(f"{target.name} has no check; it was never validated")
