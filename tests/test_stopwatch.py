"""The seconds of a machine that has room, from made-up figures."""

from __future__ import annotations

import pytest

from tests.stopwatch import calm


@pytest.mark.parametrize(
    ("elapsed_s", "overslept_s", "idle_share", "crowd", "calm_s"),
    [
        (4.0, 0.0, 1.0, 1.0, 4.0),
        # A machine that is busy half of the time, or stands still for half of it, took that much.
        (4.0, 0.0, 0.5, 1.0, 2.0),
        (4.0, 2.0, 1.0, 1.0, 2.0),
        # Where all cores are busy, what waits for anything but a core still shows.
        (30.0, 0.0, 0.0, 1.5, pytest.approx(6.7, abs=0.1)),
        (3.0, 0.0, 0.0, 1.5, pytest.approx(0.7, abs=0.1)),
        (30.0, 30.5, 0.0, 10.0, 0.0),
    ],
)
def test_what_the_machine_took_is_left_out_and_no_more(
    elapsed_s: float, overslept_s: float, idle_share: float, crowd: float, calm_s: float
) -> None:
    assert calm(elapsed_s, overslept_s, idle_share, crowd) == calm_s
