"""Options that several commands share, and what they come to."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from aither_sdk.settings import Settings

Config = Annotated[
    Path | None,
    typer.Option("--config", help="Settings file. Unset: aither.yaml where there is one."),
]
PortBase = Annotated[
    int | None,
    typer.Option("--port-base", help="All ports follow from it (Flux: + 1). Unset: 7400."),
]
FluxAddress = Annotated[
    str | None,
    typer.Option(
        "--flux", metavar="ADDRESS", help="host:port of Flux. Unset: as the settings say."
    ),
]
_CONNECT_TIMEOUT_S = 1.0


def settings_of(config: Path | None, port_base: int | None, **more: Any) -> Settings:
    """The settings with what the command line said on top. Raises ConfigError with all faults."""
    from aither_sdk.settings_sources import load_settings

    given = {"port_base": port_base, **more}
    return load_settings(config, {key: value for key, value in given.items() if value is not None})


def flux_address(flux: str | None, config: Path | None, port_base: int | None) -> str:
    """Where to dial Flux. Raises InvalidArgument for what is not host:port."""
    given = flux or settings_of(config, port_base).flux.address
    return one_node(given, "--flux" if flux else "flux.address")


def one_node(addresses: str, field: str) -> str:
    """Of the nodes of one bus ("a:7401,b:7401") the first that accepts a connection; the first of
    all where none does. A command asks once and ends, so it needs no more than one. Blocks for a
    second at most for each node. Raises InvalidArgument for what is not host:port."""
    from aither_sdk.addresses import split_address

    nodes = [node.strip() for node in addresses.split(",")]
    places = [split_address(node, field) for node in nodes]
    if len(nodes) == 1:
        return nodes[0]
    for node, place in zip(nodes, places, strict=True):
        try:
            socket.create_connection(place, _CONNECT_TIMEOUT_S).close()
        except OSError:
            continue
        return node
    return nodes[0]
