"""Ask over the bus and wait for the answer; whoever follows the subject may give it.

.venv/bin/python examples/05_request_reply.py
"""

from __future__ import annotations

import asyncio

from aither_sdk import Publisher, Subscriber, fields_of, load_settings
from aither_sdk.errors import NotFound
from aither_sdk.requests import Requester, refuse, reply

FLUX = load_settings().flux.address
STOCK = {"apple": 7, "pear": 0}


async def warehouse(questions: Subscriber, publisher: Publisher) -> None:
    async for event in questions:
        item = fields_of(event)["item"]
        if item in STOCK:
            await reply(publisher, event, {"left": STOCK[item]})
        else:
            await refuse(publisher, event, NotFound(f"we never had a {item}"))


async def main() -> None:
    async with (
        Publisher(FLUX, source="shop") as publisher,
        Subscriber(FLUX, ["demo.stock"]) as questions,
        Requester(FLUX, publisher) as requester,
        asyncio.TaskGroup() as tasks,
    ):
        await questions.until_started(timeout_s=10)
        service = tasks.create_task(warehouse(questions, publisher))
        for item in ("apple", "pear", "unicorn"):
            try:
                answer = await requester.request("demo.stock", {"item": item}, timeout_s=5)
                print(f"{item}: {fields_of(answer)['left']:g} left")
            except NotFound as error:
                print(f"{item}: {error}")
        service.cancel()


asyncio.run(main())
