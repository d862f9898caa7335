"""Logs for people and for machines tell where it went wrong, and no secrets."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import structlog

from aither_sdk.logs import configure_logs


@pytest.fixture(autouse=True)
def logs_as_they_were() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.parametrize("log_format", ["console", "json"])
def test_a_logged_failure_shows_where_it_was_and_no_local_variables(
    log_format: str, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logs("shop", log_format=log_format)

    def handle(_payload: str) -> None:
        raise ValueError("no such customer")

    try:
        handle("".join(("card ", "4711")))
    except ValueError:
        structlog.get_logger("shop").exception("handler.failed")
    told = capsys.readouterr().err
    assert "no such customer" in told
    assert "test_logs.py" in told
    assert "card 4711" not in told
