"""One controller writes at a time: terms rise, the loser's writes touch nothing, nobody flaps."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError

from controller.lease import Lease
from controller.store import lease as rows
from controller.store import rollouts as store
from controller.store.database import open_control
from controller.store.lease import Fenced, writing_as
from controller.store.tables import SCHEMA
from telemetry.store.database import open_engine, reading, writing
from telemetry.store.schema import bring_to_head


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    engine = open_control(database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def other(engine: Engine, database_url: str) -> Iterator[Engine]:
    """Another controller's connections to the same database."""
    other = open_engine(database_url)
    yield other
    other.dispose()


def lease(engine: Engine, name: str, seconds: float = 1.0, *, alone: bool = False) -> Lease:
    return Lease(engine, holder=name, seconds=seconds, alone=alone)


def term_of(engine: Engine) -> int:
    with reading(engine) as conn:
        return rows.look(conn).term


@contextmanager
def waiting(lease: Lease, at_least: int = 1) -> Iterator[list[int | None]]:
    """A controller that stands by in a thread; what it got stands in the list."""
    got: list[int | None] = []
    stopping = threading.Event()
    thread = threading.Thread(target=lambda: got.append(lease.wait(stopping, at_least)))
    thread.start()
    try:
        yield got
    finally:
        stopping.set()
        thread.join()


def until(condition, seconds: float = 20.0) -> None:
    pause = threading.Event()
    for _ in range(int(seconds / 0.02)):
        if condition():
            return
        pause.wait(0.02)
    raise AssertionError("it did not happen")


def test_each_take_over_raises_the_term_above_what_devices_know(engine: Engine) -> None:
    with writing(engine) as conn:
        assert store.take_over(conn, 1) == 1
        assert store.take_over(conn, 1) == 2
        assert store.take_over(conn, 40) == 40
        assert store.take_over(conn, 1) == 41


def test_the_losers_write_touches_nothing(engine: Engine, other: Engine) -> None:
    with writing(engine) as conn:
        old = store.take_over(conn, 1)
    with writing(other) as conn:
        store.take_over(conn, 1)
    with pytest.raises(Fenced, match=f"term {old} was taken over"), writing_as(engine, old) as conn:
        store.put_meta(conn, "notices", {"from": "the loser"})
    with reading(engine) as conn:
        assert store.get_meta(conn, "notices") is None
        with pytest.raises(Fenced):
            store.check(conn, old)


def test_a_take_over_waits_for_the_transaction_that_is_open(engine: Engine, other: Engine) -> None:
    """Never both: what was begun under the old term commits before the new term exists."""
    with writing(engine) as conn:
        old = store.take_over(conn, 1)
    taken = threading.Event()

    def take() -> None:
        with writing(other) as conn:
            store.take_over(conn, 1)
        taken.set()

    thread = threading.Thread(target=take)
    with writing_as(engine, old) as conn:
        thread.start()
        assert not taken.wait(0.3)
        store.put_meta(conn, "notices", {"of": old})
    thread.join()
    assert term_of(engine) == old + 1
    with reading(engine) as conn:
        assert store.get_meta(conn, "notices") == {"of": old}


def test_two_that_see_a_free_lease_do_not_both_get_it(engine: Engine, other: Engine) -> None:
    with writing(engine) as conn:
        seen = rows.look(conn)
        rows.take(conn, seen, holder="a", seconds=5, at_least=1)
    with pytest.raises(Fenced, match="faster"), writing(other) as conn:
        rows.take(conn, seen, holder="b", seconds=5, at_least=1)


def test_one_stands_by_while_the_leader_lives_and_follows_when_it_stops(
    engine: Engine, other: Engine
) -> None:
    leader, follower = lease(engine, "a"), lease(other, "b")
    stopping = threading.Event()
    first = leader.wait(stopping, 1)
    assert first == 1
    with waiting(follower) as got:
        with leader.held(first):
            assert not stopping.wait(3.0)  # three times its seconds, and an idle loop
            assert got == []
        until(lambda: got)  # given back: no waiting
    assert got == [2]


def test_a_leader_that_stood_still_is_overtaken_notices_and_does_not_take_turns(
    engine: Engine, other: Engine
) -> None:
    frozen = 0.0
    sleeper = Lease(engine, holder="a", seconds=1.0, alone=False, clock=lambda: frozen)
    follower = lease(other, "b")
    first = sleeper.wait(threading.Event(), 1)
    assert first is not None
    with waiting(follower) as got:  # nobody renews the lease of the sleeper: it is stopped
        until(lambda: got)
    second = got[0]
    assert second == first + 1
    with follower.held(second):
        with sleeper.held(first), pytest.raises(Fenced):
            until(lambda: sleeper.turned())  # its first beat finds the new term
        with waiting(lease(engine, "a")) as again:
            assert not threading.Event().wait(3.0)
            assert again == []
        assert term_of(engine) == second


def test_our_own_dead_predecessor_is_not_waited_for(engine: Engine) -> None:
    for expected in (1, 2, 3):  # killed each time: nothing is given back
        mine = lease(engine, "host:/state", seconds=3600.0, alone=True)
        assert mine.wait(threading.Event(), 1) == expected


def test_a_hung_loop_loses_the_lease(
    engine: Engine, other: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("controller.lease.HUNG", 0.5)
    leader, follower = lease(engine, "a"), lease(other, "b")
    first = leader.wait(threading.Event(), 1)
    assert first is not None
    with leader.held(first), waiting(follower) as got:  # it makes no turn any more
        until(lambda: got)
    assert got == [first + 1]
    assert term_of(engine) == first + 1  # and giving back a lost lease changed nothing


def test_a_stopped_process_does_not_lock_the_others_out(postgres_url: str) -> None:
    """It was stopped in the middle of a transaction: the server ends that for it."""
    engine = open_control(postgres_url)
    impatient = open_engine(
        f"{postgres_url}?options=-c%20idle_in_transaction_session_timeout%3D500"
    )
    with writing(engine) as conn:
        term = store.take_over(conn, 1)
    with pytest.raises(DBAPIError), writing_as(impatient, term) as conn:  # noqa: PT012
        with writing(engine) as mine:
            assert store.take_over(mine, 1) == term + 1
        store.put_meta(conn, "notices", {"from": "the sleeper"})
    with reading(engine) as conn:
        assert store.get_meta(conn, "notices") is None
    for used in (engine, impatient):
        used.dispose()


def test_the_term_of_an_older_database_is_kept(database_url: str, tmp_path: Path) -> None:
    before = tmp_path / "before"
    before.mkdir()
    for file in SCHEMA.folder.glob("000[12]*.py"):
        shutil.copy(file, before)
    engine = open_engine(database_url)
    bring_to_head(engine, replace(SCHEMA, folder=before))
    with engine.begin() as conn:
        conn.execute(text("INSERT INTO meta (key, value) VALUES ('term', '17')"))
    bring_to_head(engine, SCHEMA)
    with writing(engine) as conn:
        assert store.take_over(conn, 1) == 18
    engine.dispose()
