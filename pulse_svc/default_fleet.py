"""The fleet where no file is named: Aither's own services. `config/fleet.yaml` is the same, written
out for the default ports, to begin one's own from."""

from __future__ import annotations

from aither.pulse.v1.target_pb2 import Check, GrpcCheck, Target
from aither_sdk.addresses import join_address
from aither_sdk.settings import Settings
from aither_sdk.spans import MS
from pulse_svc.fleet import filled
from pulse_svc.spans import duration_of

_ANY_HOST = {"0.0.0.0": "127.0.0.1", "::": "::1", "[::]": "::1"}
"""Where a service that listens everywhere is found from its own machine."""


def default_fleet(settings: Settings) -> tuple[Target, ...]:
    """Flux by its data port; Pulse and Genesis by their witnesses, for Pulse must not call itself
    and Genesis has no data port. Services that `pulse.services` leaves out, or whose port is any
    free one and cannot be named in advance, are not in it."""
    pulse_host = _ANY_HOST.get(settings.pulse.bind, settings.pulse.bind)
    flux_address = settings.flux.address
    targets = []
    if not flux_address.endswith(":0"):
        targets.append(_service("flux", 0, flux_address))
    if settings.pulse.health_port:
        address = join_address(pulse_host, settings.pulse.health_port)
        targets.append(_service("pulse", 1, address, "flux"))
    if settings.genesis.health_port:
        address = join_address("127.0.0.1", settings.genesis.health_port)
        targets.append(_service("genesis", 2, address, "flux"))
    targets = [target for target in targets if target.name in settings.pulse.services]
    known = {target.name for target in targets}
    for target in targets:
        if not known.issuperset(target.depends_on):
            del target.depends_on[:]
    return tuple(filled(target) for target in targets)


def _service(name: str, layer: int, address: str, *depends_on: str) -> Target:
    return Target(
        name=name,
        layer=layer,
        check=Check(grpc=GrpcCheck(address=address)),
        interval=duration_of(500 * MS),
        timeout=duration_of(500 * MS),
        rise=1,
        fall=2,
        depends_on=depends_on,
    )
