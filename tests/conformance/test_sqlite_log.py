from __future__ import annotations

from pathlib import Path

import pytest

from tests.conformance.event_log_suite import EventLogSuite
from tests.conformance.houses import SqliteHouse


class TestSqliteLog(EventLogSuite):
    @pytest.fixture
    def house(self, tmp_path: Path) -> SqliteHouse:
        return SqliteHouse(tmp_path / "log")
