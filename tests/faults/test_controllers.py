"""Two controllers on one PostgreSQL, as processes: one leads, the other follows it."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from controller.store import lease
from controller.store.database import open_control
from telemetry.store.database import reading

from .conftest import Process, Processes, eventually

LEASE = "2"


@pytest.fixture
def repository(tmp_path: Path) -> str:
    bare, clone = tmp_path / "fleet.git", tmp_path / "fleet"
    for words in (
        ["init", "-q", "--bare", "--initial-branch=main", str(bare)],
        ["clone", "-q", str(bare), str(clone)],
        ["-C", str(clone), "checkout", "-q", "-B", "main"],
        ["-C", str(clone), "-c", "user.name=a", "-c", "user.email=a@b.invalid",
         "commit", "-q", "--allow-empty", "-m", "Begin"],
        ["-C", str(clone), "push", "-q", "origin", "main"],
    ):  # fmt: skip
        subprocess.run(["git", *words], check=True, capture_output=True)
    return str(bare)


@pytest.fixture
def engine(postgres_url: str) -> Iterator[Engine]:
    engine = open_control(postgres_url)
    yield engine
    engine.dispose()


def row(engine: Engine) -> lease.LeaseRow:
    with reading(engine) as conn:
        return lease.look(conn)


def checked_git(engine: Engine) -> float:
    with reading(engine) as conn:
        found = conn.execute(text("SELECT value ->> 'checked_at' FROM meta WHERE key = 'git'"))
        return float(found.scalar() or 0)


def test_one_leads_and_the_one_that_was_stopped_stands_by_when_it_wakes(
    processes: Processes, repository: str, postgres_url: str, engine: Engine, mosquitto: str,
    tmp_path: Path,
) -> None:  # fmt: skip
    def controller(name: str) -> Process:
        state = tmp_path / name
        state.mkdir(exist_ok=True)
        return processes.start(
            name, "serve", "--role", "controller", "--repo", repository, "--database", postgres_url,
            "--broker", mosquitto, "--state-dir", str(state), "--poll-interval", "0.2",
            "--tick-interval", "0.1", BELLWETHER_LEASE=LEASE,
        )  # fmt: skip

    first = controller("first")
    eventually(lambda: "leading" in first.said(), 30, "the first one leads")
    second = controller("second")
    eventually(lambda: "standing_by" in second.said(), 30, "the second one stands by")
    assert "leading" not in second.said()
    term = row(engine).term

    first.freeze()
    eventually(lambda: "leading" in second.said(), 30, "the second one takes over")
    second_term = row(engine).term
    assert second_term > term

    first.thaw()
    eventually(lambda: "standing_by" in first.said(), 30, "the first one wakes, and stands by")
    assert "fenced" in first.said()
    until, beats = time.monotonic() + 3 * float(LEASE), row(engine).beat
    while time.monotonic() < until:  # no turns are taken: nobody leads but the second one
        assert row(engine).term == second_term
        time.sleep(0.1)
    assert row(engine).beat > beats
    assert first.said().count("leading") == 1

    second.kill()
    eventually(lambda: first.said().count("leading") == 2, 30, "the first one takes over again")
    assert row(engine).term > second_term
    before = checked_git(engine)
    eventually(lambda: checked_git(engine) > before, 30, "and works")
    first.child.terminate()
    assert first.child.wait(20) == 0
    assert row(engine).holder == ""  # given back: whoever starts next need not wait


def test_a_killed_controller_is_back_without_waiting_for_its_own_lease(
    processes: Processes, repository: str, postgres_url: str, engine: Engine, mosquitto: str,
    tmp_path: Path,
) -> None:  # fmt: skip
    words = ["serve", "--role", "controller", "--repo", repository, "--database", postgres_url]
    words += ["--broker", mosquitto, "--state-dir", str(tmp_path)]
    terms = [0]
    for n in (1, 2):
        ours = processes.start(f"c{n}", *words, BELLWETHER_LEASE="3600")
        eventually(lambda ours=ours: "leading" in ours.said(), 30, "it leads")
        ours.kill()
        terms.append(row(engine).term)
    assert terms == sorted(set(terms))
