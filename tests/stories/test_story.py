"""The whole story from outside: the demo plays it on real parts, and judges itself.

A gate that is forced to one verdict must make it fail: a story that always passes proves nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# One after the other: a story fills the machine, and a starved device looks silent.
pytestmark = [
    pytest.mark.story,
    pytest.mark.timeout(600),
    pytest.mark.xdist_group("story"),
]

FORCED = """\
import dataclasses
try:
    from controller.rollout import gate
except ImportError:
    gate = None
if gate is not None:
    honest = gate.judge
    def judge(case):
        said = honest(case)
        return dataclasses.replace(said, verdict=gate.Verdict.{verdict}, sentence="forced")
    gate.judge = judge
"""


def play(*words: str, environment: dict[str, str] | None = None) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "controller.cli", "demo", "--check", "--output", "json", *words],
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
        timeout=580,
    )
    assert done.stdout, done.stderr[-3000:]
    return done.returncode, json.loads(done.stdout)


def forced(folder: Path, verdict: str) -> dict[str, str]:
    (folder / "sitecustomize.py").write_text(FORCED.format(verdict=verdict))
    return {"PYTHONPATH": str(folder)}


def names(story: dict[str, Any]) -> list[str]:
    return [act["act"] for act in story["acts"]]


@pytest.mark.parametrize(("fault", "seed"), [("interventions", 11), ("boot", 12), ("silent", 13)])
def test_a_fault_is_caught_and_repaired_forward(fault: str, seed: int, tmp_path: Path) -> None:
    pids = tmp_path / "pids.json"
    code, story = play(
        "--devices", "90", "--fault", fault, "--seed", str(seed), "--pids", str(pids)
    )
    assert (code, story["ok"], story["seed"]) == (0, True, seed), story.get("error")
    told = names(story)
    for act in ("canary 10.2.0", "rollback 10.3.0", "hold 10.3.0", "complete 10.3.1"):
        assert act in told
    assert story["acts"][-1]["devices"] == {"10.3.1": 90}
    rollback = next(act for act in story["acts"] if act["act"] == "rollback 10.3.0")
    assert rollback["sentence"].startswith("ROLLED BACK — ")
    ran = [d for d in story["devices"] if "10.3.0" in d["history"]]
    assert ran
    for device in ran:
        at = device["history"].index("10.3.0")
        assert device["history"][at + 1] == device["history"][at - 1]
        assert device["history"][-1] == "10.3.1"
    assert not [pid for pid in json.loads(pids.read_text()).values() if alive(pid)]


def test_a_healthy_release_is_never_rolled_back() -> None:
    code, story = play("--devices", "90", "--fault", "none", "--seed", "14")
    assert (code, story["ok"]) == (0, True), story.get("error")
    assert not [act for act in names(story) if "rollback" in act]
    assert {tuple(d["history"]) for d in story["devices"]} == {("10.1.0", "10.2.0", "10.3.0")}


def test_a_gate_that_always_widens_makes_the_story_fail(tmp_path: Path) -> None:
    code, story = play("--devices", "90", environment=forced(tmp_path, "WIDEN"))
    assert code != 0
    assert not story["ok"]
    assert "10.3.0 should be caught" in story["error"]


def test_a_gate_that_always_rolls_back_makes_the_story_fail(tmp_path: Path) -> None:
    code, story = play("--devices", "90", environment=forced(tmp_path, "ROLL_BACK"))
    assert code != 0
    assert not story["ok"]
    assert "10.2.0 should complete" in story["error"]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
