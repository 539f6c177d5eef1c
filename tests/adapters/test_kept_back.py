"""The last step keeps devices back: a fault that comes late meets a fleet that is not all there."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import select

from controller import invariants
from controller.manifests.admission import admit
from controller.manifests.reader import read
from controller.rollout import scope
from controller.rollout.waves import Pinned, grown
from controller.store import snapshot, views
from controller.store.tables import decisions, members
from telemetry.store.database import reading

from .story import DIGESTS, MARGINS, base, rollout

CANARY = {"cohort": "canary", "soak": "3s", "maxSoak": "20s", "margins": MARGINS}
KEPT = {
    "cohort": "general", "soak": "3s", "maxSoak": "60s", "margins": MARGINS,
    "keepBack": {"percent": "25%", "for": "30s"},
}  # fmt: skip
GENERAL = 28  # devices, of 40
HELD = 7  # a quarter of them


def told(story: Any, release: str) -> set[str]:
    digest = DIGESTS[release]
    return {
        device
        for device, orders in story.world.orders.items()
        if any(c.digest == digest for order in orders for c in order.components.values())
    }


def test_some_wait_until_the_others_were_watched_then_follow(story: Any) -> None:
    story.commit(*base(), rollout("cars", "app-2", [CANARY, KEPT]))
    story.run(30)
    assert story.versions() == {"1": HELD, "2": 40 - HELD}
    assert story.rollout().state == "Soaking"
    kept = set(story.world.rows) - told(story, "2")
    with reading(story.engine) as conn:
        controls = select(members.c.device).where(members.c.step == 1, members.c.arm == "control")
        assert {row.device for row in conn.execute(controls)} == kept
    story.run(20)
    assert story.versions() == {"2": 40}
    assert story.rollout().state == "Completed"


def test_who_was_kept_back_never_meets_what_was_found_meanwhile(story: Any) -> None:
    story.commit(*base(), rollout("cars", "app-2", [CANARY, KEPT]))
    story.run(25)
    kept = set(story.world.rows) - told(story, "2")
    assert len(kept) == HELD
    story.command("rollback")
    story.run(60)
    assert story.versions() == {"1": 40}
    assert not kept & told(story, "2")


def test_the_decisions_name_both_parts(story: Any) -> None:
    story.commit(*base(), rollout("cars", "app-2", [CANARY, KEPT]))
    story.run(60)
    with reading(story.engine) as conn:
        said = [row.sentence for row in conn.execute(select(decisions).order_by(decisions.c.id))]
    assert any("step 2 of 3 (general 75%)" in sentence for sentence in said)
    assert any("step 3 of 3 (general all)" in sentence for sentence in said)


def test_both_parts_can_be_named_in_a_scope(story: Any) -> None:
    story.commit(*base(), rollout("cars", "app-2", [CANARY, KEPT]))
    story.run(5)
    pinned = story.rollout().pinned
    assert scope.empty({"step": 2}, pinned) == ""
    assert "its last one is step 3" in scope.empty({"step": 3}, pinned)


def test_both_parts_are_shown_as_steps(story: Any) -> None:
    story.commit(*base(), rollout("cars", "app-2", [CANARY, KEPT]))
    story.run(60)
    row = story.rollout()
    with reading(story.engine) as conn:
        shown = views.rollout(row, views.count_members(conn, [row.id])[row.id], ())
        cohorts = views.cohorts_of_steps(conn, [row.id])[row.id]
    assert [step["percent"] for step in shown["steps"]] == [1.0, 0.75, 1.0]
    assert shown["step"] == 2
    assert sum(shown["members"]["steps"]["2"].values()) == HELD
    assert cohorts == ["canary", "general", "general"]


def test_the_checker_knows_both_parts(story: Any) -> None:
    paced = {**KEPT, "maxPerMinute": "60"}
    story.commit(*base(), rollout("cars", "app-2", [CANARY, paced]))
    story.run(60)
    assert story.rollout().state == "Completed"
    assert not invariants.check(snapshot.read(story.engine, None), now=story.world.now)


@pytest.mark.parametrize(
    "steps",
    [
        [CANARY, KEPT],
        [CANARY, {"cohort": "general", "percent": "60%"}, KEPT],
    ],
)
def test_no_growth_reaches_who_is_kept_back(story: Any, steps: list[Any]) -> None:
    story.commit(*base(), rollout("cars", "app-2", steps))
    story.run(2)
    waves = Pinned.from_json(story.rollout().pinned).waves
    assert max(grown(waves, wave, 2).step.percent for wave in waves[1:-1]) == 0.75


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([CANARY, {**KEPT, "percent": "20%"}], "keepBack keeps everybody back"),
        (
            [CANARY, {"cohort": "general", "percent": "80%"}, KEPT],
            "general has reached 80% before, and keepBack leaves nobody above it",
        ),
    ],
)
def test_a_step_that_keeps_everybody_back_is_refused(steps: list[Any], expected: str) -> None:
    documents = [*base(), rollout("cars", "app-2", steps)]
    found = read({"fleet.yaml": "---\n".join(documents)})
    problems = [p for p in (*found.problems, *admit(found)) if p.severity == "error"]
    assert any(expected in problem.message for problem in problems), problems


def test_what_is_kept_back_is_in_force(story: Any) -> None:
    documents = [*base(), rollout("cars", "app-2", [CANARY, KEPT])]
    found = read({"fleet.yaml": "---\n".join(documents)})
    assert not [*found.problems, *admit(found)]
