"""Both databases come to the newest revision from anywhere, and keep their rows."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from alembic.autogenerate import produce_migrations, render_python_code
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, inspect, text
from sqlalchemy.exc import IntegrityError

from controller.store.tables import SCHEMA as CONTROL
from device_agent.protocol import Health
from telemetry.report import Level
from telemetry.store.database import open_engine
from telemetry.store.fold import Batch, Heard
from telemetry.store.reports import Store
from telemetry.store.schema import NewerSchema, Schema, bring_to_head
from telemetry.store.tables import SCHEMA as TELEMETRY
from telemetry.sums import Sums

BOTH = pytest.mark.parametrize("schema", [CONTROL, TELEMETRY], ids=lambda s: s.name)

RAISE_DEVICES = """
import sqlalchemy as sa
from alembic import op

revision = "{number}"
down_revision = "{before}"


def upgrade() -> None:
    with op.batch_alter_table("devices") as table:
        table.add_column(sa.Column("colour", sa.String(20), nullable=False, server_default="red"))
        table.alter_column("status", type_=sa.String(32), existing_type=sa.String(16))
    op.execute("UPDATE devices SET colour = 'blue' WHERE id = 'car-1'")
    {then}
"""


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    engine = open_engine(database_url)
    yield engine
    engine.dispose()


def with_step(tmp_path: Path, schema: Schema, then: str = "pass") -> Schema:
    """The same store, one revision further."""
    folder = tmp_path / "migrations"
    shutil.copytree(schema.folder, folder)
    before = schema.revisions()[-1]
    number = f"{int(before) + 1:04d}"
    step = RAISE_DEVICES.format(number=number, before=before, then=then)
    (folder / f"{number}_colour.py").write_text(step)
    return replace(schema, folder=folder)


def only_baseline(tmp_path: Path, schema: Schema) -> Schema:
    folder = tmp_path / f"baseline-{schema.name}"
    folder.mkdir()
    shutil.copy(schema.folder / "0001_baseline.py", folder)
    return replace(schema, folder=folder)


def a_device_with_a_token(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO devices (id, fleet, labels, status, password_issue, term, created_at,"
                " change) VALUES ('car-1', 'cars', '{\"model\": \"m3\"}', 'active', 1, 0, 5.5, 7)"
            )
        )
        connection.execute(
            text("INSERT INTO enrolment_tokens (hash, device, expires_at) VALUES ('h', 'car-1', 9)")
        )


def version(engine: Engine, schema: Schema) -> str:
    with engine.connect() as connection:
        query = text(f"SELECT version_num FROM {schema.version_table}")  # noqa: S608
        return str(connection.execute(query).scalar_one())


@BOTH
def test_revisions_are_one_line_numbered_by_their_files(schema: Schema) -> None:
    scripts = ScriptDirectory(schema.folder, version_locations=[schema.folder])
    line = [script.revision for script in scripts.walk_revisions()][::-1]
    assert scripts.get_heads() == line[-1:]
    assert line == schema.revisions() == [f"{n:04d}" for n in range(1, len(line) + 1)]


@BOTH
def test_the_migrated_schema_is_the_one_that_the_code_says(engine: Engine, schema: Schema) -> None:
    """A change of tables without a revision fails here; the message is the revision's body."""
    bring_to_head(engine, CONTROL)
    bring_to_head(engine, TELEMETRY)  # on PostgreSQL in one database, as in production

    def ours(name: str | None, kind: str, _parents: object) -> bool:
        return kind != "table" or name in schema.metadata.tables

    with engine.connect() as connection:
        options = {"compare_type": True, "include_name": ours, "render_as_batch": True}
        context = MigrationContext.configure(connection, opts=options)
        missing = produce_migrations(context, schema.metadata).upgrade_ops
        assert missing is not None
        assert missing.is_empty(), "missing revision:\n" + render_python_code(missing)


@BOTH
def test_tables_of_a_version_without_revisions_are_the_baseline(
    engine: Engine, schema: Schema, tmp_path: Path
) -> None:
    bring_to_head(engine, only_baseline(tmp_path, schema))
    if schema is CONTROL:
        a_device_with_a_token(engine)
    with engine.begin() as connection:
        connection.execute(text(f"DROP TABLE {schema.version_table}"))
    bring_to_head(engine, schema)
    assert version(engine, schema) == schema.revisions()[-1]
    with engine.connect() as connection:
        if schema is CONTROL:
            row = connection.execute(text("SELECT id, created_at, change FROM devices")).one()
            assert tuple(row) == ("car-1", 5.5, 7)
        else:
            rows = connection.execute(text("SELECT id, batch FROM telemetry_state")).all()
            assert [tuple(row) for row in rows] == [(1, 0)]


def test_health_of_the_first_version_is_read_after_the_step(engine: Engine, tmp_path: Path) -> None:
    bring_to_head(engine, only_baseline(tmp_path, TELEMETRY))
    told = {"b": 1, "p": 0, "d": "car-1", "r": 5.0, "o": "b1", "s": 7, "c": '{"app":"sha256:x"}'}
    told |= {"l": '{"cpu":[2,3.0,5.0]}', "n": '{"crash":1}', "e": '{"km":0.5}'}
    with engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO telemetry_health VALUES "
                "(:b, :p, :d, :r, :o, :s, NULL, :c, 1.0, 2.0, :l, :n, :e)"
            ),
            told,
        )
    bring_to_head(engine, TELEMETRY)
    (row,) = Store(engine).health_since(0)
    assert (row.device, row.seq, row.received_at, row.seconds) == ("car-1", 7, 5.0, 2.0)
    assert row.levels == {"cpu": Level(n=2, total=3.0, squares=5.0)}
    assert (row.counters, row.exposure) == ({"crash": 1}, {"km": 0.5})


def test_sums_of_the_first_version_are_read_after_the_step(engine: Engine, tmp_path: Path) -> None:
    """Two days of a device, one of another; the window begins between them."""
    bring_to_head(engine, only_baseline(tmp_path, TELEMETRY))
    day = 20_000
    told = [
        (24 * day + 3, "car-1", 0, "crash", 2, 5.0, 0.0),
        (24 * day + 3, "car-1", 1, "device_hour", 2, 1.5, 0.0),
        (24 * day + 3, "car-1", 2, "cpu", 4, 8.0, 20.0),
        (24 * day + 30, "car-1", 1, "device_hour", 1, 0.25, 0.0),
        (24 * day + 30, "car-1", 2, "cpu", 1, 7.0, 49.0),
        (24 * day + 30, "car-2", 0, "crash", 1, 1.0, 0.0),
    ]
    names = ("h", "d", "k", "m", "n", "t", "q")
    with engine.begin() as connection:
        for row in told:
            connection.execute(
                text("INSERT INTO telemetry_rollups VALUES (:h, :d, :k, :m, :n, :t, :q)"),
                dict(zip(names, row, strict=True)),
            )
    bring_to_head(engine, TELEMETRY)
    store = Store(engine)
    hour = store.totals(since=(24 * day + 3) * 3600, until=(24 * day + 4) * 3600)
    assert hour.counters["crash"].tolist() == [5.0]
    assert hour.levels["cpu"].tolist() == [2.0]
    assert store.checkpoints((day + 9) * 86_400) == [day + 1]
    since = store.sums().since(store.checkpoint(day + 1))
    assert sorted(since.devices) == ["car-1", "car-2"]
    one, other = since.of(["car-1"]), since.of(["car-2"])
    assert (one.exposure, one.levels) == ({"device_hour": [0.25]}, {"cpu": [7.0]})
    assert (one.counters, other.counters) == ({"crash": [0.0]}, {"crash": [1.0]})
    ever = store.sums().since(Sums())
    assert sorted(ever.counters["crash"].tolist()) == [1.0, 5.0]
    health = Health(boot="b", boot_count=1, seq=1, components={}, t0=0.0, dt=1.0)
    more = replace(health, counters={"crash": 1, "alarm": 1})
    store.write(Batch(heard=[Heard("car-2", [more])]), (24 * day + 31) * 3600.0)
    ever = store.sums().since(Sums()).of(["car-2"])
    assert ever.counters == {"crash": [2.0], "alarm": [1.0]}


def test_rows_and_what_refers_to_them_survive_a_step(engine: Engine, tmp_path: Path) -> None:
    bring_to_head(engine, CONTROL)
    a_device_with_a_token(engine)
    bring_to_head(engine, with_step(tmp_path, CONTROL))
    with engine.connect() as connection:
        row = connection.execute(text("SELECT id, colour, created_at FROM devices")).one()
        assert tuple(row) == ("car-1", "blue", 5.5)
        assert connection.execute(text("SELECT device FROM enrolment_tokens")).scalar() == "car-1"
        assert inspect(connection).get_foreign_keys("enrolment_tokens")
    orphan = text("INSERT INTO enrolment_tokens VALUES ('x', 'nobody', 9, NULL)")
    with pytest.raises(IntegrityError), engine.begin() as connection:
        connection.execute(orphan)  # the switch for foreign keys is on again


def test_a_step_that_fails_leaves_nothing_behind(engine: Engine, tmp_path: Path) -> None:
    bring_to_head(engine, CONTROL)
    a_device_with_a_token(engine)
    broken = with_step(tmp_path, CONTROL, then="raise OSError('disk')")
    with pytest.raises(OSError, match="disk"):
        bring_to_head(engine, broken)
    assert version(engine, CONTROL) == CONTROL.revisions()[-1]
    columns = {column["name"] for column in inspect(engine).get_columns("devices")}
    assert "colour" not in columns
    bring_to_head(engine, CONTROL)
    shutil.rmtree(broken.folder)
    bring_to_head(engine, with_step(tmp_path, CONTROL))  # and later it works


@BOTH
def test_a_database_from_the_future_is_refused_and_left_alone(
    engine: Engine, schema: Schema
) -> None:
    bring_to_head(engine, schema)
    with engine.begin() as connection:
        newer = f"UPDATE {schema.version_table} SET version_num = '9876'"  # noqa: S608
        connection.execute(text(newer))
    with pytest.raises(NewerSchema, match=rf"the {schema.name} database is at revision 9876.*"):
        bring_to_head(engine, schema)
    assert version(engine, schema) == "9876"


def test_commands_say_that_a_database_is_too_new(tmp_path: Path) -> None:
    engine = open_engine(f"sqlite:///{tmp_path}/control.db")
    bring_to_head(engine, CONTROL)
    with engine.begin() as connection:
        connection.execute(text("UPDATE control_version SET version_num = '9876'"))
    engine.dispose()
    environment = {**os.environ, "BELLWETHER_BROKER": "mqtt://127.0.0.1:1"}
    for command in (["token", "list"], ["serve", "--repo", "/nowhere"]):
        ended = subprocess.run(
            [sys.executable, "-m", "controller.cli", *command, "--state-dir", str(tmp_path)],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert ended.returncode == 1
        assert "at revision 9876" in ended.stderr
        assert "run the newer version" in ended.stderr
        assert "Traceback" not in ended.stderr


@BOTH
def test_roles_that_start_at_once_do_not_race(
    schema: Schema, database_url: str, tmp_path: Path
) -> None:
    """Empty, and one step behind."""
    schemas = [schema, with_step(tmp_path, schema)] if schema is CONTROL else [schema]
    failures: list[Exception] = []

    def start(wanted: Schema) -> None:
        engine = open_engine(database_url)
        try:
            bring_to_head(engine, wanted)
        except Exception as error:  # noqa: BLE001
            failures.append(error)
        finally:
            engine.dispose()

    for wanted in schemas:
        threads = [threading.Thread(target=start, args=(wanted,)) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []


def test_a_database_at_its_head_is_opened_without_alembic(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/control.db"
    engine = open_engine(url)
    bring_to_head(engine, CONTROL)
    engine.dispose()
    probe = (
        "import sys; from controller.store.database import open_control; "
        f"open_control({url!r}).dispose(); sys.exit('alembic' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", probe]).returncode == 0
