"""Does grpc.health.v1.Health/Check answer SERVING?"""

from __future__ import annotations

import re
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from aither.pulse.v1.target_pb2 import CheckResult, GrpcCheck
from aither_sdk.addresses import refuse_own, split_address
from aither_sdk.errors import SelfDialError
from pulse_svc.checks.base import BAD_ANSWER, INTERNAL, NOT_FOUND, REFUSED, TIMEOUT, bad, good

_SERVING = health_pb2.HealthCheckResponse.SERVING
_OPTIONS: tuple[tuple[str, int | str], ...] = (
    # A subchannel shared with others would bring their connection backoff along.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
    ("grpc.primary_user_agent", "aither-pulse"),
    ("grpc.max_receive_message_length", 64 * 2**10),
)

_UNNAMED = ("DNS", "name resolution", "resolution failed", "Domain name")
"""How gRPC words that a name has no address; the code is UNAVAILABLE all the same."""
_NOT_GRPC = ("HTTP/2", "http1.x")
"""How gRPC words that who listens there speaks something else."""
_WRAPPING = re.compile(
    r".*last error: |[A-Z_]+: |(?:ipv4|ipv6|unix|dns):\S+: |Failed to connect to remote host: "
    r"|recvmsg:"
)
"""What gRPC puts before the system's own words, one inside the other."""
_NO_ANSWER = "no answer in time"
_CLOSED = ("Socket closed", "Stream removed", "Transport closed")


class GrpcHealthCheck:
    """Keeps one channel while answers come, and throws it away after a probe that had none.

    So a target that is back is found by the next probe: neither gRPC's backoff nor a connection
    that died without a word stands between. (A short `min_reconnect_backoff_ms` would not do: it is
    also the time a connection attempt gets.)
    """

    def __init__(self, config: GrpcCheck) -> None:
        self._address = config.address
        self._request = health_pb2.HealthCheckRequest(service=config.service)
        self._channel: grpc.aio.Channel | None = None

    async def probe(self, timeout_s: float) -> CheckResult:
        try:
            refuse_own(self._address)
            health: Any = health_pb2_grpc.HealthStub(self._open())  # its types know no methods
            response: health_pb2.HealthCheckResponse = await health.Check(
                self._request, timeout=timeout_s
            )
        except SelfDialError:
            told = f"{self._address} is Pulse itself; watch the address of its health instead"
            return bad(INTERNAL, told)
        except grpc.aio.AioRpcError as error:
            return await self._failed(error)
        except Exception as error:
            await self.aclose()
            return bad(INTERNAL, f"{type(error).__name__}: {error}")
        except BaseException:
            await self.aclose()  # cancelled: the deadline came before gRPC's own
            raise
        if response.status == _SERVING:
            return good("SERVING")
        status = health_pb2.HealthCheckResponse.ServingStatus
        known = response.status in status.values()
        name = status.Name(response.status) if known else f"status {response.status}"
        return bad(BAD_ANSWER, name)

    async def aclose(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()

    def _open(self) -> grpc.aio.Channel:
        if self._channel is None:
            self._channel = grpc.aio.insecure_channel(self._address, options=_OPTIONS)
        return self._channel

    async def _failed(self, error: grpc.aio.AioRpcError) -> CheckResult:
        code, details = error.code(), error.details() or ""
        if code is grpc.StatusCode.NOT_FOUND:
            return bad(BAD_ANSWER, f'knows no service "{self._request.service}"')
        if code is grpc.StatusCode.UNIMPLEMENTED:
            return bad(BAD_ANSWER, "does not speak grpc.health.v1")
        await self.aclose()
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return bad(TIMEOUT, _NO_ANSWER)
        if code is grpc.StatusCode.UNAVAILABLE:
            return self._unavailable(details)
        return bad(BAD_ANSWER, f"{code.name}: {details}")

    def _unavailable(self, details: str) -> CheckResult:
        if any(word in details for word in _UNNAMED):
            host, _ = split_address(self._address)
            return bad(NOT_FOUND, f"{host}: no address is known for this name")
        if any(word in details for word in _NOT_GRPC):
            return bad(BAD_ANSWER, "does not speak gRPC")
        told = in_plain_words(details)
        if told == _NO_ANSWER:
            return bad(TIMEOUT, told)
        return bad(REFUSED, f"{self._address}: {told}")


def in_plain_words(details: str) -> str:
    """What happened, out of what gRPC makes of it, in the system's words where it has any:
    "Connection refused"."""
    while (wrapping := _WRAPPING.match(details)) is not None:
        details = details[wrapping.end() :]
    if any(word in details for word in _CLOSED):
        return "connection closed"
    if "timed out" in details:
        return _NO_ANSWER
    return details or "no connection"
