"""Histories from seeds, and one story with a death at every port call."""

from __future__ import annotations

import pytest

from bench.world import history
from bench.world.databases import Databases
from bench.world.points import Points
from bench.world.world import World

from bench.world import texts  # isort: skip

MARGINS = {"failed": "75%", "lost": "75%"}
STEP = {"soak": "2s", "maxSoak": "60s", "margins": MARGINS}
STEPS = [{"cohort": "canary", **STEP}, {"cohort": "general", **STEP}]


def told(outcome: history.Outcome) -> str:
    return "\n".join([*map(str, outcome.findings), *outcome.lines])


@pytest.mark.parametrize("seed", [str(n) for n in range(1, 21)])
def test_a_history_keeps_every_promise(databases: Databases, seed: str) -> None:
    outcome = history.run(databases, seed)
    assert not outcome.findings, told(outcome)


def test_one_seed_is_one_history(databases: Databases) -> None:
    first, second = (history.run(databases, "7", named=True) for _ in range(2))
    assert first == second
    assert first.points > 100


def story(databases: Databases, kills: frozenset[int]) -> tuple[World, Points]:
    """Four devices, two of them canaries: 2 reaches the canary and is rolled back by a person."""
    points = Points(kill=kills)
    points.recording = True
    world = World(databases, "every point", points)
    for n in range(4):
        world.enrol(f"car-{n}", **({"ring": "canary"} if n < 3 else {}))
    base = {
        "fleet.yaml": texts.fleet(),
        "policy.yaml": texts.policy(),
        "1.yaml": texts.release("1"),
    }
    world.commit(base)
    world.start()
    world.run(4)
    cars = texts.rollout("2", STEPS, {"silentAfter": "20s"})
    world.commit({"2.yaml": texts.release("2"), "cars.yaml": cars})
    world.run(8)
    for _ in range(5):  # whose API died, or whose rollout is not there yet, asks again
        if world.ask("rollback"):
            break
        world.run(3)
    world.run(36)
    return world, points


def dies_at(databases: Databases, k: int) -> None:
    world, points = story(databases, frozenset({k}))
    where = f"died at {points.killed}"
    assert [str(finding) for finding in world.check()] == [], where
    running = {d.name: d.disk.active[texts.COMPONENT] for d in world.devices.values()}
    assert set(running.values()) == {texts.artifact("1")}, f"{where}: {running}"


def test_who_dies_at_a_port_call_changes_nothing(databases: Databases) -> None:
    """Every 23rd point of the story; all of them in the long run."""
    _, points = story(databases, frozenset())
    assert {name.rpartition("/")[2] for name in points.names} >= {
        "control.begin", "control.commit", "telemetry.begin", "telemetry.commit", "publish",
        "published", "puback", "git.fetch", "git.push", "git.pushed", "journal.save",
        "journal.saved", "outbox.put", "disk.install", "disk.switch", "disk.switched",
    }  # fmt: skip
    for k in range(5, points.count, 23):
        dies_at(databases, k)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_who_dies_at_any_port_call_changes_nothing(databases: Databases) -> None:
    _, points = story(databases, frozenset())
    for k in range(1, points.count + 1):
        dies_at(databases, k)
