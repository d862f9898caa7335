"""Is the connection accepted?

The kernel accepts connections for a stopped or wedged process until its backlog is full, so this
check says "up" of a process under SIGSTOP; where that matters use a check that wants an answer.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket

from aither.pulse.v1.target_pb2 import CheckResult, TcpCheck
from aither_sdk.addresses import split_address
from pulse_svc.checks.base import INTERNAL, NOT_FOUND, REFUSED, TIMEOUT, bad, good, told
from pulse_svc.checks.names import resolve
from pulse_svc.threads import Threads


class TcpConnectCheck:
    """Connects and hangs up; tries every address of the name."""

    def __init__(self, config: TcpCheck, names: Threads) -> None:
        self._address = config.address
        self._host, self._port = split_address(config.address)
        self._names = names

    async def probe(self, timeout_s: float) -> CheckResult:
        try:
            addresses = await self._addresses()
        except socket.gaierror as error:
            return bad(NOT_FOUND, f"{self._host}: {error.strerror}")
        except OSError as error:
            return bad(INTERNAL, f"{self._host}: {told(error)}")
        errors = []
        for _, address in addresses:
            try:
                await self._connect(address)
            except TimeoutError as error:
                return bad(TIMEOUT, f"{self._address}: {told(error)}")
            except OSError as error:
                errors.append(told(error))
            else:
                return good(f"{self._address} accepts")
        return bad(REFUSED, f"{self._address}: {'; '.join(errors) or 'no address'}")

    async def aclose(self) -> None:
        pass

    async def _addresses(self) -> list[tuple[int, str]]:
        try:
            numeric = ipaddress.ip_address(self._host.partition("%")[0])
        except ValueError:
            return await resolve(self._names, self._host, self._port)
        return [(socket.AF_INET6 if numeric.version == 6 else socket.AF_INET, self._host)]

    async def _connect(self, address: str) -> None:
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_connection(asyncio.Protocol, address, self._port)
        transport.abort()
