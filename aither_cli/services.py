"""The services of the house: what they are called, whether they are here, where they listen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from aither_cli.failures import USAGE, Failure

if TYPE_CHECKING:
    from aither_sdk.settings import Settings

NAMES = ("flux", "sense", "pulse", "genesis", "constellation")
"""In the order of start, Flux first, for all others dial it; they stop in the reverse order."""

_ANY_HOST = {"0.0.0.0": "127.0.0.1", "::": "::1"}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a service listens."""

    name: str
    bind: str
    port: int | None
    """Data port; None: it has none."""
    health_port: int

    @property
    def address(self) -> str:
        """host:port to dial; empty where there is no data port."""
        return "" if self.port is None else self._dialled(self.port)

    @property
    def health_address(self) -> str:
        return self._dialled(self.health_port)

    def _dialled(self, port: int) -> str:
        host = _ANY_HOST.get(self.bind, self.bind)
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def module_of(name: str) -> str:
    """The package that `python -m` runs."""
    return f"{name}_svc"


def installed() -> list[str]:
    """Those of `NAMES` that this installation has."""
    return [name for name in NAMES if _is_here(module_of(name))]


def chosen(only: str | None) -> list[str]:
    """The installed services, or those of a comma-separated list, in the order of `NAMES`.

    Raises Failure naming what does not exist or is not installed.
    """
    here = installed()
    if only is None:
        return here
    wanted = [name.strip() for name in only.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in NAMES]
    missing = [name for name in wanted if name in NAMES and name not in here]
    if unknown or not wanted:
        told = f"there is no service {_quoted(unknown)}" if unknown else "--only names no service"
        raise Failure(f"{told}; choose from {', '.join(here)}", exit_code=USAGE)
    if missing:
        told = f"{', '.join(missing)}: not part of this installation; choose from {', '.join(here)}"
        raise Failure(told, exit_code=USAGE)
    return [name for name in here if name in wanted]


def place_of(name: str, settings: Settings) -> Place:
    """Where the settings say that the service listens."""
    section = getattr(settings, name)
    bind = getattr(section, "bind", "127.0.0.1")
    return Place(name, bind, getattr(section, "port", None), section.health_port)


def _is_here(module: str) -> bool:
    try:
        return find_spec(f"{module}.__main__") is not None
    except ModuleNotFoundError:
        return False


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)
