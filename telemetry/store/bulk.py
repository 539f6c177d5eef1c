"""Many rows at once, by the fastest road of each database (research: 5–14 times a plain insert).

SQLite: some thousand rows in one INSERT on the driver's own connection; it works without Python's
lock for as long as a statement lasts, and with `executemany` it would ask for the lock again after
each row, behind whoever else is busy. PostgreSQL: COPY, for upserts into a temporary table that is
merged by one statement. The caller's transaction decides about all of it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, cast

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Connection,
    Float,
    Integer,
    LargeBinary,
    SmallInteger,
    String,
    Table,
    Text,
)
from sqlalchemy.exc import DBAPIError
from sqlalchemy.schema import CreateColumn
from sqlalchemy.types import TypeEngine

_MANY = 8_192  # keys in one IN list
_VALUES = 32_000  # in one statement; SQLite takes 32,766
Row = Sequence[Any]  # in the order of the table's columns
Names = Sequence[str]


def insert(connection: Connection, table: Table, rows: Sequence[Row]) -> None:
    if not rows:
        return
    if connection.dialect.name == "postgresql":
        _copy(connection, table, table.name, rows)
        return
    _execute(connection, table, rows)


def upsert(
    connection: Connection, table: Table, rows: Sequence[Row], *, added: Iterable[str] = ()
) -> None:
    """Insert, or replace the row with the same key; columns in `added` are summed instead.

    A key may occur once in `rows`: PostgreSQL refuses to merge one row twice.
    """
    if not rows:
        return
    conflict = _conflict(table, frozenset(added))
    if connection.dialect.name == "postgresql":
        stage = f"stage_{table.name}"
        columns = ", ".join(
            str(CreateColumn(column).compile(dialect=connection.dialect)).replace("NOT NULL", "")
            for column in table.columns
        )
        connection.exec_driver_sql(
            f"CREATE TEMPORARY TABLE IF NOT EXISTS {stage} ({columns}) ON COMMIT DELETE ROWS"
        )
        _copy(connection, table, stage, rows)
        names = _names(table)
        connection.exec_driver_sql(
            f"INSERT INTO {table.name} ({names}) SELECT {names} FROM {stage} {conflict}"  # noqa: S608
        )
        connection.exec_driver_sql(f"DELETE FROM {stage}")  # noqa: S608
        return
    _execute(connection, table, rows, conflict)


def mark(connection: Connection, column: Column[bool], rows: Sequence[Row], key: Names) -> None:
    """Set this column where the columns of `key` are as in one of `rows`."""
    if not rows:
        return
    table = column.table.name
    change = f"UPDATE {table} SET {column.name} = TRUE"  # noqa: S608
    if connection.dialect.name == "postgresql":
        where = " AND ".join(f"{name} = %s" for name in key)
        connection.exec_driver_sql(f"{change} WHERE {where}", [tuple(row) for row in rows])
        return
    where = " AND ".join(f"{table}.{name} = given.column{i}" for i, name in enumerate(key, 1))
    for values, given in _lots(rows, len(key)):
        statement = f"{change} FROM (VALUES {values}) AS given WHERE {where}"
        connection.exec_driver_sql(statement, tuple(given))


def of_devices(
    connection: Connection,
    columns: Sequence[Column[Any]],
    devices: Collection[str],
    where: str = "",
) -> Iterator[Row]:
    """(device, *columns) of these devices, past SQLAlchemy: it costs more than the query."""
    names = ", ".join(column.name for column in columns)
    statement = f"SELECT device, {names} FROM {columns[0].table.name} WHERE {where} device "  # noqa: S608
    for some in _pieces(devices):
        with _cursor(connection) as cursor:
            if connection.dialect.name == "postgresql":
                rows = cursor.execute(f"{statement}= ANY(%s)", (some,))
            else:
                rows = cursor.execute(f"{statement}IN ({', '.join('?' * len(some))})", some)
        yield from rows


def _pieces(devices: Collection[str]) -> Iterator[list[str]]:
    """Lists of keys, each as long as a power of two: the last key is repeated.

    Each length of an IN list is a statement of its own to the driver, and SQLite's keeps 128 of
    them: with any length that is 40 MiB, and hardly one is ever found again.
    """
    keys = sorted(devices)
    for first in range(0, len(keys), _MANY):
        some = keys[first : first + _MANY]
        yield some + some[-1:] * ((1 << (len(some) - 1).bit_length()) - len(some))


def _execute(connection: Connection, table: Table, rows: Sequence[Row], conflict: str = "") -> None:
    with _cursor(connection) as cursor:
        for values, given in _lots(rows, len(table.columns)):
            statement = f"INSERT INTO {table.name} ({_names(table)}) VALUES {values} {conflict}"  # noqa: S608
            cursor.execute(statement, given)


def _lots(rows: Sequence[Row], width: int) -> Iterator[tuple[str, list[Any]]]:
    """(a list of VALUES for SQLite, what is in it), as many rows as a statement takes."""
    first, size = 0, _VALUES // width
    marks = f"({', '.join('?' * width)})"
    while first < len(rows):
        while size > len(rows) - first:  # few sizes: the driver finds its statements again
            size = max(1, size // 8)
        yield ", ".join([marks] * size), list(chain.from_iterable(rows[first : first + size]))
        first += size


def _names(table: Table) -> str:
    """Always said: in a migrated table, columns may stand in another order."""
    return ", ".join(column.name for column in table.columns)


def _conflict(table: Table, added: frozenset[str]) -> str:
    key = [column.name for column in table.primary_key]
    sets = ", ".join(
        f"{name} = {table.name}.{name} + excluded.{name}"
        if name in added
        else f"{name} = excluded.{name}"
        for name in (column.name for column in table.columns)
        if name not in key
    )
    return f"ON CONFLICT ({', '.join(key)}) DO UPDATE SET {sets}"


@contextmanager
def _cursor(connection: Connection) -> Iterator[Any]:
    """The driver's own; its errors are SQLAlchemy's all the same: a full disk is told by them."""
    driver = cast(Any, connection.dialect.dbapi)
    try:
        yield connection.connection.cursor()
    except driver.Error as error:
        raise DBAPIError.instance(
            None, None, error, driver.Error, dialect=connection.dialect
        ) from error


def _copy(connection: Connection, table: Table, name: str, rows: Sequence[Row]) -> None:
    """Binary: twice as fast as text, and no character needs an escape."""
    statement = f"COPY {name} ({_names(table)}) FROM STDIN (FORMAT BINARY)"
    with _cursor(connection) as cursor, cursor.copy(statement) as copy:
        copy.set_types([_oid(column.type) for column in table.columns])
        for row in rows:
            copy.write_row(row)


def _oid(kind: TypeEngine[Any]) -> str:
    """The PostgreSQL name of a column's type; the narrower types come first."""
    for known, name in _TYPES:
        if isinstance(kind, known):
            return name
    raise TypeError(f"no bulk rows with a column of {kind!r}")


_TYPES: tuple[tuple[type[TypeEngine[Any]], str], ...] = (
    (SmallInteger, "int2"),
    (BigInteger, "int8"),
    (Integer, "int4"),
    (Boolean, "bool"),
    (Float, "float8"),
    (LargeBinary, "bytea"),
    (JSON, "text"),  # its text as it is: the driver would take a str for a JSON string
    (Text, "text"),
    (String, "varchar"),
)
