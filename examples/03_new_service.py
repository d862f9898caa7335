"""A service of your own: health, drain, tracing and resume come with the runtime.

.venv/bin/python examples/03_new_service.py
"""

from aither_sdk import Life, run


async def greeter(life: Life) -> None:
    async with life.publisher() as publisher, life.subscriber(["demo.hello"]) as events:
        life.serving()
        life.tasks.spawn("greet", lambda: greet(events, publisher))
        await life.until_stop()


async def greet(events, publisher) -> None:  # type: ignore[no-untyped-def]
    async for event in events:
        await publisher.publish("demo.greeted", {"who": event.source})


run("greeter", greeter)
