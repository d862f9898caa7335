"""Ports that must be known before anybody listens at them, and stay free until somebody does."""

from __future__ import annotations

import random
import socket
from collections import deque
from pathlib import Path

from aither_cli.ports import OFFSETS

_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
_MOST_HELD = 256


def _candidates() -> list[int]:
    """Ports that neither the kernel takes by itself nor `aither up --port-base 0` chooses. One that
    the kernel gave and that was closed again may be the next connection's, and a suite makes
    thousands of them."""
    try:
        first = int(_EPHEMERAL.read_text().split()[0])
    except OSError:
        first = 32_768
    found = list(range(15_000, min(20_000, first)))
    random.shuffle(found)
    return found


_untried = deque(_candidates())
_held: deque[socket.socket] = deque()


def free_ports(count: int) -> list[int]:
    """TCP ports of loopback where nobody listens, all different, and given to no other test process
    while this one lives (the last 256 of them)."""
    return [_free_port() for _ in range(count)]


def free_port_base() -> int:
    """A base for `--port-base` from which all ports are such ports."""
    for _ in range(len(_untried)):
        _untried.rotate(-1)
        if all(_hold(_untried[-1] + offset) for offset in OFFSETS):
            return _untried[-1]
    raise AssertionError("found no free port base below the ephemeral ports")


def _free_port() -> int:
    for _ in range(len(_untried)):
        _untried.rotate(-1)
        if _hold(_untried[-1]):
            return _untried[-1]
    with socket.socket() as probe:  # the kernel's range leaves none below it
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _hold(port: int) -> bool:
    """Tells other test processes that it is taken: by the UDP port of its number, which stands in
    nobody's way."""
    claim = socket.socket(type=socket.SOCK_DGRAM)
    try:
        claim.bind(("127.0.0.1", port))
        with socket.socket() as probe:
            probe.bind(("", port))
    except OSError:
        claim.close()
        return False
    _held.append(claim)
    if len(_held) > _MOST_HELD:
        _held.popleft().close()
    return True
