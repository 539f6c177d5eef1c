"""Statements that every turn asks, compiled once and executed on the driver's own cursor.

SQLAlchemy writes the SQL and converts values and columns; what it does around each execution costs
several times what a small query itself costs, and a turn of the loop is made of small queries.
Errors are SQLAlchemy's, as from `connection.execute`.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

from sqlalchemy import Connection, Executable
from sqlalchemy.exc import DBAPIError, NoResultFound

Convert = Callable[[Any], Any]


class Prepared:
    def __init__(self, statement: Executable) -> None:
        self._statement = statement
        self._plans: dict[str, _Plan] = {}  # by dialect

    def all(self, connection: Connection, **values: Any) -> list[Any]:
        """All rows, their columns by name and by place."""
        plan = self._plan(connection, values)
        cursor = plan.execute(connection, values)
        plan.learn(cursor, connection)
        return [plan.row(row) for row in cursor.fetchall()]

    def plain(self, connection: Connection, **values: Any) -> list[tuple[Any, ...]]:
        """All rows as the driver answers them: nothing in them is converted."""
        cursor = self._plan(connection, values).execute(connection, values)
        return cast(list[tuple[Any, ...]], cursor.fetchall())

    def pages(
        self, connection: Connection, size: int, **values: Any
    ) -> Iterator[list[tuple[Any, ...]]]:
        """As `plain`, so many rows at a time; PostgreSQL sends what is binary as it is."""
        cursor = self._plan(connection, values).execute(connection, values, binary=True)
        while rows := cursor.fetchmany(size):
            yield rows

    def first(self, connection: Connection, **values: Any) -> Any:
        """The first row, or None."""
        rows = self.all(connection, **values)
        return rows[0] if rows else None

    def one(self, connection: Connection, **values: Any) -> Any:
        """The only row; raises NoResultFound where there is none."""
        rows = self.all(connection, **values)
        if not rows:
            raise NoResultFound("No row was found when one was required")
        return rows[0]

    def run(self, connection: Connection, **values: Any) -> int:
        """Execute what answers no rows; how many it changed."""
        return int(self._plan(connection, values).execute(connection, values).rowcount)

    def _plan(self, connection: Connection, values: Mapping[str, Any]) -> _Plan:
        name = connection.dialect.name
        plan = self._plans.get(name)
        if plan is None:
            plan = self._plans[name] = _Plan(self._statement, connection, values)
        return plan


class _Plan:
    def __init__(self, statement: Any, connection: Connection, values: Mapping[str, Any]) -> None:
        """`values`: what an insert gives; each time the same columns."""
        dialect = connection.dialect
        compiled = statement.compile(
            dialect=dialect,
            column_keys=list(values) if statement.is_insert else None,
            compile_kwargs={"render_postcompile": True},
        )
        self._text = str(compiled)
        self._driver: Any = dialect.loaded_dbapi
        self._given = dict(compiled.params)
        self._binds = dict(compiled._bind_processors)
        self._order: Sequence[str] | None = compiled.positiontup if compiled.positional else None
        columns = compiled._result_columns
        names = [column.keyname for column in columns]
        self._row: Any = collections.namedtuple("Row", names, rename=True)  # type: ignore[misc]
        self._types = [column.type for column in columns]
        self._converts: list[tuple[int, Convert]] | None = None  # until the driver names its types

    def execute(
        self, connection: Connection, values: dict[str, Any], *, binary: bool = False
    ) -> Any:
        given = {**self._given, **values}
        for name, convert in self._binds.items():
            given[name] = convert(given[name])
        sent = given if self._order is None else [given[name] for name in self._order]
        if not connection.in_transaction():
            connection.begin()  # as `connection.execute` does
        sends = {"binary": True} if binary and connection.dialect.name == "postgresql" else {}
        cursor: Any = connection.connection.cursor(**sends)
        try:
            cursor.execute(self._text, sent)
        except self._driver.Error as error:
            raise DBAPIError.instance(
                self._text, cast(Any, sent), error, self._driver.Error, dialect=connection.dialect
            ) from error
        return cursor

    def learn(self, cursor: Any, connection: Connection) -> None:
        """How the columns that this driver answers become values of ours."""
        if self._converts is None:
            answered = zip(self._types, cursor.description, strict=True)
            converts = [
                kind._cached_result_processor(connection.dialect, column[1])
                for kind, column in answered
            ]
            self._converts = [(i, convert) for i, convert in enumerate(converts) if convert]

    def row(self, row: Sequence[Any]) -> Any:
        if not self._converts:
            return self._row._make(row)
        cells = list(row)
        for place, convert in self._converts:
            cells[place] = convert(cells[place])
        return self._row._make(cells)
