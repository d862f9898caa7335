"""Health and evidence while an event loop stands still: the two outages before and after, and
stalls of every kind under our guard and others.

Health is asked from a process of its own, over a new connection each time, within 10 s.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.measure import percentile, print_setting
from benchmarks.outages.old_orchestrator import AGENTS, SCALE, TICK_S
from benchmarks.stalls import kinds, outages
from benchmarks.stalls.cost import steady_cost
from benchmarks.stalls.kinds import GIL_HELD, KINDS, LINELESS, Evidence, Row
from benchmarks.stalls.outages import Found
from benchmarks.stalls.prober import Answers

P99_MS, MAX_MS = 5.0, 20.0
TOLD_S, TOLD_GIL_HELD_S = 0.3, 1.5
CPU_PERCENT, MEMORY_MB = 1.0, 45.0
_LABEL, _CELL = 34, 36


async def print_heartbeat(seconds: float, folder: Path) -> None:
    old, new = await _before_and_after(
        seconds, folder, outages.old_heartbeat, outages.new_heartbeat
    )
    _head("The heartbeat: 48 HTTP targets, once a second", "before", "after (Flux and Pulse)")
    for name, answers in new.answers.items():
        _row(f"health ms, p50/p99/max ({name})", _ms(old.answers["old"]), _ms(answers))
    _print_stalls(old, new)
    ticks = old.counts["ticks"]
    _row("Sense tasks at once, most", f"{old.counts['most sense_tasks']:.0f}", "")
    _row(
        "events published a tick",
        f"{old.counts['publishes'] / ticks:.0f}, a request each",
        f"{new.counts['publishes a tick']:.0f} in one batch",
    )
    _row("reflex evaluations a tick", f"{old.counts['reflexes'] / ticks:.0f}", "")
    _row("polls of the bus a second", f"{old.counts['polls'] / old.seconds:.1f}", "")
    _row("GPU check blocks, ms, mean/max", _spans_ms(old, "gpu"), "")
    _row("tick, ms, mean/max", _spans_ms(old, "tick"), "")
    _row("tick begins late, ms, mean/max", "", _spans_ms(new, "tick late"))
    _row("checks a tick", "48", f"{new.counts['checks a tick']:.1f}")


async def print_orchestrator(seconds: float, folder: Path) -> None:
    old, new = await _before_and_after(
        seconds, folder, outages.old_orchestrator, outages.new_orchestrator
    )
    _head(
        f"The orchestrator: {AGENTS} agents, times scaled by {SCALE:g}, a tick each {TICK_S:g} s",
        "before",
        "after (Genesis)",
    )
    _row("health ms, p50/p99/max", _ms(old.answers["old"]), _ms(new.answers["genesis"]))
    _print_stalls(old, new)
    _row(
        "ticks that ended",
        str(len(old.spans_s.get("tick", ()))),
        str(len(new.spans_s["tick"])),
    )
    _row("tick, ms, mean/max", _spans_ms(old, "tick"), _spans_ms(new, "tick"))
    _row("tick begins late, ms, mean/max", "", _spans_ms(new, "tick late"))
    _row(
        "dispatches a second",
        f"{old.counts['dispatches'] / old.seconds:.1f}",
        f"{new.counts['dispatches'] / new.seconds:.1f}",
    )
    _row("dispatched", "awaited in the tick", "events; a group's worker answers")
    _row(
        "HTTP calls to itself a second",
        f"{old.counts['self_calls'] / old.seconds:.1f}",
        "none: it has no port",
    )
    _row("HTTP clients made a second", f"{old.counts['clients_made'] / old.seconds:.1f}", "")


async def print_kinds(chosen: Sequence[str], seconds: float) -> None:
    ours, idle = await kinds.under_ours(chosen, seconds)
    servicers = await kinds.under_servicers(chosen, seconds)
    print(f"\nHealth while the loop stands still for about {seconds:g} s, ms, p50/p99/max")
    names = ("ours (witness)", "an idle server meanwhile", *servicers)
    print(f"  {'':<24}" + "".join(f"{name:>29}" for name in names))
    for kind in chosen:
        rows = (ours[kind], idle[kind], *(rows[kind] for rows in servicers.values()))
        print(f"  {KINDS[kind]:<24}" + "".join(f"{_ms(row.answers):>29}" for row in rows))
    guards = await kinds.under_guards(chosen, seconds)
    print("\nThe first word of the stall: seconds after its first 100 ms; while open; line right")
    print(f"  {'':<24}" + "".join(f"{name:>29}" for name in ("ours", *guards)))
    for kind in chosen:
        told = (ours[kind], *(rows[kind] for rows in guards.values()))
        words = "".join(f"{_evidence(kind, row.evidence):>29}" for row in told)
        print(f"  {KINDS[kind]:<24}{words}")
    print_verdicts(ours, idle)


def print_verdicts(ours: Mapping[str, Row], idle: Mapping[str, Row]) -> None:
    print("\nGoals")
    for name, rows, limit_ms, share in (
        ("p99", ours, P99_MS, 0.99),
        ("max", ours, MAX_MS, 1.0),
    ):
        worst, kind = max(
            (row.answers.ms(share), kind) for kind, row in rows.items() if row.answers
        )
        beside = idle[kind].answers
        reference = f"; an idle server meanwhile {beside.ms(share):.1f}" if beside else ""
        limit_missed_by_idle = beside is not None and beside.ms(share) > limit_ms
        _verdict(
            worst <= limit_ms,
            f"health {name} at most {limit_ms:g} ms in every kind: "
            f"{worst:.1f} in {KINDS[kind]}{reference}",
            excused=limit_missed_by_idle,
        )
    pooled = [one for row in ours.values() if row.answers for one in row.answers.took_s]
    base = [one for row in idle.values() if row.answers for one in row.answers.took_s]
    print(
        f"           all kinds together, {len(pooled)} asks: "
        f"p50 {percentile(pooled, 0.5) * 1000:.1f}, p99 {percentile(pooled, 0.99) * 1000:.1f}; "
        f"idle server p50 {percentile(base, 0.5) * 1000:.1f}, "
        f"p99 {percentile(base, 0.99) * 1000:.1f}"
    )
    failed = sum(row.answers.failed for row in ours.values() if row.answers)
    _verdict(failed == 0, f"no ask fails: {failed} failed")
    for what, held, limit_s in (
        ("", False, TOLD_S),
        (" where the GIL is held", True, TOLD_GIL_HELD_S),
    ):
        which = [kind for kind in ours if (kind in GIL_HELD) == held and kind != "stopped"]
        if not which:
            continue
        worst, kind = max((_after_s(ours[kind].evidence), kind) for kind in which)
        _verdict(
            worst <= limit_s,
            f"told within {limit_s:g} s of the threshold{what}: {worst:.2f} s in {KINDS[kind]}",
        )
    lined = [kind for kind in ours if kind not in LINELESS]
    wrong = [
        KINDS[kind]
        for kind in lined
        if (evidence := ours[kind].evidence) is None or not evidence.line_right
    ]
    _verdict(not wrong, f"the line is right in all {len(lined)} kinds that have one {wrong or ''}")


async def print_cost(seconds: float) -> None:
    found = await steady_cost(seconds)
    memory = found.memory
    _verdict(
        found.percent < CPU_PERCENT,
        f"less than {CPU_PERCENT:g}% of a core: {found.percent:.2f}% "
        f"(service {found.service_percent:.2f}%, witness {found.witness_percent:.2f}%, the service "
        f"without it {found.bare_percent:.2f}%)",
    )
    _verdict(
        memory.proportional < MEMORY_MB,
        f"less than {MEMORY_MB:g} MB: {memory.proportional:.1f} MB, shared pages by their part "
        f"(the service {found.service.proportional:.1f}, without it {found.bare.proportional:.1f}, "
        f"the witness {found.witness.proportional:.1f}); all that is resident in both "
        f"{memory.resident:.1f}, private alone {memory.private:.1f}",
    )


async def _before_and_after(
    seconds: float,
    folder: Path,
    before: Callable[[float, Path], Awaitable[Found]],
    after: Callable[[float, Path], Awaitable[Found]],
) -> tuple[Found, Found]:
    found = []
    for measure in (before, after):
        own = Path(tempfile.mkdtemp(dir=folder))
        found.append(await measure(seconds, own))
    return found[0], found[1]


def _print_stalls(old: Found, new: Found) -> None:
    of_code = sum(count for name, count in new.stalls.items() if "by the machine" not in name)
    _row("stalls of 100 ms and more", str(old.stalls["old"]), str(of_code))
    if others := sum(new.stalls.values()) - of_code:
        _row("  and because the machine was busy", "not told apart", str(others))
    longest = f"{new.longest_stall_s * 1000:.0f}" if of_code else ""
    _row("longest stall, ms", f"{old.longest_stall_s * 1000:.0f}", longest)


def _head(title: str, before: str, after: str) -> None:
    print(f"\n{title}")
    _row("", before, after)


def _row(label: str, before: str, after: str) -> None:
    print(f"  {label:<{_LABEL}}{before or '-':>{_CELL}}{after or '-':>{_CELL}}")


def _ms(answers: Answers | None) -> str:
    if answers is None or not answers.took_s:
        return "-"
    told = f"{answers.ms(0.5):,.1f} / {answers.ms(0.99):,.1f} / {answers.ms(1):,.1f}"
    return f"{told} ({answers.failed} failed)" if answers.failed else told


def _spans_ms(found: Found, name: str) -> str:
    spans = found.spans_s.get(name, ())
    if not spans:
        return "none ended"
    return f"{sum(spans) / len(spans) * 1000:,.1f} / {max(spans) * 1000:,.1f}"


def _evidence(kind: str, evidence: Evidence | None) -> str:
    if evidence is None:
        return "nothing"
    when = "open" if evidence.while_open else "afterwards"
    line = "no line" if kind == "stopped" else "right" if evidence.line_right else "wrong line"
    return f"{evidence.after_s:.2f}, {when}, {line}"


def _after_s(evidence: Evidence | None) -> float:
    return evidence.after_s if evidence is not None else math.inf


def _verdict(met: bool, goal: str, *, excused: bool = False) -> None:
    """`excused`: a server with nothing to do misses it just so; then it says nothing of ours."""
    word = "met" if met else "MACHINE" if excused else "MISSED"
    print(f"  {word:<9}{goal}")


async def measure(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="aither-bench-") as folder:
        if "heartbeat" in arguments.tables:
            await print_heartbeat(arguments.outage_seconds, Path(folder))
        if "orchestrator" in arguments.tables:
            await print_orchestrator(arguments.outage_seconds, Path(folder))
    if "kinds" in arguments.tables:
        await print_kinds(arguments.kinds, arguments.stall_seconds)
    if "cost" in arguments.tables:
        await print_cost(arguments.cost_seconds)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--outage-seconds", type=float, default=15.0)
    parser.add_argument("--stall-seconds", type=float, default=3.0)
    parser.add_argument("--cost-seconds", type=float, default=15.0)
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=list(KINDS))
    tables = ["heartbeat", "orchestrator", "kinds", "cost"]
    parser.add_argument("--tables", type=lambda text: text.split(","), default=tables)
    arguments, _ = parser.parse_known_args(argv)
    print_setting("aiohttp")
    if "kinds" in arguments.tables and (told := kinds.peers_versions()):
        print(told)
    asyncio.run(measure(arguments))


if __name__ == "__main__":
    main()
