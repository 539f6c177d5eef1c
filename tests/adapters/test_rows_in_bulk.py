"""Orders and members come back from both databases as they were recorded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Column, Engine, MetaData, Table, event
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError

from controller.rollout.model import Arm, Member, MemberState, Rollout, RolloutState
from controller.store import rollouts as store
from controller.store.database import open_control
from controller.store.tables import desired
from telemetry.store import bulk
from telemetry.store.database import reading, writing

DIGEST = "sha256:" + "a" * 64


@pytest.fixture(params=["sqlite", "postgresql"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    if request.param == "sqlite":
        opened = open_control(f"sqlite:///{tmp_path}/control.db")
    else:
        opened = open_control(request.getfixturevalue("postgres_url"))
    yield opened
    opened.dispose()


def order(device: str, generation: int) -> dict[str, object]:
    told = {"release": 'app-\u20ac "1"', "digest": DIGEST, "at": 1.5, "rollout": None}
    return {
        "device": device, "term": 3, "generation": generation, "attempt": "r.0", "kind": "install",
        "components": {"app": told}, "rollout": None, "body": b"\x00signed", "at": 2.5,
        "published": False,
    }  # fmt: skip


@pytest.mark.parametrize("n", [1, 3, 700])
def test_orders(engine: Engine, n: int) -> None:
    for generation in (1, 2):
        with writing(engine) as conn:
            store.put_orders(conn, [order(f"car-{i}", generation) for i in range(n)])
    with reading(engine) as conn:
        loaded = store.load_orders(conn)
        waiting = store.unpublished(conn)
    assert len(loaded) == len(waiting) == n
    one = loaded["car-0"]
    assert (one.term, one.generation, one.kind, one.at) == (3, 2, "install", 2.5)
    assert one.components["app"].release == 'app-\u20ac "1"'
    assert one.components["app"].digest == DIGEST
    assert waiting[0][1] == b"\x00signed"


@pytest.mark.parametrize("n", [1, 9, 700])
def test_what_the_broker_took_waits_no_more_and_a_newer_order_does(engine: Engine, n: int) -> None:
    with writing(engine) as conn:
        store.put_orders(conn, [order(f"car-{i}", 2) for i in range(n + 2)])
        taken = [(f"car-{i}", 2) for i in range(n)]
        store.mark_published(conn, [*taken, ("car-0", 1), (f"car-{n}", 1), ("gone", 2)])
        store.mark_published(conn, [])
    with reading(engine) as conn:
        waiting = {device for device, _, _, _ in store.unpublished(conn)}
    assert waiting == {f"car-{n}", f"car-{n + 1}"}


def test_members(engine: Engine) -> None:
    previous = {"app": {"release": "app-1", "digest": DIGEST}}
    made = [
        Member(
            device=f"car-{i}", step=0, arm=Arm.EXPOSED, drawn_at=1.0, hardware="hw", band=i % 5,
            score=None, previous=previous if i % 2 else None, state=MemberState.TOLD,
        )
        for i in range(5)
    ]  # fmt: skip
    rollout = Rollout(
        id="r1", name="cars", fleet="cars", release="app-2", digest=DIGEST, artifacts={},
        commit="c", author="a", state=RolloutState.PROGRESSING, sentence="", revision=1, step=0,
        opened_at=0.0, step_at=0.0, seed="s", pinned={},
    )  # fmt: skip
    with writing(engine) as conn:
        store.insert_rollout(conn, rollout)
        store.put_members(conn, "r1", made)
    with reading(engine) as conn:
        assert store.load_members(conn) == {"r1": {m.device: m for m in made}}


def test_a_fault_of_the_driver_is_sqlalchemys(engine: Engine) -> None:
    """Whoever frees room on a full disk, or waits for a database, knows faults by these."""
    values = order("car-1", 1) | {"components": "{}"}
    rows = [tuple(values[column.name] for column in desired.columns)]
    nobody = Table("nobody", MetaData(), *(Column(c.name, c.type) for c in desired.columns))
    for write in (bulk.insert, bulk.upsert):
        with pytest.raises(DBAPIError), writing(engine) as conn:
            write(conn, nobody, rows)
    with pytest.raises(DBAPIError), reading(engine) as conn:
        list(bulk.of_devices(conn, [nobody.c.term], ["car-1"]))
    with pytest.raises(IntegrityError), writing(engine) as conn:
        bulk.insert(conn, desired, [tuple(None for _ in desired.columns)])


def test_an_order_that_a_full_database_refuses_is_an_operational_error(tmp_path: Path) -> None:
    full = open_control(f"sqlite:///{tmp_path}/control.db")
    with full.connect() as conn:
        pages = conn.exec_driver_sql("PRAGMA page_count").scalar_one()

        @event.listens_for(full, "connect")
        def small(connection: Any, _: Any) -> None:
            connection.execute(f"PRAGMA max_page_count = {pages + 2}")

    full.dispose()
    many = [order(f"car-{i}", 1) | {"body": b"x" * 2_000} for i in range(100)]
    with pytest.raises(OperationalError, match="full"), writing(full) as conn:
        store.put_orders(conn, many)
    full.dispose()
