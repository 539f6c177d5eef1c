"""kill -9 of whoever runs, at random moments of the story, from outside: it ends the same.

Random moments; the seed is printed with a failure and plays again by BELLWETHER_FAULT_SEED.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from controller.cli.story import Story, Wish

from .estate import POLICY, lost
from .proxy import seed

pytestmark = [
    pytest.mark.story,
    pytest.mark.timeout(900),
    pytest.mark.xdist_group("story"),
]

DEVICES = 90
FEW = 40
KILLS = 8  # of the short story, and of each round of the long one


class Killer:
    """Kills one of those that --pids names, now and then; watches that no held digest is told."""

    def __init__(
        self, pids: Path, control: Path, number: int, pause: float, most: float = math.inf
    ) -> None:
        """About `pause` seconds between two kills, `most` of them."""
        self.killed: list[str] = []
        self._most = most
        self.told_held: set[tuple[str, str]] = set()
        self._pids, self._control, self._pause = pids, control, pause
        self._dice = random.Random(number)
        self._ended = threading.Event()
        self._threads = [threading.Thread(target=self._kill), threading.Thread(target=self._watch)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _kill(self) -> None:
        while len(self.killed) < self._most:
            if self._ended.wait(self._dice.uniform(0.3, 1.7) * self._pause):
                return
            with contextlib.suppress(OSError, ValueError):
                names = json.loads(self._pids.read_text())
                name = self._dice.choice(sorted(names))
                os.kill(names[name], signal.SIGKILL)
                self.killed.append(name)

    def _watch(self) -> None:
        while not self._ended.wait(0.3):
            with contextlib.suppress(sqlite3.Error):
                self._look()

    def _look(self) -> None:
        with contextlib.closing(sqlite3.connect(f"file:{self._control}?mode=ro", uri=True)) as db:
            held = db.execute("SELECT artifacts, created_at FROM holds WHERE lifted_at IS NULL")
            for artifacts, since in held.fetchall():
                later = "SELECT device, components, at FROM desired WHERE at > ?"
                for device, components, _ in db.execute(later, (since,)):
                    digests = {told["digest"] for told in json.loads(components).values()}
                    for digest in digests & set(json.loads(artifacts)):
                        self.told_held.add((device, digest))


@pytest.mark.parametrize(
    "round_", [0, *(pytest.param(n, marks=pytest.mark.long) for n in range(1, 5))]
)
def test_a_release_is_caught_and_fixed_whoever_is_killed(tmp_path: Path, round_: int) -> None:
    number = seed() + round_
    story = Story(Wish(devices=FEW, seed=number % 1000, fault="boot"), tmp_path, tell=print)
    story.children.pid_file = tmp_path / "pids.json"
    control = tmp_path / "state" / "control.db"
    killer = Killer(story.children.pid_file, control, number, 3.0, most=KILLS)
    try:
        story.set_up(POLICY)
        story.baseline()
        assert story.fails("10.3.0", "it does not boot")
        story.fixed("10.3.1", "10.3.0", caught=True)
        assert story._counts() == {"10.3.1": FEW}
    finally:
        killer.stop()
        story.children.stop()
    assert killer.killed
    assert_nothing_was_lost(tmp_path, killer)


@pytest.mark.long
@pytest.mark.parametrize("pause", [25.0, 12.0, 5.0])  # seconds, about
def test_the_story_ends_the_same_whoever_is_killed(tmp_path: Path, pause: float) -> None:
    number = seed()
    root, pids = tmp_path / "demo", tmp_path / "pids.json"
    words = ["demo", "--check", "--output", "json", "--devices", str(DEVICES)]
    words += ["--seed", str(number % 1000), "--pids", str(pids), "--keep", str(root)]
    with (tmp_path / "demo.err").open("wb") as errors:
        demo = subprocess.Popen(
            [sys.executable, "-m", "controller.cli", *words], stdout=subprocess.PIPE, stderr=errors
        )
    killer = Killer(pids, root / "state" / "control.db", number, pause)
    said, _ = demo.communicate()
    killer.stop()
    story = json.loads(said)
    assert (demo.returncode, story["ok"]) == (0, True), f"{story.get('error')} {killer.killed}"
    assert killer.killed
    names = [act["act"] for act in story["acts"]]
    for act in ("complete 10.2.0", "rollback 10.3.0", "hold 10.3.0", "complete 10.3.1"):
        assert act in names
    assert story["acts"][-1]["devices"] == {"10.3.1": DEVICES}
    assert_nothing_was_lost(root, killer)


def assert_nothing_was_lost(root: Path, killer: Killer) -> None:
    assert killer.told_held == set()
    assert lost(root / "state", root / "cars") == {}
    doctor = subprocess.run(
        [sys.executable, "-m", "controller.cli", "doctor", "--state-dir", str(root / "state")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr
