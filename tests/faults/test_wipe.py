"""The control database is deleted under real agents; the service starts again without it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from controller.cli import stage
from controller.cli.story import Story, Wish
from controller.dispatch import SETTLES

from .conftest import eventually

pytestmark = [pytest.mark.story, pytest.mark.timeout(500), pytest.mark.xdist_group("story")]

PATIENCE = 120.0


@pytest.fixture
def story(tmp_path: Path) -> Iterator[Story]:
    made = Story(Wish(devices=30, seed=21), tmp_path, tell=lambda _words: None)
    yield made
    made.children.stop()


def bellwether(story: Story, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "controller.cli", *words],
        env={**os.environ, "BELLWETHER_SERVER": story.server},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def rollouts(story: Story) -> list[dict[str, Any]]:
    return list(story.api.get("/rollouts")["items"])


def devices(story: Story) -> dict[str, tuple[str, str, int]]:
    """id → (fleet, what it runs, how often it was switched)."""
    return {
        d["id"]: (d["fleet"], d["components"]["autopilot"]["release"], len(d["history"]))
        for d in story.api.every("/devices")
        if d["components"]
    }


def journals(story: Story) -> dict[str, tuple[str, str, int]]:
    """The same, as each device itself remembers it; without those in the middle of a download,
    which obey to its end what they were told before."""
    found = {}
    for file in sorted((story.root / "cars").glob("*/journal.db")):
        with contextlib.closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as db:
            (body,) = db.execute("SELECT body FROM record").fetchone()
        record = json.loads(body)
        if (record.get("update") or {}).get("state") in ("OFFERED", "DOWNLOADING"):
            continue
        release = record["running"]["autopilot"]["release"]
        found[file.parent.name] = (stage.FLEET, release, len(record["history"]))
    return found


def kill_all(story: Story) -> None:
    pids = [pid for name, pid in story.children.pids().items() if name.startswith("serve")]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    story.children.running["serve"].wait()


def test_a_wiped_control_database_changes_no_device_and_waits_for_a_person(story: Story) -> None:
    story.set_up()
    story.baseline()
    story.release("10.2.0", "to be held")
    eventually(lambda: rollouts(story), PATIENCE, "10.2.0 opens")
    name = rollouts(story)[0]["name"]
    bellwether(story, "rollback", name, "--reason", "a test")
    eventually(lambda: story.repository.holds(), PATIENCE, "the hold is in Git")
    eventually(lambda: story._counts() == {"10.1.0": 30}, PATIENCE, "all are back")
    story.release("10.2.1", "the next one")
    eventually(lambda: story._counts().get("10.2.1", 0) >= 3, PATIENCE, "its canary runs it")
    kill_all(story)  # in the middle of it
    time.sleep(5)  # who was told before goes on to the end of its trial
    before = journals(story)
    assert "fsd-10.2.1" in {release for _, release, _ in before.values()}

    state = story.root / "state"
    for file in state.glob("control.db*"):
        file.unlink()
    story.children.check()  # starts it again

    eventually(story.api.ready, PATIENCE, "the service is up")
    eventually(lambda: rollouts(story), PATIENCE, "the unfinished rollout opens")
    eventually(lambda: len(devices(story)) == 30, PATIENCE, "the registry is back")
    eventually(
        lambda: all(d["online"] for d in story.api.every("/devices")), PATIENCE, "all are back"
    )
    (seen,) = rollouts(story)
    assert (seen["release"], seen["state"]) == ("fsd-10.2.1", "Paused")

    def heard() -> bool:
        found = devices(story)
        return all(found.get(name) == was for name, was in before.items())

    eventually(heard, PATIENCE, "all that happened meanwhile is told")
    until = time.monotonic() + SETTLES + 8
    while time.monotonic() < until:
        # The same fleets, releases and number of switches, by the API and by themselves.
        assert {name: devices(story)[name] for name in before} == before
        assert {name: journals(story).get(name) for name in before} == before
        time.sleep(0.5)

    # The next person's word is obeyed, and the held digest stays held.
    bellwether(story, "resume", name, "--reason", "it is right")
    eventually(
        lambda: rollouts(story)[0]["state"] in ("Progressing", "Soaking"), PATIENCE, "it goes on"
    )
    story.repository.commit(
        {"rollout.yaml": stage.rollout_text(story.size, "10.2.0")}, "Try the held one again"
    )
    eventually(
        lambda: "rejected by hold" in str(story.api.get("/fleets")), PATIENCE, "it says why not"
    )
    assert "10.2.0" not in story._counts()
    doctor = subprocess.run(
        [sys.executable, "-m", "controller.cli", "doctor", "--state-dir", str(state)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr
