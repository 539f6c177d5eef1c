"""Devices that run a digest which no release document names: kept, adopted, or brought along."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from device_agent.protocol import Kind

from .story import DIGESTS, Story, base, fleet, policy, release, rollout

STRANGE = "sha256:" + "f" * 64
STEPS = [
    {"cohort": name, "soak": "3s", "maxSoak": "20s", "margins": {"failed": "70%", "lost": "70%"}}
    for name in ("canary", "general")
]


def documents(on_unknown: str) -> list[str]:
    declared = json.loads(fleet())
    declared["spec"]["onUnknown"] = on_unknown
    return [json.dumps(declared) + "\n", policy(), *(release(v) for v in ("1", "2", "3", "3.1"))]


@pytest.fixture
def story(tmp_path: Path) -> Story:
    made = Story(tmp_path)
    names = [f"car-{i:02}" for i in range(24)]
    made.enrol(*names[:8], model="m3", ring="canary")
    made.enrol(*names[8:], model="m3")
    for name in names:
        made.world.join(name, {"app": ("app-1", DIGESTS["1"])})
    made.world.join("car-20", {"app": ("home-made", STRANGE)})
    return made


def runs(cars: Story, name: str = "car-20") -> str:
    return cars.world.rows[name].components["app"].digest


@pytest.mark.parametrize(
    ("rule", "then"), [("keep", STRANGE), ("adopt", STRANGE), ("converge", DIGESTS["1"])]
)
def test_what_a_device_runs_that_nobody_knows(story: Story, rule: str, then: str) -> None:
    story.commit(*documents(rule))
    story.run(5)
    assert runs(story) == then


@pytest.mark.parametrize("rule", ["keep", "adopt"])
def test_it_takes_part_in_the_next_rollout(story: Story, rule: str) -> None:
    story.commit(*documents(rule))
    story.run(3)
    story.commit(*documents(rule), rollout("cars", "app-2", STEPS))
    story.run(60)
    assert story.rollout().state == "Completed"
    assert runs(story) == DIGESTS["2"]


def test_a_proven_release_reaches_whom_it_has_adopted_and_not_whom_it_keeps(
    tmp_path: Path,
) -> None:
    """Two that came while 2 was rolled out, and are in no step of it."""
    for rule, then in (("keep", STRANGE), ("adopt", DIGESTS["2"])):
        (tmp_path / rule).mkdir()
        cars = Story(tmp_path / rule)
        names = [f"car-{i:02}" for i in range(24)]
        cars.enrol(*names[:8], model="m3", ring="canary")
        cars.enrol(*names[8:], model="m3")
        for name in names:
            cars.world.join(name, {"app": ("app-1", DIGESTS["1"])})
        long = [{**STEPS[0], "pause": {}}, STEPS[1]]
        cars.commit(*documents(rule), rollout("cars", "app-2", long))
        cars.run(20)
        cars.command("promote")
        cars.run(1)
        cars.enrol("late", model="m3")  # after the last step was drawn
        cars.world.join("late", {"app": ("home-made", STRANGE)})
        cars.run(40)
        assert cars.rollout().state == "Completed"
        assert cars.world.rows["late"].components["app"].digest == then


def test_what_nobody_knows_is_never_an_order_back(story: Story) -> None:
    """Its previous set cannot be ordered: it goes to the proven one."""
    story.commit(*documents("adopt"))
    story.run(3)
    story.commit(*documents("adopt"), rollout("cars", "app-2", STEPS))
    story.run(60)
    assert runs(story) == DIGESTS["2"]
    story.commit(*documents("adopt"), rollout("cars", "app-3", STEPS))
    story.run(60)
    story.command("rollback")
    story.run(10)
    assert runs(story) == DIGESTS["2"]
    orders = story.world.orders["car-20"]
    assert orders[-1].kind is Kind.ROLLBACK
    assert STRANGE not in {told.digest for order in orders for told in order.components.values()}


@pytest.mark.parametrize("rule", ["keep", "adopt"])
def test_a_rollback_of_its_first_release_leads_to_the_proven_set(story: Story, rule: str) -> None:
    slow = [STEPS[0], {"cohort": "general", "soak": "1h", "maxSoak": "2h"}]
    story.commit(*documents(rule), rollout("cars", "app-2", slow))
    story.run(12)
    assert runs(story) == DIGESTS["2"]
    story.command("rollback")
    story.run(10)
    assert runs(story) == DIGESTS["1"]
    assert story.rollout().state == "RolledBack"


def test_a_named_release_is_where_the_policy_rolls_back_to(tmp_path: Path) -> None:
    """`rollback: {to: app-2}`: not what each device ran before."""
    cars = Story(tmp_path)
    names = [f"car-{i:02}" for i in range(24)]
    cars.enrol(*names, model="m3", ring="canary")
    for name in names:
        cars.world.join(name, {"app": ("app-1", DIGESTS["1"])})
    cars.world.broken.add(DIGESTS["3"])
    brake = {"abortFailed": {"count": "2", "share": "10%"}}
    way, some = {"rollback": {"to": "app-2"}}, {"partial": "true"}
    cars.commit(*base(), rollout("cars", "app-3", STEPS[:1], strategy=brake | some, **way))
    cars.run(10)
    assert cars.rollout().state == "RolledBack"
    cars.world.broken.clear()
    cars.commit(*base(), rollout("cars", "app-3.1", STEPS[:1], strategy=some, **way))
    cars.run(3)
    assert cars.versions() == {"3.1": 24}
    cars.command("rollback", body={"to": "app-2"})
    cars.run(10)
    assert cars.versions() == {"2": 24}
