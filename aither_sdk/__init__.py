"""The runtime under every Aither service, and the client library for services of your own.

A service in a few lines:

    async def main(life: Life) -> None:
        async with life.publisher() as publisher, life.subscriber(["pulse.>"]) as events:
            life.serving()
            async for event in events:
                await publisher.publish("demo.seen", {"subject": event.subject})

    run("demo", main)

The names below are loaded when first used, so that importing one room does not open the house.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aither_sdk.breaker import BreakerRules
    from aither_sdk.bulkhead import Bulkhead
    from aither_sdk.channels import open_channel
    from aither_sdk.consumers import Consumers, new_consumer
    from aither_sdk.dependency import Dependency
    from aither_sdk.errors import AitherError, ConfigError
    from aither_sdk.events import fields_of, new_event, payload_of
    from aither_sdk.lifecycle import Life, run
    from aither_sdk.publishing.publisher import Publisher
    from aither_sdk.requests import Requester, refuse, reply
    from aither_sdk.settings import Settings
    from aither_sdk.settings_sources import load_settings
    from aither_sdk.stalls.watch import Watch, watch
    from aither_sdk.subscribing.subscriber import (
        EARLIEST,
        LAST_PER_SUBJECT,
        NEW,
        Subscriber,
        after,
        at,
    )
    from aither_sdk.tasks import BoundedTasks
    from aither_sdk.working.worker import Park, Retry, Worker, current_delivery

_HOMES = {
    "AitherError": "errors",
    "BoundedTasks": "tasks",
    "BreakerRules": "breaker",
    "Bulkhead": "bulkhead",
    "ConfigError": "errors",
    "Consumers": "consumers",
    "Dependency": "dependency",
    "EARLIEST": "subscribing.subscription",
    "LAST_PER_SUBJECT": "subscribing.subscription",
    "Life": "lifecycle",
    "NEW": "subscribing.subscription",
    "Park": "working.worker",
    "Publisher": "publishing.publisher",
    "Requester": "requests",
    "Retry": "working.worker",
    "Settings": "settings",
    "Subscriber": "subscribing.subscriber",
    "Watch": "stalls.watch",
    "Worker": "working.worker",
    "after": "subscribing.subscription",
    "at": "subscribing.subscription",
    "current_delivery": "working.worker",
    "fields_of": "events",
    "load_settings": "settings_sources",
    "new_consumer": "consumers",
    "new_event": "events",
    "open_channel": "channels",
    "payload_of": "events",
    "refuse": "requests",
    "reply": "requests",
    "run": "lifecycle",
    "watch": "stalls.watch",
}

__all__ = [
    "EARLIEST",
    "LAST_PER_SUBJECT",
    "NEW",
    "AitherError",
    "BoundedTasks",
    "BreakerRules",
    "Bulkhead",
    "ConfigError",
    "Consumers",
    "Dependency",
    "Life",
    "Park",
    "Publisher",
    "Requester",
    "Retry",
    "Settings",
    "Subscriber",
    "Watch",
    "Worker",
    "after",
    "at",
    "current_delivery",
    "fields_of",
    "load_settings",
    "new_consumer",
    "new_event",
    "open_channel",
    "payload_of",
    "refuse",
    "reply",
    "run",
    "watch",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
