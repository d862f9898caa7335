"""Retention at work: asks the log what it holds, and has it remove what the rules retire."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import structlog

from aither_sdk.clock import Clock, SystemClock
from aither_sdk.errors import AitherError
from aither_sdk.settings import RetentionSettings
from flux_svc.logs.base import Ability, EventLog, IndexEntry
from flux_svc.retention.rules import Excess, Ledger, SubjectRule, aged, compiled, plan
from flux_svc.retention.timekeeper import Timekeeper

PAGE_EVENTS = 2000
"""Events looked at between two turns of the loop: about 2 ms of it."""
_PAGES_AHEAD = 8
"""Pages looked at for the end of events that claim to be of the future; beyond them age retires
nothing in this sweep."""

logger = structlog.get_logger()


@dataclass(slots=True)
class RetentionStatistics:
    """Counts since the start. Changed by the sweep alone."""

    retired_events: int = 0
    """Removed by a bound or a rule."""
    expired_events: int = 0
    """Removed since their own time was over."""
    by_rule: Counter[str] = field(default_factory=Counter)
    """`retired_events` by what retired them: max_age, max_bytes, max_events, superseded (a state
    that was kept beyond the bounds until the next one), or the filter of a rule."""
    sweeps: int = 0
    failed_sweeps: int = 0


class Retention:
    """Owns no thread and no lock: all is asked of the log in small steps, and the log puts them
    between its appends. Owned by the loop of the log."""

    def __init__(
        self, log: EventLog, settings: RetentionSettings, *, clock: Clock | None = None
    ) -> None:
        self.statistics = RetentionStatistics()
        self._log = log
        self._settings = settings
        self._clock = clock or SystemClock()
        self._rules = compiled(settings.rules)
        self._ledger = self._empty_ledger()
        self._owed: list[tuple[str, list[int]]] = []
        """What the ledger has retired and is still in the log, since a removal failed."""
        self._settled_to = 0
        """The bounds of the whole log have dealt with everything up to here."""
        self._rules_settled_to = [0] * len(self._rules)
        """The same for the age of each rule."""
        self._timekeeper: Timekeeper | None = None
        self._failing = False

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Retention]:
        """Sweeps every `sweep_interval_s` while the block lasts."""
        if Ability.REMOVE not in self._log.abilities:
            if self._settings != RetentionSettings():
                logger.warning("retention_not_available", log=self._log.info().kind)
            yield self
            return
        task = asyncio.get_running_loop().create_task(self._run(), name="flux:retention")
        try:
            yield self
        finally:
            task.cancel()
            await asyncio.wait({task})

    async def sweep(self) -> None:
        """Once over everything. Raises what the log raises; the next sweep goes on from there."""
        now_ns = await self._now_ns()
        await self._expire(now_ns)
        await self._follow()
        for place, rule in enumerate(self._rules):
            if rule.max_age_ns is not None:
                await self._age(place, rule, now_ns)
        await self._keep_bounds(now_ns)
        if not self._ledger.forget(self._log.info().first_sequence):
            # What it had spared is judged again, from the beginning.
            self._ledger, self._settled_to = self._empty_ledger(), 0
        self.statistics.sweeps += 1

    def _empty_ledger(self) -> Ledger:
        return Ledger(self._rules, keep_last=self._settings.keep_last_per_subject)

    async def _run(self) -> None:
        while True:
            try:
                if await self._log.tends():
                    await self.sweep()
            except AitherError as error:
                self._failed(error.reason, why=error.message)
            except Exception as error:
                # A defect here must not end the sweeps for good, or the disk fills.
                self._failed("DEFECT", exc_info=error)
            else:
                self._failing = False
            await asyncio.sleep(self._settings.sweep_interval_s)

    def _failed(self, reason: str, **told: object) -> None:
        self.statistics.failed_sweeps += 1
        if not self._failing:
            self._failing = True
            logger.error("retention_failed", reason=reason, **told)

    async def _now_ns(self) -> int:
        if self._timekeeper is None:
            self._timekeeper = Timekeeper(await self._newest_ns())
        doubted = self._timekeeper.doubts
        wall_ns = self._clock.time_ns()
        now_ns = self._timekeeper.judge(wall_ns, self._clock.monotonic())
        if self._timekeeper.doubts and not doubted:
            ahead_s = round((wall_ns - now_ns) / 1e9)
            logger.warning("retention_clock_doubted", ahead_s=ahead_s)
        return now_ns

    async def _newest_ns(self) -> int | None:
        newest = await self._log.index(max(0, self._log.info().last_sequence - PAGE_EVENTS))
        # Not the largest: it may be from a moment in which the clock was wrong.
        return newest[-1].recorded_ns if newest else None

    async def _expire(self, now_ns: int) -> None:
        while expired := await self._log.expired(now_ns, max_events=PAGE_EVENTS):
            removed = await self._log.remove(expired)
            self.statistics.expired_events += removed
            if not removed or len(expired) < PAGE_EVENTS:
                break

    async def _follow(self) -> None:
        """Feeds the ledger up to the end, and removes what is superseded."""
        while self._ledger.is_needed:
            while self._owed:
                await self._remove(*self._owed[-1])
                self._owed.pop()
            page = await self._page(self._ledger.position)
            if not page:
                break
            retired = self._ledger.feed(page)
            self._owed = [(rule, sorted(sequences)) for rule, sequences in retired.items()]

    async def _age(self, place: int, rule: SubjectRule, now_ns: int) -> None:
        assert rule.max_age_ns is not None
        start = self._rules_settled_to[place]
        upto = await self._aged_to(start, rule.max_age_ns, now_ns)
        while start < upto:
            page = [entry for entry in await self._page(start) if entry.sequence <= upto]
            old = [one.sequence for one in page if rule.matches(one.subject)]
            await self._remove(rule.name, old)
            start = page[-1].sequence if page else upto
            self._rules_settled_to[place] = start

    async def _keep_bounds(self, now_ns: int) -> None:
        settings, info = self._settings, self._log.info()
        excess = Excess()
        if settings.max_age_s is not None:
            max_age_ns = int(settings.max_age_s * 1e9)
            excess.aged_to = await self._aged_to(self._settled_to, max_age_ns, now_ns)
        if settings.max_events is not None:
            excess.events = info.events - settings.max_events
        if settings.max_bytes is not None:
            excess.bytes = info.bytes - settings.max_bytes
        keeps_last = settings.keep_last_per_subject
        while True:
            page = await self._page(self._settled_to)
            if keeps_last:
                # Of what came since, it is not known yet whether it is a state.
                page = [entry for entry in page if entry.sequence <= self._ledger.position]
            made = plan(page, excess, self._ledger.keeps if keeps_last else lambda _entry: False)
            if keeps_last:
                await self._log.remove(made.retired)
            elif made.retired:
                await self._log.trim(made.upto + 1)
            self.statistics.retired_events += len(made.retired)
            self.statistics.by_rule += made.by_rule
            self._settled_to = max(self._settled_to, made.upto)
            if made.ended or not page:
                return

    async def _aged_to(self, start: int, max_age_ns: int, now_ns: int) -> int:
        upto = 0
        pages_ahead = 0
        while pages_ahead < _PAGES_AHEAD:
            page = await self._page(start)
            found, look_on = aged(page, now_ns - max_age_ns, now_ns)
            upto = found or upto
            if not look_on:
                break
            start = page[-1].sequence
            pages_ahead = 0 if found else pages_ahead + 1
        return upto

    async def _page(self, position: int) -> Sequence[IndexEntry]:
        return await self._log.index(position, max_events=PAGE_EVENTS)

    async def _remove(self, rule: str, sequences: Sequence[int]) -> None:
        if sequences:
            removed = await self._log.remove(sequences)
            self.statistics.retired_events += removed
            self.statistics.by_rule[rule] += removed
