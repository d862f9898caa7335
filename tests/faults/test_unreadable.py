"""Bytes that are no request, sent to every RPC there is: each is refused as a bad request is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from grpc_health.v1 import health_pb2

from aither.flux.v1 import consumer_service_pb2, flux_service_pb2
from aither.pulse.v1 import pulse_service_pb2
from aither_sdk.channels import open_channel
from aither_sdk.decoding import REASON
from aither_sdk.errors import InvalidArgument
from aither_sdk.rpc_status import from_rpc_error
from tests.processes import ServiceProcess, running

JUNK = b"\xff\xff\xff\xff"
HEALTH = health_pb2.DESCRIPTOR


def methods(*files: Any) -> list[MethodDescriptor]:
    services = [service for file in files for service in file.services_by_name.values()]
    return [method for service in services for method in service.methods]


FLUX = methods(flux_service_pb2.DESCRIPTOR, consumer_service_pb2.DESCRIPTOR, HEALTH)
PULSE = methods(pulse_service_pb2.DESCRIPTOR, HEALTH)


@pytest.fixture(scope="module")
def flux(tmp_path_factory: Any) -> Iterator[ServiceProcess]:
    with running("flux_svc", tmp_path_factory.mktemp("flux")) as process:
        yield process


@pytest.fixture(scope="module")
def pulse(tmp_path_factory: Any, flux: ServiceProcess) -> Iterator[ServiceProcess]:
    settings = {"AITHER_FLUX__PORT": str(flux.port)}
    with running("pulse_svc", tmp_path_factory.mktemp("pulse"), **settings) as process:
        yield process


def name(method: MethodDescriptor) -> str:
    return str(method.full_name)


@pytest.mark.parametrize("method", FLUX, ids=name)
async def test_flux_refuses_what_is_no_request(
    flux: ServiceProcess, method: MethodDescriptor
) -> None:
    await refuses(flux.address, method)
    assert_quiet(flux)


@pytest.mark.parametrize("method", PULSE, ids=name)
async def test_pulse_refuses_what_is_no_request(
    pulse: ServiceProcess, method: MethodDescriptor
) -> None:
    await refuses(pulse.address, method)
    assert_quiet(pulse)


@pytest.mark.parametrize("method", methods(HEALTH), ids=name)
async def test_a_witness_refuses_what_is_no_request(
    flux: ServiceProcess, method: MethodDescriptor
) -> None:
    await refuses(flux.health_address, method)
    assert_quiet(flux)


def assert_quiet(process: ServiceProcess) -> None:
    assert "Traceback" not in process.log
    assert "rpc.defect" not in process.log


async def refuses(address: str, method: MethodDescriptor) -> None:
    async with open_channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await called(channel, method)
    error = from_rpc_error(caught.value)
    assert isinstance(error, InvalidArgument), caught.value
    assert error.reason == REASON
    assert method.input_type.full_name in error.message
    assert "Traceback" not in error.message


async def called(channel: Any, method: MethodDescriptor) -> None:
    service, _, rpc = str(method.full_name).rpartition(".")
    path = f"/{service}/{rpc}"
    if method.client_streaming:
        async for _ in channel.stream_stream(path)(iter([JUNK]), timeout=30):
            pass
    elif method.server_streaming:
        async for _ in channel.unary_stream(path)(JUNK, timeout=30):
            pass
    else:
        await channel.unary_unary(path)(JUNK, timeout=30)
