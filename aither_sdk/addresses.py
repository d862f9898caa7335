"""host:port, and which of them are this process's own."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from aither_sdk.errors import FieldViolation, InvalidArgument, SelfDialError

_LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "0.0.0.0", "::", "::1", ""})

_own: dict[tuple[str, int], int] = {}
"""Addresses that this process serves, with how many servers do. A module's variable because the
listening sockets are the process's, whoever opened them; changed only by `serving_at`."""


def split_address(address: str, field: str = "address") -> tuple[str, int]:
    """`("127.0.0.1", 7401)` of "127.0.0.1:7401"; IPv6 in brackets. Raises InvalidArgument."""
    host, colon, port = address.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        told = f'"{address}" is not host:port; use something like "127.0.0.1:7401"'
        raise InvalidArgument.of([FieldViolation(field, told)])
    return host, int(port)


def join_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@contextmanager
def serving_at(host: str, port: int) -> Iterator[None]:
    """While this is open, dialling host:port from this process raises SelfDialError."""
    key = (host, port)
    _own[key] = _own.get(key, 0) + 1
    try:
        yield
    finally:
        _own[key] -= 1
        if not _own[key]:
            del _own[key]


def refuse_own(address: str) -> None:
    """Raises SelfDialError when this process serves `address` itself."""
    host, port = split_address(address)
    for own_host, own_port in _own:
        if port == own_port and (host == own_host or _is_here(host)):
            raise SelfDialError(
                f"{address} is served by this very process; a call to oneself waits for the loop "
                "that makes it. Call the function directly"
            )


def _is_here(host: str) -> bool:
    return host in _LOCAL_HOSTS or host.startswith("127.") or host == socket.gethostname()
