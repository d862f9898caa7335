"""Every message type of Aither, registered: for those who show payloads of all services.

Reflection answers from what a process has imported, and gRPC clients ask it for the type inside an
Any. Flux never opens a payload, but must be able to say what is in one.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module

_FILES = (
    "aither.flux.v1.event_pb2",
    "aither.flux.v1.flux_service_pb2",
    "aither.flux.v1.consumer_service_pb2",
    "aither.genesis.v1.commands_pb2",
    "aither.genesis.v1.decision_pb2",
    "aither.genesis.v1.genesis_events_pb2",
    "aither.genesis.v1.task_pb2",
    "aither.pulse.v1.pulse_events_pb2",
    "aither.pulse.v1.pulse_service_pb2",
    "aither.pulse.v1.target_pb2",
    "aither.pulse.v1.vitals_pb2",
    "aither.runtime.v1.runtime_events_pb2",
    "aither.sense.v1.anomaly_pb2",
    "aither.sense.v1.sense_service_pb2",
    "google.protobuf.any_pb2",
    "google.protobuf.duration_pb2",
    "google.protobuf.empty_pb2",
    "google.protobuf.struct_pb2",
    "google.protobuf.timestamp_pb2",
    "google.protobuf.wrappers_pb2",
    "google.rpc.error_details_pb2",
)
"""`tests/sdk/test_vocabulary.py` holds it against the files of proto/."""


@cache
def register_types() -> tuple[str, ...]:
    """Full names of all message types, sorted. The first call imports them, about 10 ms."""
    names: set[str] = set()
    for file in _FILES:
        descriptor = import_module(file).DESCRIPTOR
        names.update(message.full_name for message in descriptor.message_types_by_name.values())
    return tuple(sorted(names))
