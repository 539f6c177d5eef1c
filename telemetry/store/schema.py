"""Brings the tables of a database to the newest revision, whoever comes first.

A store says what it has (`Schema`); its folder of revisions holds one file `NNNN_title.py` a step,
and the highest number is the head. `bring_to_head` costs one SELECT when the database stands there
already; else alembic, imported only then, runs the missing steps in one transaction under a lock:
all of them or none, and several processes that start at once do not race.

Rules, in order:
1. A database at the head is left alone.
2. One whose revision these files do not know was made by a newer version: it is refused.
3. Tables without a revision were made by version 0.1.0: they are the baseline.
4. Everything else gets the steps that it lacks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, Engine, MetaData, inspect, text
from sqlalchemy.exc import DatabaseError

from telemetry.store.database import reading


class NewerSchema(RuntimeError):
    """The database was written by a newer version: this one must not touch it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schema:
    """The tables of one store, and the way to them."""

    name: str  # as people read it; the revision stands in the table `<name>_version`
    metadata: MetaData
    folder: Path  # of the revisions
    lock: int  # PostgreSQL: key of the advisory lock

    @property
    def version_table(self) -> str:
        return f"{self.name}_version"

    def revisions(self) -> list[str]:
        """Numbers of all revisions, oldest first."""
        return sorted(file.name[:4] for file in self.folder.glob("[0-9]*.py"))


def bring_to_head(engine: Engine, schema: Schema) -> None:
    """Raises NewerSchema for a database from the future, SQLAlchemyError for one out of reach."""
    known = schema.revisions()
    if _peek(engine, schema) == known[-1]:
        return
    with _alone(engine, schema) as connection:
        current = _current(connection, schema)
        if current == known[-1]:
            return  # somebody else was faster
        if current is not None and current not in known:
            raise NewerSchema(
                f"the {schema.name} database is at revision {current}, this version knows "
                f"{known[-1]}: run the newer version, or restore a backup from before its upgrade"
            )
        _upgrade(connection, schema, baseline=known[0] if current is None else None)


def _peek(engine: Engine, schema: Schema) -> str | None:
    """The revision, cheaply; None: look properly."""
    try:
        with reading(engine) as connection:
            return _version(connection, schema)
    except DatabaseError:  # no such table; an unreachable database says so again right away
        return None


def _current(connection: Connection, schema: Schema) -> str | None:
    return (
        _version(connection, schema)
        if inspect(connection).has_table(schema.version_table)
        else None
    )


def _version(connection: Connection, schema: Schema) -> str | None:
    query = text(f"SELECT version_num FROM {schema.version_table}")  # noqa: S608 - our own name
    found = connection.execute(query).scalar()
    return None if found is None else str(found)


@contextmanager
def _alone(engine: Engine, schema: Schema) -> Iterator[Connection]:
    """A transaction that no other process's steps can come between."""
    with engine.connect() as connection:
        if connection.dialect.name != "sqlite":
            with connection.begin():
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": schema.lock})
                yield connection
            return
        # A table is altered by copying it. With foreign keys on, dropping the old one would clear
        # the rows that refer to it; the switch works outside of transactions only.
        raw = connection.connection.cursor()
        raw.execute("PRAGMA foreign_keys=OFF")
        try:
            with connection.begin():  # IMMEDIATE: the write lock
                yield connection
                broken = connection.execute(text("PRAGMA foreign_key_check")).all()
                if broken:
                    raise RuntimeError(f"{schema.name} database: rows without parents: {broken}")
        finally:
            raw.execute("PRAGMA foreign_keys=ON")


def _upgrade(connection: Connection, schema: Schema, baseline: str | None) -> None:
    from alembic.migration import MigrationContext
    from alembic.operations import Operations
    from alembic.script import ScriptDirectory

    scripts = ScriptDirectory(schema.folder, version_locations=[schema.folder])
    context = MigrationContext.configure(
        connection,
        opts={
            "version_table": schema.version_table,
            "render_as_batch": True,
            "fn": lambda now, _: scripts._upgrade_revs("head", now),
        },
    )
    if baseline is not None and _has_tables(connection, schema):
        context.stamp(scripts, baseline)
    with Operations.context(context):
        context.run_migrations()


def _has_tables(connection: Connection, schema: Schema) -> bool:
    there = set(inspect(connection).get_table_names())
    return not there.isdisjoint(schema.metadata.tables)
