"""`aither up`: the whole house in one terminal."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aither_cli.failures import USAGE, Failure
from aither_cli.options import Config
from aither_cli.services import NAMES, Place, chosen, place_of

if TYPE_CHECKING:
    from aither_cli.nats_server import NatsPlace
    from aither_sdk.settings import Settings

EPILOG = """\b
Examples:
  aither up                                  everything, on ports 7401 and up
  aither up --port-base 8400                 beside another one (with another --data-dir)
  aither up --only flux --log memory         only the bus, nothing kept
  aither up --log jetstream                  events in NATS, which is started too
  AITHER_PULSE__FLEET=fleet.yaml aither up   watch your own services
\b
Exit: 0 after Ctrl-C or SIGTERM, once drained; 1 cannot start; 2 asked wrongly.
A second Ctrl-C ends everything at once.
"""


CHILD_DRAIN_S = 3.0
"""Below `house.DRAIN_S`."""
_PROBE_S = 1.0


def up(
    data_dir: Annotated[
        str | None,
        typer.Option("--data-dir", help="Folder of all that is kept, logs too. Unset: .aither."),
    ] = None,
    config: Config = None,
    only: Annotated[
        str | None, typer.Option("--only", metavar="A,B", help="Only these services.")
    ] = None,
    port_base: Annotated[
        int | None,
        typer.Option("--port-base", help="All ports follow from it; 0: free ones. Unset: 7400."),
    ] = None,
    log: Annotated[
        str | None,
        typer.Option("--log", metavar="sqlite|memory|jetstream", help="Where Flux keeps events."),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow/--no-follow", help="Tell what happens while it runs.")
    ] = True,
) -> None:
    """Start the services, keep them running, tell what happens.

    A service that dies is started again; Ctrl-C drains and stops all.
    """
    names = chosen(only)
    if data_dir is not None and not data_dir.strip():
        raise Failure("--data-dir is empty; name a folder, such as .aither", exit_code=USAGE)
    settings, overrides = _settle(config, data_dir, port_base, log)
    from aither_cli.data_dir import held
    from aither_cli.dialing import quiet_logs
    from aither_cli.house import HousePlan, run_house
    from aither_cli.nats_server import write_config
    from aither_cli.ports import check_ports

    quiet_logs()
    places: list[Place] = [place_of(name, settings) for name in names]
    # A service that is too slow says itself what kept it, before the parent loses its patience.
    overrides["drain_timeout_s"] = min(settings.drain_timeout_s, CHILD_DRAIN_S)
    if only is not None:
        # What nobody starts is not down. Flux is missed even so: without it Pulse is dumb.
        services = [name for name in settings.pulse.services if name in ("flux", *names)]
        overrides["pulse"] = {**overrides.get("pulse", {}), "services": services}
    folder = settings.data_dir.absolute()
    nats = _nats(settings, names, folder)
    if nats is not None:
        places.insert(0, nats)
        overrides["flux"] = {**overrides.get("flux", {}), "nats_url": nats.url, "nats_synced": True}
    with held(folder):
        check_ports(places)
        _tell_if_flux_is_missing(names, settings.flux.address)
        if nats is not None:
            write_config(nats)
        run_house(
            HousePlan(
                places=places,
                data_dir=settings.data_dir,
                environment=_environment(config, {**overrides, "data_dir": folder}),
                flux_address=settings.flux.address,
                follow=follow,
            )
        )


def _tell_if_flux_is_missing(names: list[str], address: str) -> None:
    """Said at once: without Flux the others come up and wait."""
    if "flux" in names:
        return
    from aither_sdk.addresses import split_address

    try:
        socket.create_connection(split_address(address, "flux.address"), _PROBE_S).close()
    except OSError:
        who = " and ".join(names)
        verb = "waits" if len(names) == 1 else "wait"
        told = f"{who} {verb} for Flux: nobody listens at {address}, and --only leaves it out"
        typer.echo(f"{told}; start it, or set flux.address", err=True)


def _nats(settings: Settings, names: Sequence[str], data_dir: Path) -> NatsPlace | None:
    """The nats-server that Flux needs, unless somebody said where there is one."""
    flux = settings.flux
    wanted = "flux" in names and flux.log == "jetstream"
    if not wanted or "nats_url" in flux.model_fields_set:
        return None
    from aither_cli.nats_server import nats_place

    return nats_place(settings.port_base, data_dir)


def _settle(
    config: Path | None, data_dir: str | None, port_base: int | None, log: str | None
) -> tuple[Settings, dict[str, Any]]:
    """The settings, every port known, and what has to be said to the children to get the same.

    The parent has to know all ports, so a port of 0 is chosen here and not by the service.
    """
    from aither_cli.options import settings_of
    from aither_cli.ports import free_base

    given: dict[str, Any] = {"data_dir": data_dir, "port_base": port_base}
    given = {key: value for key, value in given.items() if value is not None}
    if log is not None:
        given["flux"] = {"log": log}
    settings = settings_of(config, **{"port_base": None, **given})
    if settings.port_base == 0:
        given["port_base"] = free_base()
        settings = settings_of(config, **given)
    picked = _picked(settings)
    for name, ports in picked.items():
        given[name] = {**given.get(name, {}), **ports}
    return (settings_of(config, **{"port_base": None, **given}) if picked else settings), given


def _picked(settings: Settings) -> dict[str, dict[str, int]]:
    """Free ports for those that the settings leave to chance."""
    picked: dict[str, dict[str, int]] = {}
    held: list[socket.socket] = []
    for name in NAMES:
        section = getattr(settings, name)
        for key in ("port", "health_port"):
            if getattr(section, key, None) == 0:
                probe = socket.create_server(("127.0.0.1", 0))
                held.append(probe)  # until all are picked, so that none is picked twice
                picked.setdefault(name, {})[key] = probe.getsockname()[1]
    for probe in held:
        probe.close()
    return picked


def _environment(config: Path | None, overrides: Mapping[str, Any]) -> dict[str, str]:
    """Of the children: ours, and what the command line said, which goes above the settings file."""
    environment = dict(os.environ)
    if config is not None:
        environment["AITHER_CONFIG"] = str(config.absolute())
    for key, value in overrides.items():
        if isinstance(value, Mapping):
            for name, inner in value.items():
                told = json.dumps(inner) if isinstance(inner, list) else str(inner)
                environment[f"AITHER_{key}__{name}".upper()] = told
        else:
            environment[f"AITHER_{key}".upper()] = str(value)
    environment["PYTHONUNBUFFERED"] = "1"
    if sys.path[0] not in ("", os.getcwd()):
        # `python -m` puts the working directory first; a logging.py of the user's would be ours.
        environment["PYTHONSAFEPATH"] = "1"
    return environment
