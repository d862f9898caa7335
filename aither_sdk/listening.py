"""Whether this process could listen somewhere; asks the operating system, and needs no gRPC."""

from __future__ import annotations

import socket


def bind_fault(host: str, port: int) -> OSError | None:
    """Why nobody can listen at host:port now, or None. Listens for a moment, connects nowhere."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As a server of ours does: connections that linger from the run before are no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            # Two sockets may be bound to one port with SO_REUSEADDR; only one of them may listen.
            probe.listen(1)
        except OSError as error:
            return error
    return None
