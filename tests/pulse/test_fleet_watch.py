"""The fleet file is followed through every way to replace it; a bad one leaves the old fleet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from aither_sdk.errors import AlreadyExists, ConfigError, FailedPrecondition, NotFound
from pulse_svc.checks.heartbeat import HeartbeatListener
from pulse_svc.fleet import MAX_TARGETS
from pulse_svc.fleet_watch import FleetWatch
from pulse_svc.lag import LagMeter
from pulse_svc.prober import Prober
from pulse_svc.roster import Roster
from tests.pulse.building import BAD, GOOD, BoardKit, target

Replace = Callable[[Path, str], None]


def fleet(*names: str, interval: str = "1s") -> str:
    lines = [f"  - {{name: {n}, interval: {interval}, check: {{kind: heartbeat}}}}" for n in names]
    return "targets:\n" + "\n".join(lines) + "\n"


class WatchKit(BoardKit):
    def __init__(self, path: Path) -> None:
        super().__init__()
        lag = LagMeter(self.clock)
        self.prober = Prober(
            self.board,
            lambda t: HeartbeatListener(t.check.heartbeat, self.clock, lag),
            self.clock,
            lag,
            8,
        )
        self.roster = Roster(self.board, self.prober, self.news)
        self.watch = FleetWatch(path, self.roster, self.news)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "fleet.yaml"


@pytest.fixture(autouse=True)
def _logs() -> Iterator[None]:
    with capture_logs():
        yield


def in_place(path: Path, text: str) -> None:
    path.write_text(text)


def renamed_over(path: Path, text: str) -> None:
    other = path.with_suffix(".new")
    other.write_text(text)
    other.replace(path)


def link_turned(path: Path, text: str) -> None:
    """As Kubernetes does it: the file is a link through a folder link that is swapped."""
    if not path.is_symlink():
        path.unlink()
        path.symlink_to("data/fleet.yaml")
    folders = path.parent / "versions"
    folders.mkdir(exist_ok=True)
    version = folders / str(len(list(folders.iterdir())))
    version.mkdir()
    (version / "fleet.yaml").write_text(text)
    swap = path.parent / "data.tmp"
    swap.symlink_to(version)
    swap.replace(path.parent / "data")


@pytest.mark.parametrize("replace", [in_place, renamed_over, link_turned])
async def test_a_changed_file_is_read_again_and_the_unchanged_keep_their_state(
    path: Path, replace: Replace
) -> None:
    path.write_text(fleet("a", "b"))
    kit = WatchKit(path)
    await kit.watch.load()
    kit.record("a", GOOD, GOOD)
    kit.news.take()
    for names, added, removed in ((("a", "c"), ["c"], ["b"]), (("a", "b"), ["b"], ["c"])):
        replace(path, fleet(*names))
        await kit.watch.look()
        news, _ = kit.news.take()
        assert news is not None
        assert (list(news.added), list(news.removed), list(news.updated)) == (added, removed, [])
        assert kit.board.names() == sorted(names)
        status = kit.board.status("a")
        assert status is not None
        assert status.streak == 2
    await kit.watch.look()
    assert kit.news.take() == (None, [])


async def test_a_bad_change_is_refused_and_told_once_and_the_old_fleet_goes_on(path: Path) -> None:
    path.write_text(fleet("a"))
    kit = WatchKit(path)
    await kit.watch.load()
    kit.news.take()
    path.write_text(fleet("a", "b", interval="1h30"))
    with capture_logs() as logs:
        await kit.watch.look()
        await kit.watch.look()
    news, _ = kit.news.take()
    assert news is not None
    assert [fault.split(": ", 1)[1] for fault in news.faults] == [
        'targets[0].interval: "1h30" is not a span of time; write it like 800ms, 1s, 1.5s, 2m',
        'targets[1].interval: "1h30" is not a span of time; write it like 800ms, 1s, 1.5s, 2m',
    ]
    assert [line["event"] for line in logs] == ["fleet.refused"]
    assert kit.board.names() == ["a"]
    path.unlink()
    await kit.watch.look()
    await kit.watch.look()
    news, _ = kit.news.take()
    assert news is not None
    assert "cannot be read: No such file" in news.faults[0]
    path.write_text(fleet("a", "b"))
    await kit.watch.look()
    assert kit.board.names() == ["a", "b"]


async def test_a_bad_file_at_the_start_raises_every_fault(path: Path) -> None:
    path.write_text(fleet("A", "b", interval="x"))
    with pytest.raises(ConfigError) as caught:
        await WatchKit(path).watch.load()
    assert len(caught.value.faults) == 3


async def test_the_file_wins_over_registered_targets_and_they_may_not_touch_it(path: Path) -> None:
    path.write_text(fleet("a"))
    kit = WatchKit(path)
    await kit.watch.load()
    kit.roster.register(target("guest"))
    with pytest.raises(AlreadyExists):
        kit.roster.register(target("a"))
    with pytest.raises(FailedPrecondition):
        kit.roster.deregister("a")
    path.write_text(fleet("a", "guest"))
    await kit.watch.look()
    status = kit.board.status("guest")
    assert status is not None
    assert status.from_fleet
    path.write_text(fleet("a"))
    await kit.watch.look()
    with pytest.raises(NotFound):
        kit.roster.deregister("guest")


async def test_registering_the_same_again_changes_nothing_and_another_check_begins_anew(
    path: Path,
) -> None:
    path.write_text("targets: []\n")
    kit = WatchKit(path)
    await kit.watch.load()
    kit.roster.register(target("a"))
    kit.record("a", BAD, BAD)
    news, _ = kit.news.take()
    assert news is not None
    assert kit.roster.register(target("a")).streak == 2
    assert kit.news.take() == (None, [])
    longer = target("a", interval_s=3.0)
    assert kit.roster.register(longer).streak == 0, "the default grace follows the interval"
    news, _ = kit.news.take()
    assert news is not None
    assert list(news.updated) == ["a"]


async def test_a_file_that_does_not_fit_beside_registered_targets_is_refused(path: Path) -> None:
    path.write_text("targets: []\n")
    kit = WatchKit(path)
    await kit.watch.load()
    kit.roster.register(target("guest"))
    path.write_text(fleet(*(f"t{i}" for i in range(MAX_TARGETS))))
    await kit.watch.look()
    assert kit.board.names() == ["guest"]
    news, _ = kit.news.take()
    assert news is not None
    assert "are more than 1000" in news.faults[0]
