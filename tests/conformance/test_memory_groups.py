from __future__ import annotations

import pytest

from tests.conformance.consumer_groups_suite import ConsumerGroupsSuite
from tests.conformance.groups_house import MemoryGroupsHouse


class TestMemoryGroups(ConsumerGroupsSuite):
    @pytest.fixture
    def house(self) -> MemoryGroupsHouse:
        return MemoryGroupsHouse()
