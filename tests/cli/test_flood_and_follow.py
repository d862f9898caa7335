"""How much `aither up` tells."""

from __future__ import annotations

import io

from aither.flux.v1.event_pb2 import Event
from aither.flux.v1.flux_service_pb2 import Gap
from aither.genesis.v1.genesis_events_pb2 import GenesisTick
from aither.pulse.v1.pulse_events_pb2 import FleetChanged, PulseTick
from aither_cli.flood import Flood
from aither_cli.follow import News, summary
from aither_cli.teller import Teller
from aither_sdk.events import Payload, new_event


def event_of(subject: str, payload: Payload) -> Event:
    return new_event(subject, payload, source="test")


def test_a_burst_passes_and_the_rest_is_counted() -> None:
    flood = Flood(lines_per_s=10, burst=3)
    assert [flood.admits(0.0) for _ in range(5)] == [True, True, True, False, False]
    assert flood.take_left_out() == 2
    assert flood.take_left_out() == 0


def test_room_comes_back_with_time_up_to_the_burst() -> None:
    flood = Flood(lines_per_s=10, burst=3)
    for _ in range(4):
        flood.admits(0.0)
    assert flood.admits(0.1)
    assert not flood.admits(0.1)
    assert [flood.admits(100.0) for _ in range(4)] == [True, True, True, False]


def test_ticks_are_summed_up_once_a_minute() -> None:
    out = io.StringIO()
    teller = Teller(out)
    news = News(teller)
    for second in range(62):
        tick = PulseTick(tick=second, targets_up=4, targets_down=1, down=["gateway"])
        news.take(event_of("pulse.tick", tick), float(second))
    teller.close()
    lines = out.getvalue().splitlines()
    assert len(lines) == 1
    assert "4 up, 1 down (gateway); tick 60" in lines[0]


def test_what_was_left_out_is_said_when_there_is_room_again() -> None:
    out = io.StringIO()
    teller = Teller(out)
    news = News(teller, Flood(lines_per_s=1, burst=2))
    for _ in range(10):
        news.take(event_of("pulse.fleet.changed", FleetChanged(added=["a"])), 0.0)
    news.take(event_of("pulse.fleet.changed", FleetChanged(added=["b"])), 5.0)
    teller.close()
    lines = out.getvalue().splitlines()
    assert len(lines) == 4
    assert "8 lines left out" in lines[2]
    assert "added b" in lines[3]


def test_a_gap_is_told() -> None:
    out = io.StringIO()
    teller = Teller(out)
    News(teller).gap(Gap(from_sequence=3, to_sequence=9))
    teller.close()
    assert "events 3 to 9 are missing" in out.getvalue()


def test_the_summary_has_a_line_for_each_who_ticks() -> None:
    assert summary(None, None) == []
    lines = dict(summary(PulseTick(tick=9, targets_up=2), GenesisTick(tick=4, agents_idle=3)))
    assert lines["pulse"] == "2 up, 0 down; tick 9, 0 ms late"
    assert lines["genesis"] == "3 agents idle, 0 busy; tick 4, took 0 ms"


class StuckTerminal(io.StringIO):
    """A terminal after Ctrl-S: writing waits."""

    def __init__(self) -> None:
        super().__init__()
        import threading

        self.released = threading.Event()
        self.entered = threading.Event()

    def write(self, text: str) -> int:
        self.entered.set()
        self.released.wait(10)
        return super().write(text)


def test_a_paused_terminal_does_not_block_who_tells_and_loss_is_said() -> None:
    out = StuckTerminal()
    teller = Teller(out)
    teller.say("first")
    assert out.entered.wait(5)
    for number in range(5_000):
        teller.say(f"line {number}")
    out.released.set()
    teller.close(timeout_s=10)
    assert "(3000 lines left out: this output was not read)" in out.getvalue()


def test_a_reader_that_has_gone_is_noticed() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    calls: list[str] = []
    teller = Teller(Gone(), lambda: calls.append("gone"))
    teller.say("hello")
    teller.close()
    assert calls == ["gone"]
