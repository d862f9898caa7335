from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conformance.consumer_groups_suite import ConsumerGroupsSuite
from tests.conformance.groups_house import GuestGroupsHouse, JetStreamGroupsHouse
from tests.nats_server import NatsServer, nats_server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    with nats_server(tmp_path_factory.mktemp("nats")) as server:
        yield server


class TestKeepersGroups(ConsumerGroupsSuite):
    @pytest.fixture
    def house(self, server: NatsServer) -> JetStreamGroupsHouse:
        return JetStreamGroupsHouse(server)


@pytest.mark.slow  # tests/flux/groups/test_jetstream_groups.py has what is particular to guests
class TestGuestsGroups(ConsumerGroupsSuite):
    @pytest.fixture
    def house(self, server: NatsServer) -> GuestGroupsHouse:
        return GuestGroupsHouse(server)
