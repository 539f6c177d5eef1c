"""A metric whose meaning changed is never compared with what it was."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from telemetry.report import HealthRow

_SPEC = importlib.util.spec_from_file_location(
    "loop_story", Path(__file__).with_name("test_loop.py")
)
assert _SPEC is not None
assert _SPEC.loader is not None
loop = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(loop)

STEPS = [
    {"cohort": name, "soak": "3s", "maxSoak": "20s", "margins": loop.MARGINS}
    for name in ("canary", "general")
]


@pytest.fixture
def story(tmp_path: Path) -> Any:
    made = loop.Story(tmp_path)
    names = [f"car-{i:02}" for i in range(40)]
    made.enrol(*names[:12], model="m3", ring="canary")
    made.enrol(*names[12:], model="m3")
    for name in names:
        made.world.join(name, {"app": ("app-1", loop.DIGESTS["1"])})
    return made


def commit(story: Any, to: str, **metrics: dict[str, str]) -> None:
    """`metrics`: version → what its release declares, as r1, r2 …"""
    gates = [
        {"metric": "update_ok", "type": "proportion"},
        {"metric": "jerk", "type": "rate", "budget": {"per_device_hour": "0.5"}},
    ]
    policy = loop._document("HealthPolicy", "driving", {"gates": gates})
    releases = [
        loop.release(v, **({"metrics": metrics[f"r{v}"]} if f"r{v}" in metrics else {}))
        for v in ("1", "2", "3")
    ]
    story.commit(loop.fleet(), policy, *releases, loop.rollout("cars", f"app-{to}", STEPS))


def drive(story: Any, seconds: int, jerks: bool = False) -> None:
    """Everybody reports an hour of health each second; updated ones jerk all the time, or not."""
    for _ in range(seconds):
        story.run(1)
        for name, row in story.world.rows.items():
            digest = row.components["app"].digest
            new = digest != loop.DIGESTS["1"]
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
