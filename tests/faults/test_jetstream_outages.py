"""NATS is killed, loses its leader or is cut off under load; the recorded histories are checked.

What must hold stands in `told.py`, and it must hold on every node.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cut_off import Proxy
from tests.faults.told import History, check, follow, publish, read_all
from tests.nats_server import NatsServer, leader_of, nats_cluster, nats_server, until_current
from tests.processes import ServiceProcess

SEED = 20_261_121


def flux_over(url: str, folder: Path, **more: str) -> ServiceProcess:
    """A node that is not started yet."""
    return ServiceProcess(
        "flux_svc",
        folder,
        {"AITHER_FLUX__LOG": "jetstream", "AITHER_FLUX__NATS_URL": url, **more},
    )


@contextmanager
def nodes(*processes: ServiceProcess) -> Iterator[None]:
    with ExitStack() as stack:
        for process in processes:
            stack.callback(process.close)
            process.start()
        yield


@dataclass
class Load:
    """Publishers and one subscriber on every node."""

    fluxes: Sequence[ServiceProcess]
    histories: list[History]

    @property
    def acknowledged(self) -> int:
        return sum(len(history.acknowledged) for history in self.histories)

    async def goes_on(self, limit_s: float = 30.0) -> None:
        """Until every node has acknowledged something more."""
        before = [len(history.acknowledged) for history in self.histories]
        async with asyncio.timeout(limit_s):
            while any(
                len(history.acknowledged) <= then
                for history, then in zip(self.histories, before, strict=True)
            ):
                await asyncio.sleep(0.01)


@asynccontextmanager
async def load(*fluxes: ServiceProcess) -> AsyncIterator[Load]:
    """Runs it over the block; then everything is answered, read back and checked."""
    made = Load(fluxes, [History() for _ in fluxes])
    stop = asyncio.Event()
    pairs = list(zip(fluxes, made.histories, strict=True))
    followers = [asyncio.create_task(follow(flux, history)) for flux, history in pairs]
    publishers = [
        asyncio.create_task(publish(flux, f"p{n}-{m}", stop, history))
        for n, (flux, history) in enumerate(pairs)
        for m in range(2)
    ]
    try:
        await made.goes_on()
        yield made
        await made.goes_on()
        stop.set()
        async with asyncio.timeout(40):
            await asyncio.gather(*publishers)
            logs = [await read_all(flux, made.acknowledged) for flux in fluxes]
            for history in made.histories:
                while len(history.handled) < len(logs[0]):
                    await asyncio.sleep(0.02)
    finally:
        stop.set()
        for task in (*followers, *publishers):
            task.cancel()
        await asyncio.wait((*followers, *publishers))
    keys = [[(event.sequence, event.source, event.id) for event in log] for log in logs]
    assert all(one == keys[0] for one in keys), "the nodes show different logs"
    acknowledged = {k: v for history in made.histories for k, v in history.acknowledged.items()}
    for history in made.histories:
        check(History(acknowledged, history.handled, history.gaps), logs[0])


async def survives_kills_of_nats(folder: Path, kills: int) -> None:
    chance = random.Random(SEED)
    with nats_server(folder / "nats") as nats:
        flux = flux_over(nats.url, folder / "flux", AITHER_FLUX__NATS_SYNCED="true")
        with nodes(flux):
            async with load(flux) as running_load:
                for _ in range(kills):
                    await asyncio.sleep(chance.uniform(0.1, 0.4))
                    await asyncio.to_thread(nats.kill)
                    await asyncio.to_thread(nats.start)
                    await running_load.goes_on()


async def test_nats_killed_under_load_loses_and_doubles_nothing(tmp_path: Path) -> None:
    await survives_kills_of_nats(tmp_path, 2)


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_nats_killed_again_and_again_loses_and_doubles_nothing(tmp_path: Path) -> None:
    await survives_kills_of_nats(tmp_path, 20)


@pytest.mark.slow  # tests/flux/test_jetstream_nodes.py has it in short
@pytest.mark.timeout(120)
async def test_a_node_that_is_cut_off_comes_back_without_loss(tmp_path: Path) -> None:
    with nats_server(tmp_path / "nats") as nats:
        async with Proxy(nats.port) as proxy:
            far = flux_over(f"nats://127.0.0.1:{proxy.port}", tmp_path / "far")
            near = flux_over(nats.url, tmp_path / "near")
            with await asyncio.to_thread(entered, far, near):
                async with load(far, near) as running_load:
                    proxy.part()
                    cut = running_load.histories[0].acknowledged
                    await asyncio.sleep(1.0)
                    then = len(cut)
                    await asyncio.sleep(3.0)
                    assert len(cut) == then, "acknowledged without NATS"
                    proxy.heal()
                    await running_load.goes_on()


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_nodes_killed_under_load_lose_and_double_nothing(tmp_path: Path) -> None:
    with nats_server(tmp_path / "nats") as nats:
        fluxes = [flux_over(nats.url, tmp_path / f"flux{n}") for n in range(2)]
        started = await asyncio.to_thread(entered, *fluxes)
        with started:
            async with load(*fluxes) as running_load:
                for n in range(6):
                    await asyncio.to_thread(fluxes[n % 2].kill)
                    await asyncio.to_thread(fluxes[n % 2].start)
                    await running_load.goes_on(60.0)


def entered(*fluxes: ServiceProcess) -> ExitStack:
    """Nodes that run until the stack is closed."""
    stack = ExitStack()
    stack.enter_context(nodes(*fluxes))
    return stack


async def survives_loss_of_the_leader(folder: Path, losses: int) -> None:
    """The last one that is lost stays away."""
    with nats_cluster(folder / "nats") as servers:
        url = ",".join(server.url for server in servers)
        fluxes = [
            flux_over(url, folder / f"flux{n}", AITHER_FLUX__NATS_REPLICAS="3") for n in range(2)
        ]
        with nodes(*fluxes):
            async with load(*fluxes) as running_load:
                away: NatsServer | None = None
                for _ in range(losses):
                    if away is not None:
                        await asyncio.to_thread(away.start)
                        await running_load.goes_on()
                        await asyncio.to_thread(until_current, servers)
                    away = await asyncio.to_thread(leader_of, servers)
                    await asyncio.to_thread(away.kill)
                    await running_load.goes_on()


@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_a_cluster_that_loses_its_leader_loses_no_event(tmp_path: Path) -> None:
    await survives_loss_of_the_leader(tmp_path, 1)


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_a_cluster_that_loses_one_leader_after_the_other_loses_no_event(
    tmp_path: Path,
) -> None:
    await survives_loss_of_the_leader(tmp_path, 5)
