"""Devices that are kept out of a release, and what they tell of its goals."""

from __future__ import annotations

import pytest

from controller.hindsight import messages, past
from controller.outcomes import board
from controller.rollout import holdout as holdouts
from controller.rollout.hindsight import retry, told
from telemetry.report import HealthRow, Level
from telemetry.store.database import reading

from .story import DIGESTS, Story, base, document, fleet, release, rollout, runs

LOOSE = [  # few devices are left beside a holdout: they prove little
    {"cohort": name, "soak": "3s", "maxSoak": "20s", "margins": {"failed": "70%", "lost": "70%"}}
    for name in ("canary", "general")
]


def test_a_holdout_is_kept_out_until_its_time_has_passed(story: Story) -> None:
    holdout = {"percent": "25%", "for": "60s", "unit": "device"}
    story.commit(*base(), rollout("cars", "app-2", LOOSE, holdout=holdout))
    story.run(30)
    done = story.rollout()
    assert done.state == "Completed"
    kept = story.versions()["1"]
    held = [name for name in story.world.rows if holdouts.chosen(done.seed, name, 0.25)]
    assert kept == len(held) > 0
    assert {n for n, r in story.world.rows.items() if runs(r, "app") == DIGESTS["1"]} == set(held)
    story.start()  # a new controller keeps the same ones out
    story.run(20)
    assert story.versions()["1"] == kept
    story.run(20)
    assert story.versions() == {"2": 40}


def test_the_board_measures_a_goal_against_the_holdout(story: Story) -> None:
    goals = {"goals": [{"metric": "km", "type": "mean", "direction": "increase"}]}
    gates = [{"metric": "update_ok", "type": "proportion"}]
    judged = document("HealthPolicy", "driving", {"gates": gates, **goals})
    documents = [fleet(), judged, *(release(v) for v in ("1", "2", "3", "3.1"))]
    holdout = {"percent": "25%", "for": "1h", "unit": "device"}
    story.commit(*documents, rollout("cars", "app-2", LOOSE, holdout=holdout))
    story.run(30)
    now = story.world.now
    for i, (name, row) in enumerate(sorted(story.world.rows.items())):
        story.world.batch += 1
        value = (12.0 if runs(row, "app") == DIGESTS["2"] else 10.0) + (i % 5) / 10
        story.world.health.append(
            HealthRow(
                batch=story.world.batch, device=name, received_at=now, boot="b", seq=1,
                attempt=None, components={}, t0=now - 1, seconds=1.0, counters={}, exposure={},
                levels={"km": Level(n=1, total=value, squares=value**2)},
            )
        )  # fmt: skip
    with reading(story.engine) as conn:
        found = board(conn, story.world, now=now, days=30, fleets=frozenset())
    one = found["items"][0]["outcomes"][0]
    assert one["verdict"] == "better"
    assert one["against"] == "the holdout"
    assert one["treated"] + one["control"] == 40
    assert one["estimate"] == pytest.approx(2.0, abs=0.3)
    assert found["delivery"][0]["measures"][0]["name"] == "deployment_frequency"


def test_without_a_holdout_a_finished_goal_is_not_measurable(story: Story) -> None:
    goals = {"goals": [{"metric": "km", "type": "mean", "direction": "increase"}]}
    judged = document(
        "HealthPolicy",
        "driving",
        {"gates": [{"metric": "update_ok", "type": "proportion"}], **goals},
    )
    documents = [fleet(), judged, *(release(v) for v in ("1", "2", "3", "3.1"))]
    story.commit(*documents, rollout("cars", "app-2"))
    story.run(30)
    with reading(story.engine) as conn:
        found = board(conn, story.world, now=story.world.now, days=30, fleets=frozenset())
    one = found["items"][0]["outcomes"][0]
    assert one["verdict"] == "not measurable"
    assert one["sentence"].startswith("km: not measurable — ")


def test_the_past_of_a_rollout_is_judged_again_from_database_and_messages(story: Story) -> None:
    story.world.broken.add(DIGESTS["2"])
    story.commit(*base(), rollout("cars", "app-2"))
    story.run(8)
    with reading(story.engine) as conn:
        found = past(conn, story.rollout())
    assert found.release == "app-2"
    assert {e.device for e in found.enrolled if e.arm == "control"} <= set(story.world.rows)
    looks = retry(found, messages(story.world))
    assert "so did the policy in force then, at the same time" in told(found, looks)
