"""What people tell a rollout: rollback, hold, lift, pause, resume; and a revert in Git."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import select

from controller import commands
from controller.store import rollouts as store
from controller.store.tables import holds, rollouts
from telemetry.store.database import reading, writing

from .story import DIGESTS, MARGINS, Story, base, fleet, policy, release, rollout


def test_rollback_by_a_person_sends_each_device_to_its_own_previous(story: Story) -> None:
    story.commit(*base(), rollout("cars", "app-2"))
    story.run(30)
    story.commit(*base(), rollout("cars", "app-3"))
    story.run(3)
    assert story.versions() == {"2": 28, "3": 12}
    story.command("rollback")
    story.run(3)
    assert story.versions() == {"2": 40}
    assert story.rollout().state == "RolledBack"
    assert {o[-1].kind for d, o in story.world.orders.items() if d < "car-12"} == {"rollback"}


def test_a_held_digest_moves_nothing_whatever_its_name(story: Story) -> None:
    story.commit(*base(), rollout("cars", "app-2"))
    story.run(3)
    story.command("rollback")
    story.run(5)
    story.commit(*base(), rollout("cars", "app-2"))
    story.run(5)
    renamed = release("9", artifact="2", name="app-9")
    story.commit(*base(), renamed, rollout("cars", "app-9"))
    story.run(5)
    assert story.versions() == {"1": 40}
    with reading(story.engine) as conn:
        notice = store.get_meta(conn, "notices")["cars"]
    assert "app-9 is rejected by hold" in notice
    story.commit(*base(), release("3", name="app-fix", fixes="app-2"), rollout("cars", "app-fix"))
    story.run(40)
    assert story.versions() == {"3": 40}


def test_a_lifted_digest_starts_again_at_step_one(story: Story) -> None:
    story.commit(*base(), rollout("cars", "app-2"))
    story.run(3)
    story.command("rollback")
    story.run(5)
    story.command("lift")
    story.run(3)
    assert story.versions() == {"1": 28, "2": 12}
    story.run(30)
    assert story.versions() == {"2": 40}


def test_a_lift_sets_free_the_release_of_its_rollout_and_no_other(story: Story) -> None:
    """2 is bad; 3 was held by mistake. Who lifts 3 has not looked at 2, which Git names again."""
    story.commit(*base(), rollout("cars", "app-2"))
    story.run(3)
    story.command("rollback")
    story.run(5)
    story.commit(*base(), rollout("cars", "app-3"))
    story.run(40)
    assert story.versions() == {"3": 40}
    story.command("hold")
    story.run(2)
    story.commit(*base(), rollout("cars", "app-2"))
    story.command("lift")
    story.run(30)
    assert story.versions() == {"3": 40}
    with reading(story.engine) as conn:
        left = conn.execute(select(holds.c.id, holds.c.release).where(holds.c.lifted_at.is_(None)))
        (still,) = left.all()
    assert still.release == "app-2"
    with pytest.raises(commands.Refused, match=f"in force are {still.id} on app-2"):
        story.command("lift")
    story.command("lift", body={"hold": still.id})
    story.run(60)
    assert story.versions() == {"2": 40}


def test_hold_leaves_devices_as_they_are(story: Story) -> None:
    story.commit(*base(), rollout("cars", "app-2"))
    story.run(2)
    story.command("hold")
    story.run(30)
    assert story.versions() == {"1": 28, "2": 12}
    assert story.rollout().state == "Held"


def test_a_reason_of_several_lines_is_quoted_in_one(story: Story) -> None:
    """Its second line would read as a sentence of ours, on a terminal and in a commit's status."""
    story.commit(*base(), rollout("cars", "app-2"))
    story.run(4)
    with writing(story.engine) as conn:
        row = conn.execute(select(rollouts).where(rollouts.c.name == "cars")).one()
        reason = "brakes\u202e\n\nCOMPLETED — app-2 on 40 of 40 devices"
        commands.add_hold(
            conn, dict(row._mapping), to="previous", actor="eve", reason=reason, incident=None,
            now=story.world.now,
        )  # fmt: skip
    story.run(4)
    sentence = story.rollout().sentence
    assert "brakes COMPLETED — app-2 on 40" in sentence
    assert "\n" not in sentence


def test_pause_tells_nobody_else_and_resume_goes_on(story: Story) -> None:
    story.commit(*base(), rollout("cars", "app-2"))
    story.run(2)
    story.command("pause")
    story.run(30)
    assert story.versions() == {"1": 28, "2": 12}
    assert story.rollout().state == "Paused"
    story.command("resume")
    story.run(30)
    assert story.versions() == {"2": 40}


def test_a_stale_revision_is_refused(story: Story) -> None:
    story.commit(*base(), rollout("cars", "app-2"))
    story.run(2)
    with pytest.raises(commands.Refused) as refused:
        story.command("rollback", if_revision=0)
    assert refused.value.code == 412
    assert story.rollout().state != "RollingBack"


def test_git_revert_goes_at_rollback_pace(story: Story) -> None:
    story.commit(*base(), rollout("cars", "app-2"))
    story.run(30)
    story.commit(*base(), rollout("cars", "app-3"))
    story.run(30)
    assert story.versions() == {"3": 40}
    story.commit(*base(), rollout("cars", "app-2"))
    story.run(3)
    assert story.versions() == {"2": 40}


def test_rolling_back_a_component_rolls_back_what_requires_it(tmp_path: Path) -> None:
    story = Story(tmp_path)
    names = [f"drone-{i:02}" for i in range(20)]
    story.enrol(*names[:8], model="m3", ring="canary")
    story.enrol(*names[8:], model="m3")
    for name in names:
        story.world.join(
            name, {"app": ("app-1", DIGESTS["1"]), "battery": ("battery-b1", DIGESTS["b1"])}
        )
    steps = [{"cohort": "canary", "margins": {"failed": "45%", "lost": "45%"}},
             {"cohort": "general", "margins": {"failed": "45%", "lost": "45%"}}]  # fmt: skip
    documents = [
        fleet(), policy(), release("1"), release("b1", component="battery"),
        release("b2", component="battery"),
        release("2", requires=[{"component": "battery", "version": ">=2"}]),
    ]  # fmt: skip
    needs = rollout("cars", "app-2", steps=steps)
    story.commit(*documents, rollout("power", "battery-b2", steps=steps), needs)
    story.run(60)
    assert story.versions("battery") == {"b2": 20}
    assert story.versions("app") == {"2": 20}
    story.command("rollback", "power")
    story.run(5)
    assert story.versions("battery") == {"b1": 20}
    assert story.versions("app") == {"1": 20}


def test_a_passed_deadline_asks_a_person_and_resume_gives_another(story: Story) -> None:
    slow = [{"cohort": "canary", "soak": "1h", "margins": MARGINS}, {"cohort": "general"}]
    deadline = {"progressDeadline": "20s"}
    story.commit(*base(), rollout("cars", "app-2", steps=slow, strategy=deadline))
    story.run(25)
    assert story.rollout().state == "Inconclusive"
    assert "the progress deadline of 0:00:20 has passed" in story.rollout().sentence
    story.command("resume")
    story.run(5)
    assert story.rollout().state == "Soaking"
