"""What a device is handed by HTTP while the controller is away and people act: never what is held.

The stage: 2 has reached the canaries, and everybody was told something. Then the controller is
gone, a person stops 2 at the API, and devices ask for their order.
"""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import select, update

from bench.world import texts
from bench.world.databases import Databases
from bench.world.world import World
from controller.manifests.reader import read
from controller.store import devices as registry_rows
from controller.store import handout
from controller.store.tables import devices as registry
from controller.store.tables import releases
from device_agent.protocol import open_envelope
from telemetry.store.database import reading, writing

MARGINS = {"failed": "75%", "lost": "75%"}
STEP = {"soak": "60s", "maxSoak": "90s", "margins": MARGINS}
STEPS = [{"cohort": "canary", **STEP}, {"cohort": "general", **STEP}]
EVERYBODY = {"car-0", "car-1", "car-2", "car-3"}


@pytest.fixture
def world(databases: Databases) -> World:
    """2 is told to the four canaries and runs on none of them yet; nobody leads any more."""
    world = World(databases, "handout")
    for n in range(6):
        world.enrol(f"car-{n}", **({"ring": "canary"} if n < 4 else {}), hardware="ab"[n % 2])
    labelled = texts.fleet().replace('"name": "cars"', '"name": "cars", "labels": {"product": "p"}')
    base = {"fleet.yaml": labelled, "policy.yaml": texts.policy()}
    world.commit({**base, "1.yaml": texts.release("1")})
    world.start()
    world.run(6)
    cars = texts.rollout("2", STEPS, {"silentAfter": "20s"})
    world.commit({"2.yaml": texts.release("2"), "cars.yaml": cars})
    world.run(0.5)
    world.controller_away(10_000)
    return world


def handed(world: World) -> dict[str, str]:
    """device → the release that it is handed."""
    found = {}
    with reading(world.databases.control) as conn:
        for name in world.devices:
            row = registry_rows.get(conn, name)
            assert row is not None
            body = handout.order(conn, row, world.databases.telemetry)
            if body is not None:
                found[name] = open_envelope(body)[0].components[texts.COMPONENT].release
    return found


def test_the_order_in_force_is_handed_out(world: World) -> None:
    assert handed(world) == dict.fromkeys(sorted(EVERYBODY), "app-2")


@pytest.mark.parametrize(
    ("kind", "body", "left"),
    [
        ("rollback", {}, set()),
        ("hold", {}, set()),
        ("hold", {"scope": {"step": 0}}, set()),
        ("hold", {"scope": {"cohort": "canary"}}, set()),
        ("hold", {"scope": {"cohort": "general"}}, EVERYBODY),
        ("hold", {"scope": {"devices": ["car-1"]}}, EVERYBODY - {"car-1"}),
        ("hold", {"scope": {"selector": {"matchLabels": {"hardware": "a"}}}}, {"car-1", "car-3"}),
        ("stop", {"scope": "all"}, set()),
        ("stop", {"scope": "hardware", "value": "b"}, {"car-0", "car-2"}),
        ("stop", {"scope": "product", "value": "else"}, EVERYBODY),
        ("stop", {"scope": "product", "value": "p"}, set()),
        ("stop", {"scope": "product", "value": "cars"}, set()),
        ("stop", {"scope": "digest", "value": "RELEASE"}, set()),
    ],
)
def test_what_people_stop_is_not_handed_out(
    world: World, kind: str, body: dict[str, Any], left: set[str]
) -> None:
    if body.get("value") == "RELEASE":  # the digest that its page shows
        with reading(world.databases.control) as conn:
            known = conn.execute(select(releases.c.digest).where(releases.c.name == "app-2"))
            body = {**body, "value": known.scalar_one()}
    assert world.ask(kind, None if kind == "stop" else texts.ROLLOUT, **body)
    assert set(handed(world)) == left


@pytest.mark.parametrize("scope", ["product", "digest", "artifact"])
def test_a_stop_that_is_older_than_the_release_stops_it(databases: Databases, scope: str) -> None:
    """Nothing of it was known when the person spoke: label and digest come with the commit."""
    release = next(iter(read({"2.yaml": texts.release("2")}).manifests.releases.values()))
    named = {"product": "p", "digest": release.digest, "artifact": release.artifacts[0].digest}
    world = World(databases, f"older {scope}")
    for n in range(4):
        world.enrol(f"car-{n}", ring="canary", hardware="a")
    world.commit({"policy.yaml": texts.policy(), "1.yaml": texts.release("1")})
    world.start()
    world.run(6)
    kind = "product" if scope == "product" else "digest"
    assert world.ask("stop", None, scope=kind, value=named[scope])
    labelled = texts.fleet().replace('"name": "cars"', '"name": "cars", "labels": {"product": "p"}')
    cars = texts.rollout("2", STEPS, {"silentAfter": "20s"})
    world.commit({"fleet.yaml": labelled, "2.yaml": texts.release("2"), "cars.yaml": cars})
    world.run(20)
    assert "app-2" not in handed(world).values()
    assert world.ask("stop", None, scope=kind, value=named[scope], lift=True)
    world.run(5)
    assert set(handed(world).values()) == {"app-2"}


def test_a_way_back_is_handed_out_in_a_stop(world: World) -> None:
    world.run(30)  # they run 2
    world.controllers[-1].process.again()
    world.ask("rollback")
    world.turn()
    world.controller_away(10_000)
    world.ask("stop", None, scope="all")
    assert handed(world) == dict.fromkeys(sorted(EVERYBODY), "app-1")


def test_who_stays_keeps_the_rest_of_its_order(world: World) -> None:
    """A hold that lets devices stay takes nothing from those that run what it rejects."""
    world.run(30)
    world.ask("hold", to="stay")
    assert set(handed(world)) == EVERYBODY


def test_a_moved_device_is_not_handed_its_former_fleets_order(world: World) -> None:
    with writing(world.databases.control) as conn:
        conn.execute(
            update(registry)
            .where(registry.c.id == "car-2")
            .values(fleet="trucks", moved_at=world.now)
        )
    assert set(handed(world)) == EVERYBODY - {"car-2"}


def test_what_an_old_backup_remembers_is_not_handed_out_before_git_answers(world: World) -> None:
    world.controllers[-1].process.again()
    world.run(3)
    world.databases.backup()
    world.ask("rollback")
    world.run(60)  # Git has the hold
    world.git_away(15)
    world.lose_control_database(backup=True)
    world.run(10)
    assert handed(world) == {}
    world.run(90)
    assert handed(world) == dict.fromkeys(sorted(EVERYBODY), "app-1")
