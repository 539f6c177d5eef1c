"""What a rollout does while somebody is away: broker, ingest, a device for weeks, the database."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from sqlalchemy import select

from bench.world import texts
from bench.world.databases import Databases
from bench.world.device import Nature
from bench.world.world import World
from controller.store import rollouts as store
from controller.store.tables import decisions, holds, members, rollouts
from telemetry.store.database import reading

WEEK = 7 * 86_400.0
MARGINS = {"failed": "75%", "lost": "75%"}
STEP = {"soak": "3s", "maxSoak": "60s", "margins": MARGINS}
SLOW = [{"cohort": "canary", **STEP, "soak": "40s"}, {"cohort": "general", **STEP}]
STEPS = [{"cohort": "canary", **STEP}, {"cohort": "general", **STEP}]
STRATEGY = {"silentAfter": "20s", "maxFailed": "1%"}


@pytest.fixture
def world(databases: Databases) -> World:
    """Ten devices on version 1, four of them canaries, and a service that has heard them."""
    made = World(databases, "absences")
    for n in range(10):
        made.enrol(f"car-{n}", **({"ring": "canary"} if n < 4 else {}))
    made.commit(
        {"fleet.yaml": texts.fleet(), "policy.yaml": texts.policy(), "1.yaml": texts.release("1")}
    )
    made.start()
    made.run(6)
    return made


def publish(world: World, version: str, steps: list = STEPS, **more: object) -> None:
    world.commit(
        {
            f"{version}.yaml": texts.release(version, **more),
            "cars.yaml": texts.rollout(version, steps, STRATEGY),
        }
    )


def runs(world: World, name: str) -> str:
    names = {texts.artifact(v): v for v in ("1", "2", "3", "4")}
    return names[world.devices[name].disk.active[texts.COMPONENT]]


def versions(world: World) -> dict[str, int]:
    return dict(Counter(runs(world, name) for name in world.devices))


def newest(world: World) -> tuple[str, int, str]:
    with reading(world.databases.control) as conn:
        row = conn.execute(
            select(rollouts).order_by(rollouts.c.opened_at.desc(), rollouts.c.id.desc())
        ).first()
    return (row.state, row.step, row.sentence) if row else ("none", 0, "")


def until(world: World, true: Callable[[], bool], seconds: int = 120) -> None:
    for _ in range(seconds * 4):
        if true():
            return
        world.run(0.25)
    raise AssertionError(f"not within {seconds} s: {newest(world)} {world.lines[-5:]}")


def counted(world: World) -> tuple[dict[str, int], int]:
    """States of the members, and how many decisions there are."""
    with reading(world.databases.control) as conn:
        states = Counter(row.state for row in conn.execute(select(members)))
        return dict(states), len(conn.execute(select(decisions.c.id)).all())


@pytest.mark.parametrize(
    ("who", "moment"),
    [("broker", 6), ("broker", 12), ("broker that forgets", 2), ("ingest", 2), ("ingest", 12)],
)
def test_ten_minutes_away_in_mid_rollout(world: World, who: str, moment: int) -> None:
    publish(world, "2", SLOW)
    world.run(moment)
    if who == "ingest":
        world.ingest_away(600)
    else:
        world.broker_away(600, forgot="forgets" in who)
    world.run(8)  # what had been heard before may still be decided
    before, step = counted(world)[0], newest(world)[1]
    world.run(585)
    after, later = counted(world)[0], newest(world)[1]
    assert step == later == 0
    assert after.get("silent", 0) == after.get("failed", 0) == 0
    assert after == before
    assert newest(world)[0] not in ("RollingBack", "RolledBack", "Held")
    until(world, lambda: versions(world) == {"2": 10})
    until(world, lambda: newest(world)[0] == "Completed")
    assert world.check() == []


def test_soak_does_not_pass_while_nobody_is_heard(world: World) -> None:
    publish(world, "2", SLOW)
    until(world, lambda: newest(world)[0] == "Soaking")
    world.broker_away(600)
    world.run(590)
    assert newest(world)[1] == 0
    with reading(world.databases.control) as conn:
        (soak,) = conn.execute(select(rollouts.c.soak)).one()
    assert soak < 20


def test_a_device_that_slept_through_rollback_and_fix(world: World) -> None:
    """It was told 2, slept before it could begin, and returns weeks later: it never starts 2."""
    world.natures[texts.artifact("2")] = Nature(boots=0.0)
    sleeper = world.devices["car-0"]
    publish(world, "2")
    until(world, lambda: any(s.device == "car-0" for s in world.wire.sent))
    sleeper.lose_network(3 * WEEK)
    sleeper.sleep(2 * WEEK)
    until(world, lambda: newest(world)[0] == "RolledBack")
    publish(world, "3", fixes="app-2")
    until(world, lambda: newest(world)[0] == "Completed")
    assert runs(world, "car-0") == "1"
    world.leap(2 * WEEK)
    sleeper.reachable = True
    sleeper.start()
    until(world, lambda: runs(world, "car-0") == "3")
    world.run(20)
    assert versions(world) == {"3": 10}
    assert texts.artifact("2") not in {start.digest for start in sleeper.disk.started}
    assert world.check() == []


def test_a_device_that_slept_in_the_middle_of_the_update(world: World) -> None:
    """It had begun with 2; what it does when it wakes comes before the broker's word."""
    sleeper = world.devices["car-0"]
    publish(world, "2", SLOW)
    until(world, lambda: str(sleeper.agent and sleeper.agent.state) == "DOWNLOADING")
    sleeper.sleep(2 * WEEK)
    until(world, lambda: versions(world).get("2", 0) == 3)
    world.ask("rollback")
    until(world, lambda: newest(world)[0] == "RolledBack")
    publish(world, "3", fixes="app-2")
    until(world, lambda: newest(world)[0] == "Completed")
    world.leap(2 * WEEK)
    sleeper.start()
    until(world, lambda: runs(world, "car-0") == "3")
    world.run(20)
    assert texts.artifact("2") not in {start.digest for start in sleeper.disk.started}
    assert world.check() == []


def test_an_empty_control_database(world: World) -> None:
    """Holds and releases come back from Git, installed releases from devices; nothing moves."""
    publish(world, "2")
    until(world, lambda: newest(world)[0] == "Completed")
    publish(world, "3")
    until(world, lambda: versions(world).get("3", 0) == 4)
    world.ask("rollback")
    until(world, lambda: versions(world) == {"2": 10})
    world.run(40)  # the hold is in Git
    publish(world, "4", SLOW)
    until(world, lambda: versions(world).get("4", 0) == 4)
    starts = {d.name: len(d.disk.started) for d in world.devices.values()}
    world.lose_control_database(backup=False)
    world.run(200)
    assert newest(world)[0] == "Paused"
    assert {d.name: len(d.disk.started) for d in world.devices.values()} == starts
    with reading(world.databases.control) as conn:
        held = conn.execute(select(holds)).one()
        assert {"app-1", "app-2", "app-3", "app-4"} == set(store.load_releases(conn))
    assert (held.release, held.artifacts) == ("app-3", [texts.artifact("3")])
    world.ask("resume")
    until(world, lambda: versions(world) == {"4": 10}, 200)
    assert world.check() == []
