"""Prepared statements answer what SQLAlchemy answers, on both databases, and fail as it fails."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
from sqlalchemy import (
    JSON,
    Boolean,
    Column,
    Double,
    Engine,
    LargeBinary,
    MetaData,
    String,
    Table,
    bindparam,
    insert,
    select,
    update,
)
from sqlalchemy.exc import DBAPIError, IntegrityError, NoResultFound

from telemetry.store.database import open_engine, reading, writing
from telemetry.store.prepared import Prepared

things = Table(
    "things",
    MetaData(),
    Column("name", String(20), primary_key=True),
    Column("count", Double),
    Column("there", Boolean, nullable=False),
    Column("plain", JSON),
    Column("raw", LargeBinary),
)
NEW = Prepared(insert(things))
ALL = Prepared(select(things).where(things.c.name.in_(("a", "b"))).order_by(things.c.name))
SET = Prepared(
    update(things).where(things.c.name == bindparam("named")).values(plain=bindparam("new"))
)
A = {"name": "a", "count": 1.5, "there": True, "plain": {"x": [1, "é"]}, "raw": b"\0\xff"}
B = {"name": "b", "count": None, "there": False, "plain": None, "raw": None}


@pytest.fixture(params=["sqlite", "postgresql"])
def engine(request: pytest.FixtureRequest, tmp_path: object) -> Iterator[Engine]:
    url = f"sqlite:///{tmp_path}/x.db"
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres_url")
    engine = open_engine(url)
    things.metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, -0.0, 1e-320, 2**80, True, None, "é\u2028"], "": {}},
        [math.inf, -math.inf],  # what Python writes is read again, though it is no JSON
        "half a pair: \ud800",
    ],
)
def test_a_json_column_says_what_was_written(value: object, tmp_path: object) -> None:
    engine = open_engine(f"sqlite:///{tmp_path}/x.db")
    things.metadata.create_all(engine)
    with writing(engine) as conn:
        conn.execute(insert(things).values(A | {"plain": value}))
        assert conn.execute(select(things.c.plain)).scalar_one() == value
    engine.dispose()


def test_values_go_in_and_come_out_as_they_are(engine: Engine) -> None:
    with writing(engine) as conn:
        assert NEW.run(conn, **A) == 1
        assert NEW.run(conn, **B) == 1
        assert SET.run(conn, named="a", new={"y": None}) == 1
        assert SET.run(conn, named="nobody", new={}) == 0
    with reading(engine) as conn:
        found = [row._asdict() for row in ALL.all(conn)]
        known = [dict(row._mapping) for row in conn.execute(select(things).order_by("name"))]
    assert found == known == [{**A, "plain": {"y": None}}, B]


def test_plain_rows_are_the_drivers(engine: Engine) -> None:
    with writing(engine) as conn:
        NEW.run(conn, **A)
    with reading(engine) as conn:
        found = ALL.plain(conn)
        known = conn.execute(select(things)).cursor.fetchall()  # type: ignore[union-attr]
    assert found == known
    assert [type(cell) for cell in found[0]] == [type(cell) for cell in known[0]]


def test_one_row_is_there_or_its_absence_is_an_error(engine: Engine) -> None:
    with reading(engine) as conn, pytest.raises(NoResultFound):
        ALL.one(conn)
    with writing(engine) as conn:
        NEW.run(conn, **A)
        assert ALL.one(conn).name == "a"


def test_it_belongs_to_the_transaction(engine: Engine) -> None:
    with engine.connect() as conn:
        NEW.run(conn, **A)
        assert ALL.first(conn).raw == A["raw"]
        conn.rollback()
    with reading(engine) as conn:
        assert ALL.first(conn) is None


def test_its_errors_are_sqlalchemys(engine: Engine) -> None:
    with engine.connect() as conn:
        NEW.run(conn, **A)
        with pytest.raises(IntegrityError):
            NEW.run(conn, **A)
    things.drop(engine)
    with reading(engine) as conn, pytest.raises(DBAPIError, match="things"):
        ALL.all(conn)
