"""Where settings come from: file, environment and command line, read once and checked together."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsError,
)

from aither_sdk.errors import ConfigError, Fault
from aither_sdk.fault_words import no_such_key
from aither_sdk.settings import ENV_PREFIX, LOOPBACK_PREFIXES, Settings
from aither_sdk.yaml_file import YamlFile, dotted, load_yaml

CONFIG_ENV = "AITHER_CONFIG"
"""Path of the configuration file, where no command-line option names one."""
DEFAULT_CONFIG = Path("aither.yaml")
_TRUE = (True, "true", "True", "1", "yes", "on", 1)


def load_settings(
    config: Path | None = None, overrides: Mapping[str, Any] | None = None
) -> Settings:
    """Reads every source once and checks them together. Blocking file I/O.

    `config`: None takes AITHER_CONFIG, else `aither.yaml` where that exists. `overrides`: nested
    mapping of what the command line said. Raises ConfigError with all faults, each with its file
    and line or its variable, and what would be right.
    """
    source = _config_file(config)
    file = load_yaml(source) if source is not None else None
    data = {} if file is None or file.data is None else file.data
    if file is not None and not isinstance(data, Mapping):
        raise ConfigError([file.fault((), "not a mapping; begin with a section such as `flux:`")])
    given = dict(overrides or {})
    faults: list[Fault] = []
    try:
        environment = EnvSettingsSource(Settings)()
        faults = _unknown_sections() + _open_binds(_merged(data, environment, given), file)
        settings = _reading(data)(**given)
    except SettingsError as error:
        told = f"{error}; set single keys, such as AITHER_FLUX__PORT=7401"
        raise ConfigError([Fault("environment", None, "", told)]) from error
    except ValidationError as error:
        faults += [_fault(details, file, environment, given) for details in error.errors()]
        raise ConfigError(faults) from None
    if faults:
        raise ConfigError(faults)
    return settings


def _unknown_sections() -> list[Fault]:
    """Variables such as AITHER_FLUXX__LOG, which nobody would read."""
    known = sorted(Settings.model_fields)
    faults = []
    for name in sorted(os.environ):
        section, nested, _ = name.removeprefix(ENV_PREFIX).partition("__")
        if name.startswith(ENV_PREFIX) and nested and section.lower() not in known:
            faults.append(Fault("environment", None, name, no_such_key(section.lower(), known)))
    return faults


def _open_binds(values: Mapping[str, Any], file: YamlFile | None) -> list[Fault]:
    """Addresses that would be open to the network in plaintext without anybody having agreed."""
    security = values.get("security")
    if isinstance(security, Mapping) and security.get("allow_plaintext") in _TRUE:
        return []
    faults = []
    for section in ("flux", "pulse", "sense", "genesis", "constellation"):
        served = values.get(section)
        bind = served.get("bind") if isinstance(served, Mapping) else None
        if isinstance(bind, str) and not bind.startswith(LOOPBACK_PREFIXES):
            told = (
                f'"{bind}" is not loopback and there is no TLS; use 127.0.0.1, or set '
                "security.allow_plaintext: true on a network that you trust"
            )
            key = (section, "bind")
            faults.append(
                Fault("settings", None, dotted(key), told)
                if file is None
                else file.fault(key, told)
            )
    return faults


def _reading(data: Mapping[str, Any]) -> type[Settings]:
    """`Settings` that also reads `data`, the content of the file, below the environment."""

    class FileSettings(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            file_settings = InitSettingsSource(settings_cls, init_kwargs=dict(data))
            return init_settings, env_settings, file_settings

    return FileSettings


def _merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings laid over each other, the last on top."""
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            below = result.get(key)
            both = isinstance(below, Mapping) and isinstance(value, Mapping)
            result[key] = _merged(below, value) if both else value  # type: ignore[arg-type]
    return result


def _config_file(config: Path | None) -> Path | None:
    if config is not None:
        return config
    if named := os.environ.get(CONFIG_ENV):
        return Path(named)
    return DEFAULT_CONFIG if DEFAULT_CONFIG.exists() else None


def _fault(
    details: ErrorDetails,
    file: YamlFile | None,
    environment: Mapping[str, Any],
    overrides: Mapping[str, Any],
) -> Fault:
    key = tuple(details["loc"])
    message = _message(details, key)
    if _holds(overrides, key):
        return Fault("command line", None, dotted(key), message)
    if _holds(environment, key):
        return Fault("environment", None, ENV_PREFIX + "__".join(map(str, key)).upper(), message)
    if file is not None:
        return file.fault(key, message)
    return Fault("settings", None, dotted(key), message)


def _holds(values: Any, key: tuple[int | str, ...]) -> bool:
    for part in key:
        if not isinstance(values, Mapping) or part not in values:
            return False
        values = values[part]
    return bool(key)


def _message(details: ErrorDetails, key: tuple[int | str, ...]) -> str:
    if details["type"] == "extra_forbidden":
        return no_such_key(key[-1], _known_keys(key[:-1]))
    message = details["msg"].removeprefix("Value error, ")
    value = details["input"]
    shown = "" if isinstance(value, Mapping) or not key else f" (got {value!r})"
    return message[0].lower() + message[1:] + shown


def _known_keys(section: tuple[int | str, ...]) -> list[str]:
    model: type[BaseModel] = Settings
    for part in section:
        annotation = model.model_fields[str(part)].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return sorted(model.model_fields)
