"""Names to addresses, in bounded threads: a hanging name server takes no thread of others."""

from __future__ import annotations

import socket

from aiohttp.abc import AbstractResolver, ResolveResult

from pulse_svc.threads import Threads

_NUMERIC = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV


async def resolve(
    threads: Threads, host: str, port: int, family: int = socket.AF_UNSPEC
) -> list[tuple[int, str]]:
    """(family, IP address) in the order of preference. Raises OSError."""
    found = await threads.run(
        lambda: socket.getaddrinfo(host, port, family=family, type=socket.SOCK_STREAM)
    )
    return [(int(family), str(address[0])) for family, _, _, _, address in found]


class ThreadsResolver(AbstractResolver):
    """`resolve`, for aiohttp."""

    def __init__(self, threads: Threads) -> None:
        self._threads = threads

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        return [
            ResolveResult(
                hostname=host, host=address, port=port, family=found, proto=0, flags=_NUMERIC
            )
            for found, address in await resolve(self._threads, host, port, family)
        ]

    async def close(self) -> None:
        pass
