"""Stories told on the simulated world: production code, one thread, a clock that the test moves."""

from __future__ import annotations

from collections import Counter

import pytest
from sqlalchemy import select

from bench.world import texts
from bench.world.databases import Databases
from bench.world.world import World
from controller.store.tables import rollouts
from telemetry.store.database import reading

MARGINS = {"failed": "70%", "lost": "70%"}
STEP = {"soak": "3s", "maxSoak": "60s", "margins": MARGINS}
STEPS = [{"cohort": "canary", **STEP}, {"cohort": "general", **STEP}]
BASE = {
    "fleet.yaml": texts.fleet(),
    "policy.yaml": texts.policy(),
    "1.yaml": texts.release("1"),
}
STRATEGY = {"silentAfter": "20s", "maxFailed": "1%"}


@pytest.fixture
def world(databases: Databases) -> World:
    """Nine devices on version 1, three of them canaries, and a service that has heard them."""
    made = World(databases, "story")
    for n in range(9):
        made.enrol(f"car-{n:02}", **({"ring": "canary"} if n < 3 else {}))
    made.commit(BASE)
    made.start()
    made.run(6)
    return made


def publish(world: World, version: str) -> None:
    world.commit(
        {
            f"{version}.yaml": texts.release(version),
            "cars.yaml": texts.rollout(version, STEPS, STRATEGY),
        }
    )


def versions(world: World) -> dict[str, int]:
    """What really runs, by version."""
    names = {texts.artifact(v): v for v in ("1", "2", "3", "4")}
    return dict(Counter(names[d.disk.active[texts.COMPONENT]] for d in world.devices.values()))


def state(world: World) -> str:
    with reading(world.databases.control) as conn:
        row = conn.execute(
            select(rollouts.c.state).order_by(rollouts.c.opened_at.desc(), rollouts.c.id.desc())
        ).first()
    assert row is not None
    return str(row.state)


def test_a_commit_reaches_the_canary_and_then_the_fleet(world: World) -> None:
    publish(world, "2")
    seen = set()
    for _ in range(70):
        world.run(1)
        seen.add(versions(world).get("2", 0))
        canaries = [d for d in world.devices.values() if d.labels.get("ring") == "canary"]
        if any(d.disk.started for d in world.devices.values() if d not in canaries):
            assert all(d.disk.active[texts.COMPONENT] == texts.artifact("2") for d in canaries)
    assert 3 in seen
    assert versions(world) == {"2": 9}
    assert state(world) == "Completed"
    assert world.check() == []


def test_one_seed_is_one_history(databases: Databases) -> None:
    told = []
    for _ in range(2):
        world = World(databases, "twice")
        for n in range(5):
            world.enrol(f"car-{n}", **({"ring": "canary"} if n < 3 else {}))
        world.commit(
            {
                "fleet.yaml": texts.fleet(),
                "policy.yaml": texts.policy(),
                "1.yaml": texts.release("1"),
            }
        )
        world.wire.weather.cut = world.wire.weather.double = 0.05
        world.start()
        world.run(6)
        publish(world, "2")
        world.run(40)
        told.append((world.lines, world.points.count, [s.payload for s in world.wire.sent]))
    assert told[0] == told[1]
