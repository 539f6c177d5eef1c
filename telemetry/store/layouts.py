"""The layouts of packed rows in the database: written before the first row that has one."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy import Connection, bindparam, select

from telemetry.store import bulk, tables
from telemetry.store.packed import parsed
from telemetry.store.prepared import Prepared
from telemetry.sums import Layout


def find(connection: Connection, key: int, known: dict[int, Layout]) -> Layout:
    """The layout with this id, which the database has; `known` remembers it."""
    found = known.get(key)
    if found is None:
        found = known[key] = parsed(_NAMES.one(connection, id=key).names)
    return found


def save(connection: Connection, layouts: Iterable[Layout], known: dict[int, Layout]) -> None:
    """Those that the database may not have yet."""
    new = {layout.id: layout for layout in layouts if layout.id not in known}
    bulk.upsert(connection, tables.layouts, [(key, new[key].text) for key in sorted(new)])
    known.update(new)


_LAYOUTS = tables.layouts.c
_NAMES = Prepared(select(_LAYOUTS.names).where(_LAYOUTS.id == bindparam("id")))
