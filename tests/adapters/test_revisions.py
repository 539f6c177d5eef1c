"""A metric whose meaning changed is never compared with what it was."""

from __future__ import annotations

from typing import Any

from telemetry.report import HealthRow

from .story import DIGESTS, MARGINS, document, fleet, release, rollout

STEPS = [
    {"cohort": name, "soak": "3s", "maxSoak": "20s", "margins": MARGINS}
    for name in ("canary", "general")
]


def commit(story: Any, to: str, baseline: str = "app-1", **metrics: dict[str, str]) -> None:
    """`metrics`: version → what its release declares, as r1, r2 …"""
    gates = [
        {"metric": "update_ok", "type": "proportion"},
        {"metric": "jerk", "type": "rate", "budget": {"per_device_hour": "0.5"}},
    ]
    policy = document("HealthPolicy", "driving", {"gates": gates})
    releases = [
        release(v, **({"metrics": metrics[f"r{v}"]} if f"r{v}" in metrics else {}))
        for v in ("1", "2", "3")
    ]
    story.commit(fleet(baseline=baseline), policy, *releases, rollout("cars", f"app-{to}", STEPS))


def drive(
    story: Any, seconds: int, jerks: bool = False, *, usual: str = "1", away: str = ""
) -> None:
    """Everybody reports an hour of health each second; who left the usual version jerks all the
    time, or not. `away`: is not there."""
    there = [name for name in story.world.rows if name != away]
    for _ in range(seconds):
        story.run(1, work=False)
        story.world.work(*there)
        for name in there:
            row = story.world.rows[name]
            digest = row.components["app"].digest
            new = digest != DIGESTS[usual]
            story.world.batch += 1
            story.world.health.append(
                HealthRow(
                    batch=story.world.batch, device=name, received_at=story.world.now, boot="b",
                    seq=story.world.batch, attempt=row.attempt, components={"app": digest},
                    t0=story.world.now - 1, seconds=1.0, counters={"jerk": 5 * (jerks and new)},
                    exposure={"device_hour": 1.0}, levels={},
                )
            )  # fmt: skip


def test_another_revision_neither_rolls_back_nor_widens(story: Any) -> None:
    commit(story, "2", r2={"jerk": "2"})
    drive(story, 15, jerks=True)
    assert story.versions() == {"1": 28, "2": 12}
    why = "jerk: app-2 reports revision 2 of it, app-1 revision 1: they are never compared"
    assert why in story.rollout().sentence
    drive(story, 15, jerks=True)
    assert story.rollout().state == "Inconclusive"
    story.command("promote")
    drive(story, 2)
    assert story.versions() == {"2": 40}


def test_the_same_revision_is_compared_as_ever(story: Any) -> None:
    commit(story, "2", r1={"jerk": "2"}, r2={"jerk": "2"})
    drive(story, 30)
    assert story.versions() == {"2": 40}


def test_the_same_revision_rolls_back_as_ever(story: Any) -> None:
    commit(story, "2", r1={"jerk": "2"}, r2={"jerk": "2"})
    drive(story, 30, jerks=True)
    assert story.versions() == {"1": 40}
    assert "jerk" in story.rollout().sentence


def test_what_nobody_gates_is_not_asked(story: Any) -> None:
    commit(story, "2", r2={"something_else": "2"})
    drive(story, 30)
    assert story.versions() == {"2": 40}


def test_one_that_lies_in_a_drawer_does_not_take_the_gates_word_away(story: Any) -> None:
    world = story.world
    for name in world.rows:
        if name != "car-39":
            world.join(name, {"app": ("app-2", DIGESTS["2"])})
    world.now, world.heard = world.now + 7 * 86_400, world.heard + 7 * 86_400
    commit(story, "3", "app-2", r2={"jerk": "2"}, r3={"jerk": "2"})
    drive(story, 30, jerks=True, usual="2", away="car-39")
    assert story.versions() == {"1": 1, "2": 39}
    assert "jerk" in story.rollout().sentence
