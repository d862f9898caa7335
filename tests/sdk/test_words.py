"""What the SDK says in a program that set up no logging of ours."""

from __future__ import annotations

import asyncio
import logging

import pytest
import structlog

from aither.flux.v1.event_pb2 import Event
from aither_sdk.consumers import new_consumer
from aither_sdk.words import Words
from aither_sdk.working.worker import Worker
from tests.sdk.group_stub import GroupStub


@pytest.fixture(autouse=True)
def _a_plain_program() -> None:
    structlog.reset_defaults()


def test_a_plain_program_hears_warnings_through_the_standard_library(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    Words("aither_sdk").warning("worker.disconnected", consumer="packing", code=None)
    assert [(r.name, r.levelno, r.getMessage()) for r in caplog.records] == [
        ("aither_sdk", logging.WARNING, "worker.disconnected consumer=packing")
    ]
    assert capfd.readouterr().out == ""


def test_structlog_is_used_where_the_program_set_it_up() -> None:
    with structlog.testing.capture_logs() as told:
        Words("aither_sdk").info("worker.rejoined", attempts=1)
    assert told == [{"event": "worker.rejoined", "attempts": 1, "log_level": "info"}]


async def test_a_failing_handler_tells_its_error_and_line_and_no_values_of_variables(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    attempts = asyncio.Semaphore(0)

    async def pack(_event: Event) -> None:
        card = "".join(("card ", "4711"))
        attempts.release()
        raise ValueError("no such customer" if card else "")

    async with GroupStub() as flux:
        flux.add(Event(id="1", source="shop", subject="job.one"))
        group = new_consumer("workers", ["job.>"], backoff_s=[0.05])
        async with Worker(flux.address, group, pack), asyncio.timeout(10):
            await attempts.acquire()
            await attempts.acquire()
    first, second = (r for r in caplog.records if "worker.handler_failed" in r.getMessage())
    assert "error=ValueError: no such customer" in first.getMessage()
    assert (first.exc_info is None, second.exc_info is None) == (False, True)
    assert 'raise ValueError("no such' in caplog.text
    assert "card 4711" not in caplog.text
    assert capfd.readouterr().out == ""
