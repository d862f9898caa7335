"""Nonsense in, clear answers out: each bad request is refused with what would be right."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage

from aither.flux.v1 import consumer_service_pb2, consumer_service_pb2_grpc, flux_service_pb2_grpc
from aither.flux.v1 import flux_service_pb2 as pb
from aither.flux.v1.event_pb2 import Event
from aither_sdk.channels import open_channel
from aither_sdk.errors import AitherError
from aither_sdk.rpc_status import from_rpc_error
from tests.ports import free_ports
from tests.processes import ServiceProcess, running


@pytest.fixture(scope="module")
def flux(tmp_path_factory: Any) -> Iterator[ServiceProcess]:
    with running("flux_svc", tmp_path_factory.mktemp("flux")) as process:
        yield process


@pytest.fixture
async def stub(flux: ServiceProcess) -> AsyncIterator[Any]:
    async with open_channel(flux.address) as channel:
        yield flux_service_pb2_grpc.FluxServiceStub(channel)


def event(**fields: Any) -> Event:
    return Event(**{"subject": "a.b", "source": "s", "id": os.urandom(8).hex(), **fields})


async def refusal(call: Any) -> AitherError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    error = from_rpc_error(caught.value)
    assert "Traceback" not in error.message
    return error


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        ({"subject": ""}, "events[0].subject"),
        ({"subject": "Has.Capitals"}, "events[0].subject"),
        ({"subject": "a.*"}, "events[0].subject"),
        ({"subject": ".".join("a" * 17)}, "events[0].subject"),
        ({"subject": "a" * 256}, "events[0].subject"),
        ({"id": ""}, "events[0].id"),
        ({"id": "x" * 129}, "events[0].id"),
        ({"source": ""}, "events[0].source"),
        ({"headers": {"Upper": "x"}}, "events[0].headers"),
        ({"headers": {f"k{n}": "v" for n in range(33)}}, "events[0].headers"),
    ],
)
async def test_a_bad_event_is_refused_with_its_field(stub: Any, bad: Any, field: str) -> None:
    error = await refusal(stub.Publish(pb.PublishRequest(events=[event(**bad)])))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert [violation.field for violation in error.violations] == [field]


async def test_every_fault_of_a_batch_is_told_and_nothing_of_it_is_stored(stub: Any) -> None:
    before = (await stub.GetStreamInfo(pb.GetStreamInfoRequest())).last_sequence
    batch = [event(), event(subject="BAD"), event(id="")]
    error = await refusal(stub.Publish(pb.PublishRequest(events=batch)))
    assert {violation.field for violation in error.violations} == {
        "events[1].subject",
        "events[2].id",
    }
    assert (await stub.GetStreamInfo(pb.GetStreamInfoRequest())).last_sequence == before


@pytest.mark.parametrize("count", [50, 200, 4096])
async def test_a_refusal_of_many_faults_still_fits_into_what_a_client_takes(
    stub: Any, count: int
) -> None:
    bad = [Event(subject="Not A Subject") for _ in range(count)]
    error = await refusal(stub.Publish(pb.PublishRequest(events=bad)))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    *told, rest = error.violations
    assert told[0].field == "events[0].subject"
    assert rest.description == f"and {3 * count - len(told)} more like these"


async def test_every_fault_of_a_subscription_is_told_at_once(stub: Any) -> None:
    request = pb.SubscribeRequest(
        filters=["ok.>", "a..b"], max_batch_events=9999, client_name="x" * 200
    )
    request.heartbeat_interval.seconds = 0
    request.at_time.seconds = 2**62
    error = await refusal(stub.Subscribe(request).read())
    assert {violation.field for violation in error.violations} == {
        "filters[1]",
        "max_batch_events",
        "client_name",
        "heartbeat_interval",
        "at_time",
    }
    both = await refusal(stub.Read(pb.ReadRequest(filters=["a..b"], max_events=9999)))
    assert {violation.field for violation in both.violations} == {"filters[0]", "max_events"}
    sideways = await refusal(stub.Read(pb.ReadRequest(direction=7)))  # type: ignore[arg-type]
    assert [violation.field for violation in sideways.violations] == ["direction"]


@pytest.mark.parametrize("sequence", [2**63, 2**64 - 1])
async def test_the_largest_numbers_are_places_beyond_the_end(stub: Any, sequence: int) -> None:
    answer = await stub.Read(pb.ReadRequest(from_sequence=sequence))
    assert (len(answer.events), answer.end_reached) == (0, True)
    error = await refusal(stub.Subscribe(pb.SubscribeRequest(after_sequence=sequence)).read())
    assert error.code is grpc.StatusCode.OUT_OF_RANGE


@pytest.mark.parametrize("seconds", [-62_135_596_800, -1, 253_402_300_799])
async def test_a_time_long_before_or_after_all_events_is_a_start(stub: Any, seconds: int) -> None:
    await stub.Publish(pb.PublishRequest(events=[event()]))
    request = pb.SubscribeRequest()
    request.at_time.seconds = seconds
    call = stub.Subscribe(request)
    started = (await call.read()).started
    assert started.position == (0 if seconds < 0 else started.last_sequence)
    call.cancel()


async def test_on_a_stream_a_bad_event_is_refused_alone(stub: Any) -> None:
    async def requests() -> AsyncIterator[pb.PublishStreamRequest]:
        yield pb.PublishStreamRequest(events=[event(), event(subject="BAD"), event()])

    (answer,) = [response async for response in stub.PublishStream(requests())]
    good, bad, also_good = answer.results
    assert good.sequence > 0
    assert also_good.sequence == good.sequence + 1
    assert bad.sequence == 0
    assert bad.error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert "BAD" in bad.error.message


@pytest.mark.parametrize("filters", [[""], ["a.>.b"], ["A"], ["a..b"], ["*x"], ["ok"] * 65])
async def test_a_bad_filter_is_refused_by_every_rpc_that_takes_one(stub: Any, filters: Any) -> None:
    for call in (
        stub.Subscribe(pb.SubscribeRequest(filters=filters)).read(),
        stub.Read(pb.ReadRequest(filters=filters)),
        stub.GetLast(pb.GetLastRequest(filters=filters)),
    ):
        error = await refusal(call)
        assert error.code is grpc.StatusCode.INVALID_ARGUMENT
        assert error.violations[0].field.startswith("filters")


async def test_an_empty_batch_is_refused(stub: Any) -> None:
    error = await refusal(stub.Publish(pb.PublishRequest()))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.violations[0].field == "events"


async def test_an_event_of_two_megabytes_is_refused_with_the_limit(stub: Any) -> None:
    big = event(payload=AnyMessage(type_url="x/y", value=bytes(2 * 2**20)))
    error = await refusal(stub.Publish(pb.PublishRequest(events=[big])))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert "1048576" in error.message


async def test_a_payload_of_ten_megabytes_is_refused_on_both_sides(flux: ServiceProcess) -> None:
    big = event(payload=AnyMessage(type_url="x/y", value=bytes(10 * 2**20)))
    async with open_channel(flux.address) as channel:
        stub = flux_service_pb2_grpc.FluxServiceStub(channel)
        error = await refusal(stub.Publish(pb.PublishRequest(events=[big])))
        assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    # A client without our limits is stopped by the server's.
    unlimited = (("grpc.max_send_message_length", -1),)
    async with grpc.aio.insecure_channel(flux.address, options=unlimited) as channel:
        stub = flux_service_pb2_grpc.FluxServiceStub(channel)
        error = await refusal(stub.Publish(pb.PublishRequest(events=[big])))
        assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_payload_of_an_unknown_type_passes_untouched(stub: Any) -> None:
    payload = AnyMessage(type_url="type.googleapis.com/no.such.Type", value=b"\xff\x00junk")
    answer = await stub.Publish(pb.PublishRequest(events=[event(payload=payload)]))
    sequence = answer.results[0].sequence
    page = await stub.Read(pb.ReadRequest(from_sequence=sequence, max_events=1))
    assert page.events[0].payload == payload


async def test_too_deep_a_chain_of_causes_is_refused(stub: Any) -> None:
    error = await refusal(stub.Publish(pb.PublishRequest(events=[event(hops=9)])))
    assert error.code is grpc.StatusCode.FAILED_PRECONDITION
    assert error.reason == "HOPS_EXCEEDED"


async def test_a_refusal_that_repeats_a_long_text_arrives_as_what_it_is(stub: Any) -> None:
    """More metadata than a client takes makes another error of any."""
    endless = "\N{PILE OF POO}" * 50_000
    error = await refusal(stub.Subscribe(pb.SubscribeRequest(resume_epoch=endless)).read())
    assert error.reason == "EPOCH_MISMATCH"
    wrong = pb.PublishRequest(events=[event()], expected_subject_sequences={endless: 1})
    error = await refusal(stub.Publish(wrong))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_position_of_another_log_is_refused(stub: Any) -> None:
    request = pb.SubscribeRequest(after_sequence=1, resume_epoch="another")
    error = await refusal(stub.Subscribe(request).read())
    assert error.reason == "EPOCH_MISMATCH"
    error = await refusal(stub.Subscribe(pb.SubscribeRequest(after_sequence=10**12)).read())
    assert error.code is grpc.StatusCode.OUT_OF_RANGE


async def _last_of_a_quiet_log(stub: Any) -> int:
    for _ in range(500):
        read = await stub.Read(pb.ReadRequest(filters=["runtime.flux.started"]))
        if read.events:
            return int((await stub.GetStreamInfo(pb.GetStreamInfoRequest())).last_sequence)
        await asyncio.sleep(0.01)
    raise AssertionError("Flux has not announced itself")


async def test_the_expected_last_sequence_guards_a_publish(stub: Any) -> None:
    # Flux announces itself; what is expected is looked at after that.
    last = await _last_of_a_quiet_log(stub)
    wrong = pb.PublishRequest(events=[event()], expected_last_sequence=last + 1)
    error = await refusal(stub.Publish(wrong))
    assert error.reason == "WRONG_LAST_SEQUENCE"
    right = pb.PublishRequest(events=[event()], expected_last_sequence=last)
    assert (await stub.Publish(right)).results[0].sequence == last + 1


async def test_a_policy_that_does_not_exist_is_refused(stub: Any) -> None:
    slow = pb.SubscribeRequest.FromString(b"\x60\x09")  # slow_policy = 9
    error = await refusal(stub.Subscribe(slow).read())
    assert error.violations[0].field == "slow_policy"
    many = pb.GetStreamInfoRequest(max_subscriptions=1001)
    error = await refusal(stub.GetStreamInfo(many))
    assert error.violations[0].field == "max_subscriptions"


@pytest.mark.parametrize("heartbeat_s", [0, 301])
async def test_a_heartbeat_out_of_range_is_refused(stub: Any, heartbeat_s: int) -> None:
    request = pb.SubscribeRequest()
    request.heartbeat_interval.FromSeconds(heartbeat_s)
    request.heartbeat_interval.SetInParent()
    error = await refusal(stub.Subscribe(request).read())
    assert error.violations[0].field == "heartbeat_interval"


async def test_an_rpc_that_does_not_exist_is_unimplemented(flux: ServiceProcess) -> None:
    async with open_channel(flux.address) as channel:
        unknown: Any = channel.unary_unary("/aither.flux.v1.FluxService/NoSuchRpc")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await unknown(b"")
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_garbage_on_the_port_does_no_harm(flux: ServiceProcess) -> None:
    for junk in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(4096), b""):
        with socket.create_connection(("127.0.0.1", flux.port), timeout=5) as connection:
            connection.sendall(junk)
    assert flux.health("readiness") == "SERVING"


def start(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    ports = free_ports(2)
    return subprocess.run(
        [sys.executable, "-m", "flux_svc", "--data-dir", str(folder)],
        env={
            **os.environ,
            "AITHER_FLUX__PORT": str(ports[0]),
            "AITHER_FLUX__HEALTH_PORT": str(ports[1]),
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_taken_port_is_told_in_one_line(flux: ServiceProcess, tmp_path: Path) -> None:
    ended = start(tmp_path, AITHER_FLUX__PORT=str(flux.port))
    assert ended.returncode == 2
    assert f"cannot listen at 127.0.0.1:{flux.port}: Address already in use" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_data_folder_that_is_in_use_is_told(flux: ServiceProcess) -> None:
    ended = start(flux.data_dir)
    assert ended.returncode == 2
    assert str(flux.data_dir) in ended.stderr
    assert "Traceback" not in ended.stderr


def test_an_unusable_data_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    ended = start(tmp_path / "file" / "below")
    assert ended.returncode == 2
    assert str(tmp_path / "file") in ended.stderr
    assert "Traceback" not in ended.stderr


def test_five_mistakes_in_the_configuration_are_five_lines(tmp_path: Path) -> None:
    config = tmp_path / "aither.yaml"
    config.write_text(
        "flux:\n  prot: 1\n  log: papyrus\n  bind: 0.0.0.0\npulse:\n  max_checks: many\nsens: {}\n"
    )
    ended = start(tmp_path, AITHER_CONFIG=str(config))
    assert ended.returncode == 2
    lines = ended.stderr.strip().splitlines()
    assert len(lines) == 5
    assert all(line.startswith(f"flux: {config}:") for line in lines)


@pytest.mark.parametrize("path", ["Publish", "PublishStream"])
async def test_millions_of_empty_events_are_refused_by_their_number(
    flux: ServiceProcess, path: str
) -> None:
    many = b"\x0a\x00" * 2_000_000
    async with open_channel(flux.address) as channel:
        untyped: Any = channel
        method = f"/aither.flux.v1.FluxService/{path}"
        if path == "Publish":
            call = untyped.unary_unary(method)(many, timeout=30)
        else:
            call = untyped.stream_stream(method)(iter([many]), timeout=30).read()
        error = await refusal(call)
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert "2000000 events; a batch has 4096 at most" in error.message


async def test_a_mask_of_millions_of_paths_is_refused_by_their_number(flux: ServiceProcess) -> None:
    async with open_channel(flux.address) as channel:
        groups: Any = consumer_service_pb2_grpc.ConsumerServiceStub(channel)
        masked = consumer_service_pb2.Consumer(name="masked", filters=["a.b"])
        await groups.CreateConsumer(consumer_service_pb2.CreateConsumerRequest(consumer=masked))
        update = consumer_service_pb2.UpdateConsumerRequest(consumer=masked)
        update.update_mask.paths.extend(["x"] * 100_000)
        error = await refusal(groups.UpdateConsumer(update))
        assert [one.field for one in error.violations] == ["update_mask.paths"]
        waiting = consumer_service_pb2.Consumer(name="waiting", filters=["a.b"])
        for _ in range(100_000):
            waiting.backoff_durations.add(seconds=-1)
        create = consumer_service_pb2.CreateConsumerRequest(consumer=waiting)
        error = await refusal(groups.CreateConsumer(create))
        assert "100000 waits; 32 at most" in error.message
