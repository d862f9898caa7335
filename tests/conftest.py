"""What holds for every test."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import structlog
from hypothesis import settings

# Hundreds of processes are started; where bytecode is not kept, each compiles all that it imports,
# and every worker of pytest rewrites the assertions of all tests.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Machines are busy at times: how long an example takes says nothing about what it shows. The same
# examples each time, so that a red run can be run again; others: `--hypothesis-profile=explore`.
settings.register_profile("aither", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None)
settings.load_profile("aither")


@pytest.fixture(autouse=True)
def _log_settings_as_they_were() -> Iterator[None]:
    """A command of the CLI sets logging for its process, which here is that of other tests."""
    before = structlog.get_config()
    yield
    structlog.configure(**before)
