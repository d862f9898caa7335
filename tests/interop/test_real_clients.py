"""What a user sees with the tools that users have: grpcurl, buf curl, grpc_health_probe."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.interop.tools import BUILD_LIMIT_S, said, tool
from tests.processes import ServiceProcess, running

pytestmark = [pytest.mark.interop, pytest.mark.timeout(BUILD_LIMIT_S + 100)]
FLUX = "aither.flux.v1.FluxService"


@pytest.fixture(scope="module")
def flux(tmp_path_factory: Any) -> Iterator[ServiceProcess]:
    with running("flux_svc", tmp_path_factory.mktemp("flux")) as process:
        yield process


@pytest.fixture(scope="module")
def pulse(flux: ServiceProcess, tmp_path_factory: Any) -> Iterator[ServiceProcess]:
    folder = tmp_path_factory.mktemp("pulse")
    fleet = folder / "fleet.yaml"
    check = f'{{kind: grpc, address: "{flux.health_address}"}}'
    fleet.write_text(f"targets: [{{name: flux, check: {check}}}]\n")
    settings = {"AITHER_FLUX__ADDRESS": flux.address, "AITHER_PULSE__FLEET": str(fleet)}
    with running("pulse_svc", folder, **settings) as process:
        yield process


def buf_curl(address: str, method: str, data: str) -> subprocess.CompletedProcess[str]:
    url = f"http://{address}/{method}"
    return said("buf", "curl", "--http2-prior-knowledge", "--protocol", "grpc", "-d", data, url)


def objects(text: str) -> list[dict[str, Any]]:
    """JSON objects one after another, as the curls print a stream."""
    decoder, found, at = json.JSONDecoder(), [], 0
    while at < len(text):
        if text[at].isspace():
            at += 1
            continue
        try:
            one, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError:
            break  # the stream was cut inside an object
        found.append(one)
    return found


def first_events(command: list[str], limit_s: float = 20) -> list[dict[str, Any]]:
    """Lets a streaming client run until it printed events, then ends it."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    text, end_s = "", time.monotonic() + limit_s
    try:
        while time.monotonic() < end_s:
            text += process.stdout.readline()
            events = [e for message in objects(text) for e in message.get("events", [])]
            if events:
                return events
    finally:
        process.kill()
        process.communicate()
    raise AssertionError(f"no event within {limit_s} s; it printed {text!r}")


def typed(events: list[dict[str, Any]]) -> None:
    """The payload is shown with its type and its fields by name."""
    for event in events:
        assert event["subject"].startswith("pulse.")
        payload = event["payload"]
        assert payload["@type"].startswith("type.googleapis.com/aither.pulse.v1.")
        assert {"name", "tick", "host"} & set(payload), payload


def test_grpcurl_lists_services_by_reflection(flux: ServiceProcess) -> None:
    listed = said("grpcurl", "-plaintext", flux.address, "list").stdout.split()
    assert FLUX in listed
    assert "grpc.health.v1.Health" in listed
    described = said("grpcurl", "-plaintext", flux.address, "describe", FLUX).stdout
    assert "returns ( stream .aither.flux.v1.SubscribeResponse )" in described


def test_grpcurl_sees_typed_payloads(flux: ServiceProcess, pulse: ServiceProcess) -> None:
    data = '{"filters":["pulse.>"]}'
    command = [tool("grpcurl"), "-plaintext", "-d", data, flux.address, f"{FLUX}/Subscribe"]
    typed(first_events(command))


def test_buf_curl_subscribes(flux: ServiceProcess, pulse: ServiceProcess) -> None:
    command = [
        *(tool("buf"), "curl", "--http2-prior-knowledge", "--protocol", "grpc"),
        *("-d", '{"filters":["pulse.>"]}', f"http://{flux.address}/{FLUX}/Subscribe"),
    ]
    typed(first_events(command))


def test_an_error_is_rich_for_grpcurl(flux: ServiceProcess) -> None:
    data = '{"filters":["a..b"]}'
    answer = said("grpcurl", "-plaintext", "-d", data, flux.address, f"{FLUX}/GetLast")
    assert "InvalidArgument" in answer.stderr
    assert "filters[0]" in answer.stderr
    assert "google.rpc.ErrorInfo" in answer.stderr


def test_health_answers_the_kubelets_probe(flux: ServiceProcess) -> None:
    for service in ("", "liveness", "readiness", "startup", FLUX):
        probe = said("grpc-health-probe", f"-addr={flux.health_address}", f"-service={service}")
        assert probe.returncode == 0, probe.stderr
    unknown = said("grpc-health-probe", f"-addr={flux.health_address}", "-service=nobody")
    assert unknown.returncode != 0


def test_the_probe_fails_within_its_second_while_the_service_stands_still(
    flux: ServiceProcess,
) -> None:
    tool("grpc-health-probe")
    flux.signal(signal.SIGSTOP)
    try:
        time.sleep(2.5)  # the silence under test: readiness falls after two seconds of it
        begin_s = time.monotonic()
        ready = said("grpc-health-probe", f"-addr={flux.health_address}", "-service=readiness")
        alive = said("grpc-health-probe", f"-addr={flux.health_address}", "-service=liveness")
        took_s = time.monotonic() - begin_s
    finally:
        flux.signal(signal.SIGCONT)
    assert ready.returncode != 0
    assert "NOT_SERVING" in ready.stderr
    assert alive.returncode == 0
    assert took_s < 5


def test_pulse_is_asked_by_buf_curl(pulse: ServiceProcess) -> None:
    answer = buf_curl(pulse.address, "aither.pulse.v1.PulseService/ListTargets", "{}")
    assert objects(answer.stdout)[0]["targets"][0]["target"]["name"] == "flux"
