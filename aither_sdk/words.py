"""Log lines of the SDK, which runs in programs of other people: it sets up nothing there."""

from __future__ import annotations

import logging
import sys
from typing import Any


class Words:
    """Through structlog where the program has set that up, as `aither_sdk.run` does; else through
    the standard library's logging, which every program has: warnings and worse on stderr unless it
    says otherwise, tracebacks without the values of local variables. (structlog, left to itself,
    would print those, to stdout.)"""

    def __init__(self, name: str) -> None:
        self._name = name

    def info(self, event: str, **fields: Any) -> None:
        self.say(logging.INFO, event, **fields)

    def warning(self, event: str, **fields: Any) -> None:
        self.say(logging.WARNING, event, **fields)

    def error(self, event: str, **fields: Any) -> None:
        self.say(logging.ERROR, event, **fields)

    def exception(self, event: str, **fields: Any) -> None:
        """An error, with the exception that is being handled."""
        self.say(logging.ERROR, event, **{"exc_info": True, **fields})

    def say(self, level: int, event: str, **fields: Any) -> None:
        """Fields that are None are left out."""
        told = {key: value for key, value in fields.items() if value is not None}
        # Who has set it up has imported it; by itself it brings 10 MB along.
        structlog = sys.modules.get("structlog")
        if structlog is not None and structlog.is_configured():
            log = structlog.get_logger(self._name)
            getattr(log, logging.getLevelName(level).lower())(event, **told)
            return
        exc_info = told.pop("exc_info", None)
        spelled = " ".join(f"{key}={value}" for key, value in told.items())
        logging.getLogger(self._name).log(level, "%s %s", event, spelled, exc_info=exc_info)
