"""How a group stands, as ConsumerService tells it; pure."""

from __future__ import annotations

from google.protobuf.timestamp_pb2 import Timestamp

from aither.flux.v1.consumer_service_pb2 import ConsumerMember, ConsumerState
from flux_svc.groups.local.core import GroupCore
from flux_svc.groups.local.table import Seat


def state_of(core: GroupCore, *, log_epoch: str, log_end: int, members: bool) -> ConsumerState:
    """In a log that is not its own a group has no lag: nobody knows how far behind it is."""
    lag = max(0, log_end - core.checkpoint) if core.epoch == log_epoch else 0
    return ConsumerState(
        checkpoint_sequence=core.checkpoint,
        epoch=core.epoch,
        lag_events=lag,
        outstanding_events=core.outstanding,
        parked_events=core.aside.events,
        retrying_events=core.retrying,
        leader_epoch=core.leading.epoch,
        delivered_events=core.delivered,
        acknowledged_events=core.acknowledged,
        missed_events=core.missed,
        members=[_shown(core, seat) for seat in core.seats] if members else [],
    )


def _shown(core: GroupCore, seat: Seat) -> ConsumerMember:
    connected = Timestamp()
    connected.FromNanoseconds(seat.connected_ns)
    return ConsumerMember(
        name=seat.name,
        outstanding_events=len(seat.leased),
        active=not core.rules.exclusive or seat is core.leading.active,
        connected_time=connected,
    )
