"""The simulated ports promise what the real ones promise: one test over both."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.world.machine import MemoryJournal, MemoryOutbox
from bench.world.points import Points
from bench.world.repository import Clone, Repository
from controller.fleetrepo import FleetRepo, RepoUnavailable
from device_agent.journal import Journal
from device_agent.outbox import Outbox
from device_agent.protocol import Channel, ComponentReport
from device_agent.record import Record

DIGEST = "sha256:" + "a" * 64


@pytest.fixture(params=["real", "simulated"])
def journal(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Any]:
    """Opens the journal; every call is another start of the agent."""
    if request.param == "simulated":
        kept = MemoryJournal(Points())
        return lambda: kept
    return lambda: Journal(tmp_path / "journal.db")


@pytest.fixture(params=["real", "simulated"])
def outbox(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "simulated":
        return MemoryOutbox(Points(), max_messages=100)
    return Outbox(tmp_path / "outbox.db", max_messages=100)


def test_a_journal_answers_what_was_saved_last(journal: Callable[[], Any]) -> None:
    assert journal().load() == Record()
    report = ComponentReport(release="app-1", digest=DIGEST, committed=True)
    for generation in (1, 2):
        saved = Record(boot_count=3, generation=generation, running={"app": report})
        journal().save(saved)
        assert journal().load() == saved


def test_an_outbox_keeps_order_until_the_acknowledgement(outbox: Any) -> None:
    for seq in range(1, 6):
        outbox.put("b1", seq, Channel.HEALTH, b"%d" % seq)
    outbox.put("b2", 1, Channel.REPORTED, b"x")
    assert [w.seq for w in outbox.oldest(3)] == [1, 2, 3]
    assert [w.seq for w in outbox.oldest(2, without={("b1", 1), ("b1", 3)})] == [2, 4]
    outbox.acknowledge("b1", [(1, 2), (4, 9)])
    assert [(w.boot, w.seq) for w in outbox.oldest(9)] == [("b1", 3), ("b2", 1)]
    assert len(outbox) == 2
    with pytest.raises(Exception, match=r"(?i)unique|already"):
        outbox.put("b2", 1, Channel.REPORTED, b"y")


def test_a_full_outbox_sheds_health_first_and_counts_it(outbox: Any) -> None:
    outbox.put("b", 0, Channel.REPORTED, b"state")
    for seq in range(1, 121):
        outbox.put("b", seq, Channel.HEALTH, b"")
    assert len(outbox) <= 100
    assert outbox.oldest(1)[0].channel is Channel.REPORTED
    assert outbox.take_lost() == 121 - len(outbox)
    assert outbox.take_lost() == 0


@pytest.fixture(params=["real", "simulated"])
def repository(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Callable[..., str]]:
    """(the controller's clone, push(path, text) → commit)."""
    if request.param == "simulated":
        remote = Repository()

        def push(path: str, text: str) -> str:
            tree = remote.tree() if remote.head else {}
            return remote.push({**tree, path: text.encode()}, "ann <a@b>", "a change", 0.0)

        return Clone(remote, Points()), push
    work = tmp_path / "work"
    git = ["git", "-C", str(work), "-c", "user.name=ann", "-c", "user.email=a@b"]

    def commit(path: str, text: str) -> str:
        if not work.exists():
            subprocess.run(["git", "init", "-q", "-b", "main", str(work)], check=True)
            subprocess.run([*git, "config", "receive.denyCurrentBranch", "ignore"], check=True)
        else:
            subprocess.run([*git, "reset", "-q", "--hard"], check=True)
        (work / path).parent.mkdir(parents=True, exist_ok=True)
        (work / path).write_text(text)
        subprocess.run([*git, "add", "-A"], check=True)
        subprocess.run([*git, "commit", "-q", "-m", "a change"], check=True)
        done = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True)
        return done.stdout.decode().strip()

    return FleetRepo(str(work), "main", "", tmp_path / "clone"), commit


def test_a_clone_reads_what_was_pushed_and_records_on_top(
    repository: tuple[Any, Callable[..., str]],
) -> None:
    clone, push = repository
    first = push("fleet.yaml", "a")
    assert clone.fetch().commit == first
    second = push("more.yaml", "b")
    assert clone.fetch().commit == second
    assert clone.read(second) == {"fleet.yaml": b"a", "more.yaml": b"b"}
    assert clone.read(first) == {"fleet.yaml": b"a"}
    assert clone.descends(second, first)
    assert not clone.descends(first, second)
    assert not clone.descends(second, "0" * 40)
    recorded = clone.record({"holds/h.yaml": "c"}, "Hold", "h")
    assert clone.fetch().commit == recorded
    assert clone.descends(recorded, second)
    assert clone.read(recorded)["holds/h.yaml"] == b"c"
    assert clone.record({"holds/h.yaml": "other"}, "Hold", "h") == recorded  # it is there
    with pytest.raises(RepoUnavailable):
        clone.read("0" * 40)
