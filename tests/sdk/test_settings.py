from __future__ import annotations

from pathlib import Path

import pytest

from aither_sdk.errors import ConfigError
from aither_sdk.settings_sources import load_settings


def write(folder: Path, text: str) -> Path:
    path = folder / "aither.yaml"
    path.write_text(text)
    return path


def test_ports_follow_the_base() -> None:
    settings = load_settings(overrides={"port_base": 9000})
    assert (settings.flux.port, settings.pulse.port, settings.sense.port) == (9001, 9002, 9003)
    assert settings.constellation.port == 9080
    assert settings.genesis.health_port == 9104
    assert settings.flux.address == "127.0.0.1:9001"


def test_command_line_wins_over_environment_over_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, "flux: {max_hops: 3, ring_events: 10}\npulse: {max_checks: 5}\n")
    monkeypatch.setenv("AITHER_FLUX__MAX_HOPS", "4")
    monkeypatch.setenv("AITHER_PULSE__MAX_CHECKS", "6")
    settings = load_settings(path, {"flux": {"max_hops": 5}})
    assert settings.flux.max_hops == 5
    assert settings.pulse.max_checks == 6
    assert settings.flux.ring_events == 10


def test_the_file_can_be_named_by_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, "flux: {log: memory}\n")
    monkeypatch.setenv("AITHER_CONFIG", str(path))
    assert load_settings().flux.log == "memory"


def test_five_mistakes_are_five_faults_each_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(
        tmp_path,
        "flux:\n  prot: 1\n  port: 99999\n  bind: 0.0.0.0\npulse:\n  max_checks: many\n",
    )
    monkeypatch.setenv("AITHER_FLUX__MAX_HOPS", "zero")
    with pytest.raises(ConfigError) as caught:
        load_settings(path)
    told = [str(fault) for fault in caught.value.faults]
    assert len(told) == 5
    assert any(f'{path}:2: flux.prot: no such key; did you mean "port"?' in t for t in told)
    assert any(f"{path}:3: flux.port: " in t and "65535" in t for t in told)
    assert any(f"{path}:4: flux.bind: " in t and "allow_plaintext" in t for t in told)
    assert any(f"{path}:6: pulse.max_checks: " in t for t in told)
    assert any("environment: AITHER_FLUX__MAX_HOPS: " in t for t in told)


def test_an_open_address_is_refused_unless_agreed_to(tmp_path: Path) -> None:
    agreed = "security: {allow_plaintext: true}\nflux: {bind: 0.0.0.0}\n"
    assert load_settings(write(tmp_path, agreed)).flux.bind == "0.0.0.0"
    with pytest.raises(ConfigError, match="not loopback"):
        load_settings(write(tmp_path, "flux: {bind: 0.0.0.0}\n"))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("- a\n", "not a mapping"),
        ("flux: [\n", "not YAML"),
        ("flux: {port: 1}\nflux: {port: 2}\n", "a second time"),
        ("flux: 7\n", "flux"),
        ("a: &a [*a]\n", "contains itself"),
    ],
)
def test_what_is_no_configuration_is_told_with_its_place(
    tmp_path: Path, text: str, told: str
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=told) as caught:
        load_settings(path)
    assert caught.value.faults[0].file == str(path)
    assert caught.value.faults[0].line is not None


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read"):
        load_settings(tmp_path / "none.yaml")


def test_a_variable_of_a_section_that_does_not_exist_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AITHER_FLUXX__LOG", "memory")
    with pytest.raises(ConfigError, match=r'AITHER_FLUXX__LOG: no such key; did you mean "flux"'):
        load_settings()


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    assert load_settings(write(tmp_path, "# nothing\n")).flux.port == 7401


def test_secrets_are_not_printed(tmp_path: Path) -> None:
    settings = load_settings(write(tmp_path, "genesis: {llm: {api_key: sesame}}\n"))
    assert "sesame" not in repr(settings)
    assert settings.genesis.llm.api_key.get_secret_value() == "sesame"
