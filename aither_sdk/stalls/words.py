"""Log lines that suit the program they are written in."""

from __future__ import annotations

import logging
import sys
from typing import Any

_NAME = "aither_sdk.stalls"


def say(level: str, event: str, **fields: Any) -> None:
    """Through structlog where the program has set that up, as `aither_sdk.run` does; else through
    the standard library's logging, which every program has. Fields that are None are left out."""
    told = {key: value for key, value in fields.items() if value is not None}
    # Who has set it up has imported it; by itself it brings 10 MB along.
    structlog = sys.modules.get("structlog")
    if structlog is not None and structlog.is_configured():
        getattr(structlog.get_logger(_NAME), level)(event, **told)
        return
    exc_info = told.pop("exc_info", None)
    spelled = " ".join(f"{key}={value}" for key, value in told.items())
    number = logging.getLevelNamesMapping()[level.upper()]
    logging.getLogger(_NAME).log(number, "%s %s", event, spelled, exc_info=exc_info)
