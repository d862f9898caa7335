"""`python -m flux_svc.tools verify | repair | backup`: wiring, and what the user reads.

Exit: 0 well; 1 damage was found, or it could not be done; 2 asked wrongly.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from aither_sdk.errors import AitherError, ConfigError
from flux_svc.tools.backup import back_up
from flux_svc.tools.repair import repair
from flux_svc.tools.verify import verify

WELL, NOT_WELL = 0, 1


def main(arguments: Sequence[str] | None = None) -> int:
    asked = _parser().parse_args(arguments)
    run = {"verify": _verify, "repair": _repair, "backup": _backup}[asked.tool]
    try:
        return run(asked)
    except ConfigError as error:
        told = "; ".join(str(fault) for fault in error.faults)
    except AitherError as error:
        told = error.message
    except OSError as error:
        told = f"{error.filename or asked.data_dir}: {error.strerror or error}"
    except KeyboardInterrupt:
        return 130
    sys.stderr.write(f"aither: {told}\n")
    return NOT_WELL


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m flux_svc.tools", description=__doc__)
    parser.add_argument("tool", choices=["verify", "repair", "backup"])
    parser.add_argument("target", nargs="?", type=Path, help="folder of the backup")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--no-backup", action="store_true")
    return parser


def _verify(asked: argparse.Namespace) -> int:
    started_s = time.monotonic()
    found = verify(asked.data_dir, _Progress("verify"))
    for told in found.told:
        _say(told)
    if found.count > len(found.told):
        _say(f"... and {found.count - len(found.told)} more")
    took_s = time.monotonic() - started_s
    _say(f"{found.events} events, {_size(found.bytes)} read in {took_s:.1f} s")
    if found.left_out:
        _say(f"totals and subjects were not compared: {found.left_out}")
    if not found.count:
        _say("the log is whole")
        return WELL
    if found.damaged:
        _say("damaged: " + _ranges(found.damaged))
    wrong = "1 thing is" if found.count == 1 else f"{found.count} things are"
    _say(f"{wrong} wrong; stop Flux, then restore a backup or run `aither flux repair`")
    return NOT_WELL


def _repair(asked: argparse.Namespace) -> int:
    done = repair(asked.data_dir, keep_damaged=not asked.no_backup, progress=_Progress("repair"))
    _say(f"{done.events} events, {_size(done.bytes)} are in the log")
    if done.mended:
        _say(f"whole, with columns written anew: {_ranges(done.mended)}")
    if done.lost:
        _say(f"taken out: {_ranges(done.lost)}")
    if done.side_file:
        _say(f"what could be read of them: {done.side_file}")
    if done.damaged_file:
        _say(f"the file as it was: {done.damaged_file}")
    if done.epoch_changed:
        _say("events at the end may be lost, so the log has a new epoch: clients begin anew")
    return WELL


def _backup(asked: argparse.Namespace) -> int:
    if asked.target is None:
        sys.stderr.write("aither: name the folder to back up to\n")
        return 2
    started_s = time.monotonic()
    made = back_up(asked.data_dir, asked.target, _Progress("backup"))
    took_s = time.monotonic() - started_s
    _say(
        f"{made.found.events} events, {_size(made.bytes)} in {asked.target}, read back and whole; "
        f"{took_s:.1f} s"
    )
    _say(f"to restore: stop Flux and start it with data_dir {asked.target} (epoch {made.epoch})")
    return WELL


class _Progress:
    """A line on a terminal, once a second."""

    def __init__(self, tool: str) -> None:
        self._tool = tool
        self._told_s = time.monotonic()

    def __call__(self, done: int, whole: int) -> None:
        now_s = time.monotonic()
        if sys.stderr.isatty() and now_s - self._told_s >= 1:
            self._told_s = now_s
            sys.stderr.write(f"{self._tool}: {100 * done // max(whole, 1)} %\n")


def _ranges(ranges: Sequence[tuple[int, int]]) -> str:
    shown = [str(low) if low == high else f"{low}..{high}" for low, high in ranges[:20]]
    more = len(ranges) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _size(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")


if __name__ == "__main__":
    sys.exit(main())
