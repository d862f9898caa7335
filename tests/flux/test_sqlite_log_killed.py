from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

from aither.flux.v1.event_pb2 import Event
from flux_svc.logs.sqlite.log import SqliteLog
from tests.conformance.log_house import holes_of, read_all, sequences

CHILD = Path(__file__).with_name("append_until_killed.py")
ROUNDS = 6
SEED = 7


def _acks_until_killed(folder: Path, number: int, after_acks: int) -> dict[str, int]:
    child = subprocess.Popen(
        [sys.executable, str(CHILD), str(folder), str(number)],
        stdout=subprocess.PIPE,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    acks: dict[str, int] = {}
    with child:
        assert child.stdout is not None
        for line in child.stdout:
            if line.endswith(b"\n"):
                name, sequence = line.split()
                acks[name.decode()] = int(sequence)
            if len(acks) == after_acks:
                child.kill()
    return acks


async def test_a_killed_process_loses_no_acknowledged_event(tmp_path: Path) -> None:
    choose = random.Random(SEED)
    acked: dict[str, int] = {}
    epochs = set()
    for number in range(ROUNDS):
        acks = _acks_until_killed(tmp_path, number, choose.randrange(1, 6000))
        assert acks
        acked |= acks
        log = await SqliteLog.open(tmp_path)
        epochs.add(log.epoch)
        stored = await read_all(log, max_events=4096)
        held = sequences(stored)
        assert held == sorted(set(held))
        # SQLite writes a frame in two steps. A kill between those of a commit's last one looks as
        # if the commit were torn: Flux goes on above it, and tells of what it skipped.
        holes = await holes_of(log, max_events=4096)
        skipped = {n for hole in holes for n in range(hole.from_sequence, hole.to_sequence + 1)}
        assert set(range(1, held[-1] + 1)) - set(held) <= skipped
        assert max(Counter(one.id for one in stored).values()) == 1
        places = {one.id: one.sequence for one in stored}
        assert {one: places.get(one) for one in acked} == acked, f"seed {SEED}, round {number}"
        repeated = [Event(id=one, source="child", subject="test.x") for one in acks]
        results = await log.append(repeated)
        assert [result.sequence for result in results] == list(acks.values())
        assert all(result.duplicate for result in results)
        await log.close()
    assert len(epochs) == 1
