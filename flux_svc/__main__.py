"""Flux: `python -m flux_svc`. Wiring only."""

from __future__ import annotations

from contextlib import AsyncExitStack

from google.protobuf.message import Message

from aither_sdk.events import new_event
from aither_sdk.lifecycle import Life, run
from aither_sdk.vocabulary import register_types
from flux_svc.consumer_servicer import ConsumerServicer
from flux_svc.consuming import Consuming
from flux_svc.fanout.audience import Audience
from flux_svc.fanout.hub import Hub
from flux_svc.group_metrics import observe_groups
from flux_svc.groups import open_groups
from flux_svc.logs import open_log
from flux_svc.loop_guard import LoopGuard
from flux_svc.metrics import observe, observe_retention
from flux_svc.publishing import Publishing
from flux_svc.quotas import Quotas
from flux_svc.registration import SERVICES, add_consumer_service, add_flux
from flux_svc.retention import Retention
from flux_svc.servicer import FluxServicer
from flux_svc.validation import EventRules


async def serve(life: Life) -> None:
    settings = life.settings.flux
    register_types()  # reflection on Flux's port tells what is inside the payloads
    async with AsyncExitStack() as stack:
        log = await stack.enter_async_context(
            open_log(settings, life.settings.data_dir, lambda error: life.stop(error.message))
        )
        hub = Hub(
            log.info().last_sequence,
            max_events=settings.ring_events,
            max_bytes=settings.ring_bytes,
        )
        log.on_commit(hub.commit)
        guard = LoopGuard(log, max_hops=settings.max_hops, source=life.name)
        publishing = Publishing(
            log,
            EventRules(settings.max_hops),
            quotas=Quotas.of(settings.quotas),
            guard=await stack.enter_async_context(guard),
            max_streams=settings.max_publish_streams,
            max_log_bytes=settings.quotas.max_log_bytes,
        )
        audience = Audience(settings.max_subscriptions)
        observe(log, hub, publishing, audience)
        retention = Retention(log, settings.retention)
        observe_retention(retention)
        servicer = FluxServicer(log, hub, publishing, audience, retention.statistics)
        groups = await stack.enter_async_context(open_groups(settings, life.settings.data_dir, log))
        observe_groups(groups)
        consuming = Consuming(groups, max_streams=settings.max_subscriptions)

        async def announce(subject: str, payload: Message) -> None:
            await log.append([new_event(subject, payload, source=life.name)])

        server = await stack.enter_async_context(
            life.serve(
                settings.bind,
                settings.port or 0,
                register=[
                    add_flux(servicer, consuming),
                    add_consumer_service(ConsumerServicer(groups, log)),
                ],
                services=SERVICES,
            )
        )
        # Leaving goes upward: streams are told, the server drains, then the log closes.
        stack.callback(hub.close)
        stack.callback(publishing.close)
        stack.callback(groups.drain)
        await stack.enter_async_context(retention.running())
        await stack.enter_async_context(life.announcing(announce))
        life.serving(server.address)
        await life.until_stop()


if __name__ == "__main__":
    run(
        "flux",
        serve,
        services=SERVICES,
        bind=lambda settings: settings.flux.bind,
        health_port=lambda settings: settings.flux.health_port,
    )
