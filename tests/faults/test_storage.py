"""Databases and Git fail in the middle of a rollout, under real processes; it completes by itself.

Random moments; the seed is printed with a failure and plays again by BELLWETHER_FAULT_SEED.
"""

from __future__ import annotations

import functools
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from tests.disks import fill, small

from .conftest import eventually
from .estate import PATIENCE, Estate
from .postgres import Postgres
from .proxy import seed

pytestmark = [
    pytest.mark.story,
    pytest.mark.timeout(900),
    pytest.mark.xdist_group("story"),
]

ROOM = 160  # MiB of the small disk


@pytest.fixture(params=[1, pytest.param(8, marks=pytest.mark.long)])
def rounds(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small file system of our own, where one may be mounted; else a folder."""
    place = tmp_path_factory.mktemp("disk")
    with small(place, ROOM):
        yield place


@pytest.fixture(scope="module")
def estate(disk: Path) -> Iterator[Estate]:
    made = Estate(disk)
    try:
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture
def dice() -> random.Random:
    return random.Random(seed())


def test_locked_databases_and_a_full_disk(
    estate: Estate, disk: Path, dice: random.Random, rounds: int
) -> None:
    """Somebody else holds the lock for a while; then there is no room for one more byte."""
    for _ in range(rounds):
        version = estate.roll_out()
        for name in ("control.db", "telemetry.db"):
            time.sleep(dice.uniform(0.0, 1.0))
            with closing(sqlite3.connect(estate.root / "state" / name, timeout=60.0)) as other:
                other.execute("BEGIN IMMEDIATE")
                time.sleep(dice.uniform(1.0, 5.0))
                other.rollback()
        if os.path.ismount(disk):
            time.sleep(dice.uniform(0.0, 1.0))
            filler = fill(disk)
            time.sleep(dice.uniform(2.0, 6.0))
            filler.unlink()
        estate.completes(version)


@pytest.mark.long
def test_git_hangs_is_gone_rewritten_and_corrupt(
    estate: Estate, dice: random.Random, rounds: int
) -> None:
    """The rollout that has begun goes on; what Git says wrongly is shown, and not followed."""
    repository = estate.story.repository
    for _ in range(rounds):
        version = estate.roll_out()
        with a_git_that_hangs(estate):
            estate.completes(version)

        version = estate.roll_out()
        time.sleep(dice.uniform(0.0, 1.0))
        away = repository.bare.rename(repository.bare.with_name("away.git"))
        estate.completes(version)
        away.rename(repository.bare)

        good = git(repository.bare, "rev-parse", "main")
        rewrite(repository.bare)
        eventually(lambda: estate.git()["refused"], PATIENCE, "another history is shown")
        assert estate.git()["accepted"] == good
        git(repository.bare, "update-ref", "refs/heads/main", good)
        eventually(lambda: not estate.git()["refused"], PATIENCE, "the old one is taken again")

        with estate.frozen("serve.controller"):
            commit = repository.commit({"README.md": f"{dice.random()}\n"}, "Say something")
            blob = git(repository.bare, "rev-parse", f"{commit}:README.md")
            file = repository.bare / "objects" / blob[:2] / blob[2:]
            sound = file.read_bytes()
            file.chmod(0o644)
            file.write_bytes(sound[:-4] + b"oops")
        eventually(lambda: estate.git()["refused"], PATIENCE, "the corrupt object is shown")
        assert estate.git()["accepted"] == good
        file.write_bytes(sound)
        accepted = functools.partial(is_accepted, estate, commit)
        eventually(accepted, PATIENCE, "it is read once it is whole")
        estate.completes(estate.roll_out())


@contextmanager
def a_git_that_hangs(estate: Estate) -> Iterator[None]:
    """Stop whatever the controller asks of Git next, in the middle of it."""
    controller, stopped = psutil.Process(estate.pid("serve.controller")), list[psutil.Process]()

    def caught() -> bool:
        with suppress(psutil.Error):
            for process in controller.children(recursive=True):
                process.suspend()
                stopped.append(process)
        return bool(stopped)

    try:
        eventually(caught, PATIENCE, "the controller asks Git")
        yield
    finally:
        for process in stopped:
            with suppress(psutil.Error):
                process.resume()


def is_accepted(estate: Estate, commit: str) -> bool:
    return bool(estate.git()["accepted"] == commit)


def git(bare: Path, *words: str) -> str:
    who = ("-c", "user.name=eve", "-c", "user.email=eve@example.invalid")
    done = subprocess.run(
        ["git", "-C", str(bare), *who, *words], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def rewrite(bare: Path) -> None:
    """Another history under the same name, as after `push --force`."""
    tree = git(bare, "rev-parse", "main^{tree}")
    other = git(bare, "commit-tree", tree, "-m", "Another history")
    git(bare, "update-ref", "refs/heads/main", other)


def test_doctor_finds_nothing(estate: Estate) -> None:
    """After all of that."""
    state = str(estate.root / "state")
    doctor = subprocess.run(
        [sys.executable, "-m", "controller.cli", "doctor", "--state-dir", state],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr


def test_postgres_cuts_us_off_restarts_and_crashes(
    tmp_path: Path, dice: random.Random, rounds: int
) -> None:
    server = Postgres()
    estate = Estate(tmp_path, database=server.url)
    try:
        estate.start()
        for _ in range(rounds):
            version = estate.roll_out()
            for how in ("sessions", signal.SIGINT, "sessions", signal.SIGQUIT):
                time.sleep(dice.uniform(0.0, 1.5))
                if isinstance(how, signal.Signals):
                    server.end(how)
                    time.sleep(dice.uniform(0.0, 3.0))
                    server.start()
                else:
                    eventually(server.terminate_sessions, PATIENCE, "somebody has a session")
            estate.completes(version)
        doctor = subprocess.run(
            [sys.executable, "-m", "controller.cli", "doctor", "--database", server.url,
             "--state-dir", str(tmp_path / "state")],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert doctor.returncode == 0, doctor.stdout + doctor.stderr
    finally:
        estate.stop()
        server.close()
