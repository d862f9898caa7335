from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conformance.event_log_suite import EventLogSuite
from tests.conformance.houses import JetStreamHouse
from tests.nats_server import NatsServer, nats_server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    with nats_server(tmp_path_factory.mktemp("nats")) as server:
        yield server


class TestJetStreamLog(EventLogSuite):
    @pytest.fixture
    def house(self, server: NatsServer) -> JetStreamHouse:
        return JetStreamHouse(server)
