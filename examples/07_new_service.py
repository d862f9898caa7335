"""A service of your own: health, drain, tracing and resume come with the runtime.

.venv/bin/python examples/07_new_service.py
"""

from aither_sdk import Life, run


async def greeter(life: Life) -> None:
    """Answers every demo.hello with a demo.greeted, which names it as its cause."""
    async with life.publisher() as publisher, life.subscriber(["demo.hello"]) as events:
        life.serving()
        async for event in events:
            await publisher.publish("demo.greeted", {"who": event.source})


run("greeter", greeter)
