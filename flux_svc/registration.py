"""How the services meet the wire: which RPCs speak messages and which speak bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import grpc

from aither.flux.v1 import consumer_service_pb2, consumer_service_pb2_grpc
from aither.flux.v1 import flux_service_pb2 as pb
from flux_svc.consumer_servicer import ConsumerServicer
from flux_svc.consuming import Consuming
from flux_svc.drafts import Arrival, publish_request
from flux_svc.servicer import FluxServicer

FLUX_SERVICE = pb.DESCRIPTOR.services_by_name["FluxService"].full_name
CONSUMER_SERVICE = consumer_service_pb2.DESCRIPTOR.services_by_name["ConsumerService"].full_name
SERVICES = (FLUX_SERVICE, CONSUMER_SERVICE)


def add_flux(servicer: FluxServicer, consuming: Consuming) -> Callable[[grpc.aio.Server], None]:
    """Registers FluxService. The generated registration cannot: it encodes every response, and here
    responses with events are joined from frames that were encoded when they were stored, and those
    of publish streams written by hand; what those streams bring is kept as bytes."""
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Publish": grpc.unary_unary_rpc_method_handler(
            servicer.Publish,
            request_deserializer=publish_request,
            response_serializer=pb.PublishResponse.SerializeToString,
        ),
        "PublishStream": grpc.stream_stream_rpc_method_handler(
            servicer.PublishStream,
            request_deserializer=Arrival,
            response_serializer=None,
        ),
        "Subscribe": grpc.unary_stream_rpc_method_handler(
            servicer.Subscribe,
            request_deserializer=pb.SubscribeRequest.FromString,
            response_serializer=None,
        ),
        "Consume": grpc.stream_stream_rpc_method_handler(
            consuming.Consume,
            request_deserializer=pb.ConsumeRequest.FromString,
            response_serializer=None,
        ),
        "Read": grpc.unary_unary_rpc_method_handler(
            servicer.Read,
            request_deserializer=pb.ReadRequest.FromString,
            response_serializer=None,
        ),
        "GetLast": grpc.unary_unary_rpc_method_handler(
            servicer.GetLast,
            request_deserializer=pb.GetLastRequest.FromString,
            response_serializer=None,
        ),
        "GetStreamInfo": grpc.unary_unary_rpc_method_handler(
            servicer.GetStreamInfo,
            request_deserializer=pb.GetStreamInfoRequest.FromString,
            response_serializer=pb.GetStreamInfoResponse.SerializeToString,
        ),
    }

    def register(server: grpc.aio.Server) -> None:
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(FLUX_SERVICE, handlers),)
        )

    return register


def add_consumer_service(servicer: ConsumerServicer) -> Callable[[grpc.aio.Server], None]:
    """Registers ConsumerService."""
    typed = cast(consumer_service_pb2_grpc.ConsumerServiceServicer, servicer)

    def register(server: grpc.aio.Server) -> None:
        consumer_service_pb2_grpc.add_ConsumerServiceServicer_to_server(typed, server)

    return register
