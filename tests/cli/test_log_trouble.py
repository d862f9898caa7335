"""A log that takes no events is told by `aither up` and `aither status`."""

from __future__ import annotations

import io
import re

from aither.flux.v1.flux_service_pb2 import GetStreamInfoResponse
from aither_cli.log_watch import LogWatch
from aither_cli.survey import READY, ServiceFinding, Survey
from aither_cli.teller import Teller
from aither_sdk.errors import ResourceExhausted
from aither_sdk.rpc_status import to_status
from tests.clock import FakeClock

FULL = ResourceExhausted("no space is left for flux.db; free some", reason="DISK_FULL")
WELL = GetStreamInfoResponse(log="sqlite")
ILL = GetStreamInfoResponse(log="sqlite", append_error=to_status(FULL))


def test_up_tells_once_that_nothing_is_stored_and_once_that_it_is_again() -> None:
    clock, out = FakeClock(), io.StringIO()
    teller = Teller(out)
    watch = LogWatch(teller, clock)
    for info in (WELL, ILL, ILL, WELL, WELL):
        watch.take(info)
        clock.advance(4.0)
    teller.close()
    told = [re.sub(r"^\S+ ", "", line) for line in out.getvalue().splitlines()]
    assert told == [
        "flux          takes no events: no space is left for flux.db; free some",
        "flux          takes events again, after 8 s",
    ]


def test_status_says_why_and_is_not_well() -> None:
    flux = ServiceFinding("flux", READY, "127.0.0.1:1", "127.0.0.1:2")
    survey = Survey([flux], ILL, None)
    assert "  it takes no events: no space is left for flux.db; free some" in survey.lines()
    assert (survey.well, survey.as_json()["well"]) == (False, False)
    assert Survey([flux], WELL, None).well
    assert not Survey([flux], None, None).well, "it answers health and nothing else"
