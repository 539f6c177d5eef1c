"""Who comes first, and a wave that is too small to prove anything."""

from __future__ import annotations

import pytest
from sqlalchemy import select

from controller.store.tables import decisions
from telemetry.store.database import reading

from .story import DIGESTS, MARGINS, Story, base, release, rollout


def test_a_fix_goes_first_to_the_devices_that_ran_the_fault(story: Story) -> None:
    story.world.broken.add(DIGESTS["2"])
    story.commit(*base(), rollout("cars", "app-2"))
    story.run(8)
    assert story.rollout().state == "RolledBack"
    assert story.rollout().sentence.count("by policy") == 1
    story.commit(*base(), release("3", name="app-fix", fixes="app-2"), rollout("cars", "app-fix"))
    story.run(1)
    with reading(story.engine) as conn:
        drawn = conn.execute(
            select(decisions.c.sentence).where(decisions.c.kind == "draw").order_by(decisions.c.id)
        ).all()[-1]
    assert "app-2's devices" in drawn.sentence
    story.run(60)
    assert story.versions() == {"3": 40}


@pytest.mark.parametrize("rule", ["grow", "pause"])
def test_a_wave_too_small_to_prove_anything_is_doubled_once(story: Story, rule: str) -> None:
    # 6 of the 12 canaries cannot refute 30 %; all 12 can. More time would not help.
    half = {"cohort": "canary", "percent": "50%", "soak": "3s", "maxSoak": "20s"}
    steps = [{**half, "margins": MARGINS}, {"cohort": "general", "soak": "3s", "margins": MARGINS}]
    story.commit(
        *base(),
        rollout("cars", "app-2", steps=steps, strategy={"onInconclusive": rule, "partial": "true"}),
    )
    story.run(60)
    with reading(story.engine) as conn:
        rows = conn.execute(select(decisions.c.kind, decisions.c.sentence)).all()
    growing = [row.sentence for row in rows if row.sentence.startswith("GROWING")]
    draws = [row for row in rows if row.kind == "draw"]
    if rule == "pause":
        assert growing == []
        assert story.rollout().state == "Inconclusive"
        assert story.versions()["2"] == 6
        return
    assert len(growing) == 1
    assert "more devices can tell what more time cannot" in growing[0]
    assert len(draws) == 3
    assert story.versions() == {"2": 40}


def test_a_step_that_waits_for_a_person_waits_when_the_policy_proceeds_too(story: Story) -> None:
    """`proceed` gives up the proof; with `pause: {}` somebody wants to look before it widens."""
    few = {"cohort": "canary", "percent": "25%", "soak": "3s", "maxSoak": "6s", "margins": MARGINS}
    steps = [{**few, "pause": {}}, {"cohort": "general", "soak": "3s", "margins": MARGINS}]
    proceed = {"proceed": {"minHealthy": "1", "afterSoak": "3s", "maxDevices": "1000"}}
    strategy = {"onInconclusive": proceed, "partial": "true"}
    story.commit(*base(), rollout("cars", "app-2", steps=steps, strategy=strategy))
    story.run(30)
    assert story.versions()["2"] == 3
    assert story.rollout().state == "Paused"
    assert "UNPROVEN, the step waits for `promote`" in story.rollout().sentence
    story.command("resume")  # who did not want to look longer has not said that it may widen
    story.run(5)
    assert story.rollout().state == "Paused"
    story.command("promote")
    story.run(30)
    assert story.versions() == {"2": 40}


@pytest.mark.parametrize(("percent", "canaries"), [("25%", 40), ("10%", 5)])
def test_a_wave_is_doubled_at_most_twice(story: Story, percent: str, canaries: int) -> None:
    """3 canaries become 6, then the 12 that refute 30 %; 10 % become 5: a person."""
    few = {"cohort": "canary", "percent": percent, "soak": "3s", "maxSoak": "20s"}
    steps = [{**few, "margins": MARGINS}, {"cohort": "general", "soak": "3s", "margins": MARGINS}]
    story.commit(
        *base(),
        rollout(
            "cars", "app-2", steps=steps, strategy={"onInconclusive": "grow", "partial": "true"}
        ),
    )
    story.run(120)
    with reading(story.engine) as conn:
        said = conn.execute(select(decisions.c.sentence)).scalars().all()
    growing = [sentence for sentence in said if sentence.startswith("GROWING")]
    assert len(growing) == 2
    assert "is doubled:" in growing[0]
    assert "is doubled again:" in growing[1]
    assert story.versions()["2"] == canaries
    assert story.rollout().state == ("Completed" if canaries == 40 else "Inconclusive")


def test_a_wave_that_grows_has_soaked_already(story: Story) -> None:
    """It asked for devices, not for time; but it gets what is left until the maximum once more."""
    half = {"cohort": "canary", "percent": "50%", "soak": "30s", "maxSoak": "90s"}
    steps = [{**half, "margins": MARGINS}, {"cohort": "general", "soak": "3s", "margins": MARGINS}]
    story.commit(
        *base(),
        rollout(
            "cars", "app-2", steps=steps, strategy={"onInconclusive": "grow", "partial": "true"}
        ),
    )
    for _ in range(60):
        story.run(1)
        if story.rollout().flags.get("grown") == 0:
            break
    assert story.rollout().flags["grown"] == 0
    story.run(11)  # far less than to soak anew
    assert story.rollout().step == 1
