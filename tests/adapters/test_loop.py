"""The loop from a commit to its last device: who gets what, in which order, through restarts."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import select

from controller.rollout.model import Arm
from controller.store import rollouts as store
from controller.store.tables import decisions, holds
from telemetry.evidence.observations import Observations
from telemetry.report import HealthRow
from telemetry.store.database import reading

from .story import DIGESTS, MARGINS, Story, base, document, fleet, release, rollout


def test_a_commit_moves_the_canary_then_the_fleet(story: Story) -> None:
    story.commit(*base(), rollout("cars", "app-2"))
    story.run(2)
    assert story.versions() == {"1": 28, "2": 12}
    assert story.rollout().state in ("Soaking", "Progressing")
    story.run(20)
    assert story.versions() == {"2": 40}
    assert story.rollout().state == "Completed"
    assert "COMPLETED — app-2 on 40 of 40 devices" in story.rollout().sentence


def test_a_release_that_does_not_boot_is_rolled_back_in_the_canary(story: Story) -> None:
    story.world.broken.add(DIGESTS["2"])
    story.commit(*base(), rollout("cars", "app-2"))
    story.run(8)
    assert story.versions() == {"1": 40}
    last = story.rollout()
    assert last.state == "RolledBack"
    assert last.sentence.startswith("ROLLED BACK — ")
    with reading(story.engine) as conn:
        hold = conn.execute(select(holds)).one()
    assert (hold.digest, hold.to, hold.actor) == (last.digest, "previous", "policy driving")


def test_an_offline_device_blocks_nobody_and_gets_it_at_its_next_contact(story: Story) -> None:
    story.commit(*base(), rollout("cars", "app-2"))
    gone = [d for d in story.world.rows if d != "car-05"]
    for _ in range(200):
        story.world.now += 1
        story.world.heard += 1
        story.loop.tick(story.world.now)
        story.world.work(*gone)
    assert story.rollout().state == "Completed"
    assert "1 not reached yet" in story.rollout().sentence
    assert story.versions() == {"1": 1, "2": 39}
    story.run(3)
    assert story.versions() == {"2": 40}


def test_a_new_release_supersedes_and_leaves_devices_what_they_have(story: Story) -> None:
    story.commit(*base(), rollout("cars", "app-2"))
    story.run(2)
    story.commit(*base(), rollout("cars", "app-3", steps=[
        {"cohort": "canary", "percent": "50%", "soak": "60s", "margins": MARGINS},
        {"cohort": "canary", "soak": "60s", "margins": MARGINS},
        {"cohort": "general", "margins": MARGINS},
    ]))  # fmt: skip
    story.run(5)
    assert story.versions() == {"1": 28, "2": 6, "3": 6}


def test_a_newcomer_gets_the_proven_set_and_no_running_step(story: Story) -> None:
    story.commit(*base(), rollout("cars", "app-2"))
    story.run(30)
    story.commit(*base(), rollout("cars", "app-3"))
    story.run(2)
    for name, version in (("car-90", "1"), ("car-91", "3")):
        story.enrol(name, model="m3")
        story.world.join(name, {"app": (f"app-{version}", DIGESTS[version])})
    story.enrol("car-92", model="m3")
    story.world.join("car-92", {"app": ("mystery", "sha256:" + "f" * 64)})
    story.loop.tick(story.world.now)
    story.world.work()
    assert story.world.rows["car-90"].components["app"].digest == DIGESTS["2"]
    assert story.world.rows["car-91"].components["app"].digest == DIGESTS["2"]
    assert story.world.rows["car-92"].components["app"].digest == "sha256:" + "f" * 64


def test_a_device_that_is_moved_or_retired_leaves_the_step(story: Story) -> None:
    story.commit(*base(), rollout("cars", "app-2"))
    story.run(1, work=False)
    story.enrol("car-00", model="m3", ring="canary", status="retired")
    story.enrol("car-01", model="m3", ring="canary", fleet="elsewhere")
    story.run(2)
    assert story.world.rows["car-00"].components["app"].digest == DIGESTS["2"]  # had its order
    story.run(30)
    assert story.rollout().state == "Completed"
    assert "38 of 38" in story.rollout().sentence


def test_a_restart_between_any_two_ticks_changes_nothing(story: Story) -> None:
    story.commit(*base(), rollout("cars", "app-2"))
    for _ in range(30):
        story.run(1)
        story.start()
    assert story.versions() == {"2": 40}
    assert story.rollout().state == "Completed"


def drive(story: Story, seconds: int) -> None:
    """Time passes; each device tells every second how it drove."""
    for second in range(seconds):
        story.run(1)
        for i, (name, row) in enumerate(sorted(story.world.rows.items())):
            story.world.batch += 1
            story.world.health.append(
                HealthRow(
                    batch=story.world.batch, device=name, received_at=story.world.now, boot="b",
                    seq=story.world.batch, attempt=row.attempt,
                    components={c: r.digest for c, r in row.components.items()},
                    t0=story.world.now - 1, seconds=1.0, counters={"hard": (i + second) % 3 // 2},
                    exposure={"device_hour": 1.0}, levels={},
                )
            )  # fmt: skip


def test_who_was_a_control_before_counts_as_one_after_a_restart(story: Story) -> None:
    """The last steps take the controls of the first ones: a restart must not forget their word."""
    slow = {"soak": "1h", "maxSoak": "2h"}
    steps = [
        {"cohort": "canary", **slow},
        {"cohort": "general", "percent": "50%", **slow},
        {"cohort": "general", **slow},
    ]
    hard = {"metric": "hard", "type": "rate", "per": "device_hour", "direction": "increase",
            "margin": {"ratio": "2"}}  # fmt: skip
    update_ok = {"metric": "update_ok", "type": "proportion"}
    judged = document("HealthPolicy", "driving", {"gates": [update_ok, hard]})
    releases = [release(v) for v in ("1", "2")]
    story.commit(fleet(), judged, *releases, rollout("cars", "app-2", steps))
    drive(story, 8)
    counted = []
    for step in (0, 1, 2):
        assert story.rollout().step == step
        if step == 1:  # one of those who count leaves in the middle of it
            story.enrol("car-03", model="m3", status="retired")
            drive(story, 2)
        story.loop.tick(story.world.now)
        before = story.loop._listening.evidence.observations()[story.rollout().id]
        counted += [arms.devices for arms in before.metric("hard").totals if arms.arm == "control"]
        story.start()
        story.loop.tick(story.world.now)
        after = story.loop._listening.evidence.observations()[story.rollout().id]
        assert (after.arms, _counts(after)) == (before.arms, _counts(before))
        story.command("promote")
        drive(story, 8)
    assert story.rollout().state == "Completed"
    assert counted[-1] > 0  # in the last step nobody is a control any more


def _counts(seen: Observations) -> list[object]:
    """What is counted; sums of sums differ in their last digit by the order of adding."""
    hard = seen.metric("hard")
    firsts = [(f.wave, f.band, f.d1, f.d0, f.y1, f.y0) for f in hard.firsts]
    return [firsts, [(t.wave, t.arm, t.devices, t.events, t.exposure) for t in hard.totals]]


def test_cars_that_come_back_before_the_controller_make_nobody_silent(story: Story) -> None:
    """All fell quiet together, which a controller saw that is gone; half of them are back."""
    slow = [{"cohort": "canary", "soak": "1h"}, {"cohort": "general", "soak": "1h"}]
    story.commit(*base(), rollout("cars", "app-2", slow))
    story.run(6)
    story.run(25, work=False)
    story.world.now, story.world.heard = story.world.now + 20, story.world.heard + 20
    back = [name for i, name in enumerate(sorted(story.world.rows)) if i % 2]
    story.world.work(*back)
    story.start()
    for _ in range(5):
        story.run(1, work=False)
        story.world.work(*back)
    members = story.loop._memory.members[story.rollout().id].values()
    assert {m.state for m in members if m.arm is Arm.EXPOSED} == {"updated"}
    for _ in range(120):  # who does not come back is silent all the same
        story.run(1, work=False)
        story.world.work(*back)
    members = story.loop._memory.members[story.rollout().id].values()
    states = {m.device: m.state for m in members if m.arm is Arm.EXPOSED}
    assert {name for name, state in states.items() if state == "silent"} == states.keys() - {*back}


def test_an_older_controller_is_fenced(story: Story) -> None:
    old = story.loop
    story.commit(*base(), rollout("cars", "app-2"))
    story.start()
    with pytest.raises(store.Fenced):
        old.tick(story.world.now)
    story.run(30)
    assert story.versions() == {"2": 40}


def test_orders_wait_for_the_broker(story: Story) -> None:
    story.world.broker_up = False
    story.commit(*base(), rollout("cars", "app-2"))
    story.run(5)
    assert not any(story.world.orders.values())
    story.world.broker_up = True
    story.run(30)
    assert story.versions() == {"2": 40}


def test_an_empty_cohort_stops_the_rollout(tmp_path: Path) -> None:
    story = Story(tmp_path)
    story.enrol("car-1", model="m3")
    story.world.join("car-1", {"app": ("app-1", DIGESTS["1"])})
    story.commit(*base(), rollout("cars", "app-2"))
    story.run(10)
    assert story.rollout().state == "NoMembers"
    assert "cohort canary is empty" in story.rollout().sentence


def test_every_decision_is_a_row_with_its_sentence(story: Story) -> None:
    story.commit(*base(), rollout("cars", "app-2"))
    story.run(30)
    with reading(story.engine) as conn:
        rows = conn.execute(select(decisions).order_by(decisions.c.id)).all()
    kinds = [(row.kind, row.verdict) for row in rows]
    assert kinds[0] == ("open", "opened")
    assert ("draw", "drawn") in kinds
    assert ("verdict", "widen") in kinds
    assert kinds[-1] == ("state", "Completed")
    assert all(row.sentence for row in rows)
    assert len(rows) < 30
