from __future__ import annotations

from pathlib import Path

import pytest

from tests.conformance.consumer_groups_suite import ConsumerGroupsSuite
from tests.conformance.groups_house import SqliteGroupsHouse


class TestSqliteGroups(ConsumerGroupsSuite):
    @pytest.fixture
    def house(self, tmp_path: Path) -> SqliteGroupsHouse:
        return SqliteGroupsHouse(tmp_path / "data")
