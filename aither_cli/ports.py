"""Ports: whether one is free, who has it, and a base from which all that are needed are free."""

from __future__ import annotations

import errno
import random
from collections.abc import Iterable, Sequence

from aither_cli.failures import Failure
from aither_cli.services import Place
from aither_sdk.listening import bind_fault

OFFSETS = (1, 2, 3, 22, 80, 101, 102, 103, 104, 105, 122)
"""What the services, and nats-server, add to the port base."""
_BASES = range(20_000, 32_000)
"""Where a free base is looked for: below the ports that Linux hands to outgoing connections."""
_ATTEMPTS = 200


def check_ports(places: Iterable[Place]) -> None:
    """Raises Failure naming the first port that cannot be had, its service, and what to do."""
    for place in places:
        for what, port in (("", place.port), ("health ", place.health_port)):
            fault = None if port is None else bind_fault(place.bind, port)
            if fault is not None and port is not None:
                raise Failure(_told(place, what, port, fault))


def free_base(rng: random.Random | None = None) -> int:
    """A base from which every port of `OFFSETS` is free at this moment on loopback."""
    rng = rng or random.Random()
    for _ in range(_ATTEMPTS):
        base = rng.choice(_BASES)
        if all(bind_fault("127.0.0.1", base + offset) is None for offset in OFFSETS):
            return base
    raise Failure("found no free ports; name a base yourself with --port-base")


def _told(place: Place, what: str, port: int, fault: OSError) -> str:
    where = f"{what}port {port} of {place.name}"
    if fault.errno == errno.EADDRINUSE:
        other = "choose other ports with --port-base, for example --port-base 8400"
        return f"{where} is taken{_holder(port)}; stop what has it, or {other}"
    if fault.errno == errno.EACCES:
        return f"{where} may not be used by this user; choose higher ports with --port-base"
    if fault.errno == errno.EADDRNOTAVAIL:
        told = f"{place.bind} is not an address of this machine"
        return f"{where} cannot be had: {told}; set {place.name}.bind to one"
    return f"{where} cannot be had: {fault.strerror or fault}; set {place.name}.bind and its port"


def _holder(port: int) -> str:
    """Who listens there, as far as this user may know."""
    import psutil

    try:
        listeners = [
            c.pid
            for c in psutil.net_connections(kind="tcp")
            if c.status == psutil.CONN_LISTEN and c.pid and c.laddr and c.laddr.port == port
        ]
        return _named(listeners, psutil.Process(listeners[0]).name()) if listeners else ""
    except (psutil.Error, OSError):
        return ""


def _named(pids: Sequence[int], name: str) -> str:
    return f" by pid {pids[0]} ({name})"
