from __future__ import annotations

import pytest

from tests.conformance.event_log_suite import EventLogSuite
from tests.conformance.houses import MemoryHouse


class TestMemoryLog(EventLogSuite):
    @pytest.fixture
    def house(self) -> MemoryHouse:
        return MemoryHouse()
