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
    from aither_sdk.channels import open_channel
    from aither_sdk.consumers import new_consumer
    from aither_sdk.errors import AitherError, ConfigError
    from aither_sdk.events import fields_of, payload_of
    from aither_sdk.lifecycle import Life, run
    from aither_sdk.publisher import Publisher
    from aither_sdk.settings import Settings, load_settings
    from aither_sdk.stalls.watch import Watch, watch
    from aither_sdk.subscriber import Subscriber
    from aither_sdk.tasks import BoundedTasks
    from aither_sdk.worker import Worker

_HOMES = {
    "AitherError": "errors",
    "BoundedTasks": "tasks",
    "ConfigError": "errors",
    "Life": "lifecycle",
    "Publisher": "publisher",
    "Settings": "settings",
    "Subscriber": "subscriber",
    "Watch": "stalls.watch",
    "Worker": "worker",
    "fields_of": "events",
    "load_settings": "settings",
    "new_consumer": "consumers",
    "open_channel": "channels",
    "payload_of": "events",
    "run": "lifecycle",
    "watch": "stalls.watch",
}

__all__ = [
    "AitherError",
    "BoundedTasks",
    "ConfigError",
    "Life",
    "Publisher",
    "Settings",
    "Subscriber",
    "Watch",
    "Worker",
    "fields_of",
    "load_settings",
    "new_consumer",
    "open_channel",
    "payload_of",
    "run",
    "watch",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
