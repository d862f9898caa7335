"""The tick: the world and the clock go in, what must be published comes out.

Level-triggered: it looks at how things stand, never at what just happened, so a tick that was left
out or ran early changes nothing but the time. No I/O and no waiting in here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from datetime import UTC, datetime

from aither.genesis.v1 import decision_pb2, genesis_events_pb2
from aither_sdk.clock import Clock
from genesis_svc import actions, answers, gates, ids, snapshot, tasks
from genesis_svc.agents_file import AgentSpec
from genesis_svc.commands import Command
from genesis_svc.decide import Decision, decide
from genesis_svc.outgoing import Outgoing, Underway
from genesis_svc.routines import DueRun, Routines
from genesis_svc.schedule import Beat
from genesis_svc.world import World, recorded_ns


@dataclass(slots=True)
class _Mind:
    """What one agent remembers from tick to tick."""

    arrival: float | None = None
    """State of its rate limit."""
    blocked_by: str = ""
    """The gate that blocked it at its last tick."""


class Tick:
    """Judges. Owned by the engine, which calls `run` and publishes what it returns, in order.

    The order matters after a crash, for any tail of it may be missing from the log: an order comes
    before the decision or answer that speaks of it, and the snapshot, which holds that all of it
    was said, comes last.
    """

    def __init__(
        self,
        world: World,
        agents: Sequence[AgentSpec],
        routines: Routines,
        clock: Clock,
        *,
        epoch: int,
        seed: str,
    ) -> None:
        self.world = world
        self.underway = Underway()
        self.epoch = epoch
        self.number = 0
        self.ticks_skipped = 0
        self._agents = {spec.id: spec for spec in agents}
        self._routines = routines
        self._clock = clock
        self._seed = seed
        self._in_pain = False
        self._stream_up_at = clock.monotonic()
        self._minds: dict[str, _Mind] = {}
        """By agent. Filled by the first tick, when the world is whole."""
        self._snapshot_of: tuple[int, int] | None = None
        self._ended_before = world.tasks_ended
        self._claim = self._snapshot_now()

    def run(self, beat: Beat) -> list[Outgoing]:
        """One tick. `beat` says how late it is, and how many before it were left out."""
        began = self._clock.monotonic()
        self.number += 1
        self.ticks_skipped += beat.skipped
        if not self._minds:
            self._minds = {key: self._mind(spec) for key, spec in self._agents.items()}
        self.underway.settle(self.world.sequence)
        self._in_pain = gates.in_pain(self.world.pain, self._in_pain)
        out: list[Outgoing] = []
        self._answer_commands(out)
        self._reconcile(out)
        blocked = self._decide_all(out, began)
        requested = sum(o.subject.endswith(".requested") for o in out)
        out += self.agent_states()
        self._snapshot(out)
        out.append(self._tell(beat, began, requested=requested, blocked=blocked))
        return out

    def claim(self) -> Outgoing:
        """The snapshot that makes the epoch known before anything is done in its name.

        It is of the world as it began, before the stream was followed: whoever recovers from it
        meets again every command that has not been answered yet.
        """
        return self._claim

    def stream_up(self) -> None:
        """The stream came up: what happened meanwhile is still to be read."""
        self._stream_up_at = self._clock.monotonic()

    def log_replaced(self) -> None:
        """The log is another one; nothing that was said is in it."""
        self.world.log_replaced()
        self.underway.clear()
        self._claim = self._snapshot_now()

    def agent_states(self) -> list[Outgoing]:
        """`genesis.agent.<id>` of every agent that changed since this was asked."""
        changed = sorted(self.world.changed_agents)
        self.world.changed_agents.clear()
        return [
            Outgoing(
                f"genesis.agent.{key}",
                snapshot.agent_state(self.world.agents[key], self.world.tasks),
            )
            for key in changed
        ]

    # -- steps -------------------------------------------------------------------------------

    def _answer_commands(self, out: list[Outgoing]) -> None:
        now_ns = self._clock.time_ns()
        for command in list(self.world.commands.values()):
            age_s = (now_ns - recorded_ns(command.event)) / 1e9
            judged = answers.judge(command, self._agents, self.world, age_s=age_s)
            match judged:
                case answers.Rejected(reason):
                    out.append(answers.rejected(command, reason))
                case answers.Switch(agent, enabled):
                    self.world.switch(agent, enabled=enabled, at_ns=now_ns)
                    out.append(answers.accepted(command))
                case answers.Run():
                    self._order_run(out, judged, command)
            self.world.forget_command(command.key)

    def _order_run(self, out: list[Outgoing], run: answers.Run, command: Command) -> None:
        if not self.world.knows_task(run.task_id):
            self._order(
                out,
                tasks.request(
                    run.task_id,
                    run.action,
                    agent=run.agent,
                    attempt=1,
                    epoch=self.epoch,
                    effort=run.effort,
                    cause=command.event,
                ),
            )
        out.append(answers.accepted(command, task_id=run.task_id))
        if run.agent:
            told = self._decision_made(run.agent, decision_pb2.DECIDER_COMMAND, run.effort)
            told.decision_id, told.task_id = run.task_id, run.task_id
            told.action.CopyFrom(run.action)
            out.append(
                Outgoing(
                    f"genesis.decision.{run.agent}",
                    told,
                    id=ids.step_id(run.task_id, 0, "decision"),
                    cause=command.event,
                )
            )

    def _reconcile(self, out: list[Outgoing]) -> None:
        open_tasks = self.world.tasks.values()
        stream_up_s = self._clock.monotonic() - self._stream_up_at
        for outgoing in tasks.reconcile(
            open_tasks, self.epoch, self._clock.time_ns(), stream_up_s=stream_up_s
        ):
            self._order(out, outgoing)

    def _decide_all(self, out: list[Outgoing], now: float) -> int:
        """Lets every agent decide. Answers how many a gate blocked."""
        blocked = 0
        wall = datetime.fromtimestamp(self._clock.time_ns() / 1e9, UTC)
        runs = self._due_runs(wall)
        holds = {word for word, test in actions.CONDITIONS.items() if test(self.world)}
        for spec in self._agents.values():
            run = runs.get(spec.id)
            situation = self._situation(spec, run, holds, now)
            decision_id = (
                ids.decision_id(self.epoch, self.number, spec.id)
                if run is None
                else ids.routine_decision_id(run.spec.name, int(run.planned.timestamp() * 1e9))
            )
            decision = decide(situation, f"{self._seed}/{decision_id}")
            if decision.action is None:
                blocked += 1
                self._note_blocked(out, spec, decision, decision_id)
                self._skip_overlapping(run, decision, wall)
            else:
                self._carry_out(out, spec, decision, decision_id)
                if run is not None:
                    self._routines.done(run, wall)
        return blocked

    def _due_runs(self, wall: datetime) -> Mapping[str, DueRun]:
        """The earliest due run of each agent, those left out that were begun before a crash."""
        runs: dict[str, DueRun] = {}
        for run in self._routines.due(wall):
            cause = ids.routine_decision_id(run.spec.name, int(run.planned.timestamp() * 1e9))
            if self.world.knows_task(ids.task_id(cause)):
                self._routines.done(run, wall)
            else:
                runs.setdefault(run.spec.agent, run)
        return runs

    def _situation(
        self, spec: AgentSpec, run: DueRun | None, holds: Set[str], now: float
    ) -> gates.Situation:
        agent = self.world.agents[spec.id]
        busy_with = ""
        if agent.tasks:
            busy_with = f"task {next(iter(agent.tasks))} is not at its end"
        elif self.underway.keeps(spec.id):
            busy_with = "the order of its task is under way"
        return gates.Situation(
            enabled=agent.enabled,
            busy_with=busy_with,
            actions=spec.actions,
            eligible=frozenset(action.id for action in spec.actions if action.when in holds),
            rate=spec.rate,
            arrival=self._minds[spec.id].arrival,
            in_pain=self._in_pain,
            pain=self.world.pain,
            run=run,
            now=now,
        )

    def _carry_out(
        self, out: list[Outgoing], spec: AgentSpec, decision: Decision, decision_id: str
    ) -> None:
        assert decision.action is not None
        mind = self._minds[spec.id]
        mind.arrival, mind.blocked_by = decision.arrival, ""
        action = actions.build(decision.action, spec.id, self.world)
        task_id = ids.task_id(decision_id)
        self._order(
            out,
            tasks.request(
                task_id,
                action,
                agent=spec.id,
                attempt=1,
                epoch=self.epoch,
                effort=decision.effort,
            ),
        )
        told = self._decision_made(spec.id, decision.decider, decision.effort)
        told.decision_id, told.task_id = decision_id, task_id
        told.action.CopyFrom(action)
        told.gates.extend(decision.gates)
        out.append(Outgoing(f"genesis.decision.{spec.id}", told, id=decision_id))

    def _note_blocked(
        self, out: list[Outgoing], spec: AgentSpec, decision: Decision, decision_id: str
    ) -> None:
        """Told once for each reason, not at every tick."""
        mind = self._minds[spec.id]
        if mind.blocked_by == decision.blocked_by:
            return
        mind.blocked_by = decision.blocked_by
        told = self._decision_made(spec.id, decision.decider, 0)
        told.decision_id = decision_id
        told.gates.extend(decision.gates)
        out.append(Outgoing(f"genesis.decision.{spec.id}", told))

    def _skip_overlapping(self, run: DueRun | None, decision: Decision, wall: datetime) -> None:
        if run is None:
            return
        switched_off = decision.blocked_by == "enabled"
        if switched_off or (run.spec.overlap == "skip" and decision.blocked_by == "idle"):
            self._routines.skip(run, wall)

    def _snapshot(self, out: list[Outgoing]) -> None:
        revision = (self.world.revision, self._routines.revision)
        if self._snapshot_of != revision:
            self._snapshot_of = revision
            out.append(self._snapshot_now())

    def _snapshot_now(self) -> Outgoing:
        told = snapshot.take(
            self.world,
            self._routines.states,
            epoch=self.epoch,
            tick=self.number,
            now_ns=self._clock.time_ns(),
        )
        return Outgoing("genesis.snapshot", told)

    # -- pieces ------------------------------------------------------------------------------

    def _order(self, out: list[Outgoing], outgoing: Outgoing) -> None:
        """Sends what the next judgement depends on, unless it is on its way already."""
        if outgoing.id not in self.underway:
            self.underway.add(outgoing)
            out.append(outgoing)

    def _decision_made(
        self, agent: str, decider: decision_pb2.Decider.ValueType, effort: int
    ) -> decision_pb2.DecisionMade:
        return decision_pb2.DecisionMade(
            agent=agent,
            tick=self.number,
            decider=decider,
            decided_time=snapshot.stamp(self._clock.time_ns()),
            effort=effort,
        )

    def _tell(self, beat: Beat, began: float, *, requested: int, blocked: int) -> Outgoing:
        busy = sum(bool(agent.tasks) for agent in self.world.agents.values())
        idle = sum(agent.enabled and not agent.tasks for agent in self.world.agents.values())
        told = genesis_events_pb2.GenesisTick(
            tick=self.number,
            epoch=self.epoch,
            ticks_skipped=self.ticks_skipped,
            agents_idle=idle,
            agents_busy=busy,
            tasks_requested=requested,
            tasks_ended=self.world.tasks_ended - self._ended_before,
            decisions_blocked=blocked,
            world_sequence=self.world.sequence,
        )
        self._ended_before = self.world.tasks_ended
        told.lag_duration.FromNanoseconds(int(beat.lag_s * 1e9))
        told.tick_duration.FromNanoseconds(int((self._clock.monotonic() - began) * 1e9))
        return Outgoing("genesis.tick", told)

    def _mind(self, spec: AgentSpec) -> _Mind:
        """After a restart the rate limit is charged as if the agent had decided when its phase last
        changed, so that a Genesis that crashes over and over decides no oftener than it may."""
        agent = self.world.agents[spec.id]
        if not agent.last_decision_id:
            return _Mind()
        age_s = max(0.0, (self._clock.time_ns() - agent.since_ns) / 1e9)
        arrival = self._clock.monotonic() - age_s + spec.rate.per_s
        return _Mind(arrival=min(arrival, self._clock.monotonic() + spec.rate.per_s))
