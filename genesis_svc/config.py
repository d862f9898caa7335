"""Everything Genesis reads from files at its start, with all faults of all files at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from aither_sdk.errors import ConfigError, Fault
from aither_sdk.settings import GenesisSettings
from genesis_svc.agents_file import AgentSpec, load_agents
from genesis_svc.neurons import NeuronSpec
from genesis_svc.routines import RoutineSpec
from genesis_svc.timers_file import load_neurons, load_routines


@dataclass(frozen=True, slots=True)
class Config:
    """What was read."""

    agents: tuple[AgentSpec, ...]
    routines: tuple[RoutineSpec, ...]
    neurons: tuple[NeuronSpec, ...]


def shipped(name: str) -> Path:
    """A file or folder of the shipped config/: beside the packages in the source tree, inside of
    this package where it was installed from a wheel."""
    here = Path(__file__).parent
    inside = here / "config" / name
    return inside if inside.exists() else here.parent / "config" / name


def load_config(settings: GenesisSettings) -> Config:
    """Reads all of it. Blocking file I/O. Raises ConfigError with every fault."""
    faults: list[Fault] = []
    agents = load_agents(settings.agents or shipped("agents"), faults)
    routines_path = _routines_path(settings)
    routines: tuple[RoutineSpec, ...] = ()
    if routines_path is not None:
        routines = load_routines(routines_path, None if faults else agents, faults)
    neurons = load_neurons(settings.neurons or shipped("neurons.yaml"), faults)
    if faults:
        raise ConfigError(faults)
    return Config(agents, routines, neurons)


def _routines_path(settings: GenesisSettings) -> Path | None:
    """The shipped routines are for the shipped agents: with agents of one's own there are none
    until a file is named."""
    if settings.routines is None and settings.agents is not None:
        return None
    return settings.routines or shipped("routines.yaml")
