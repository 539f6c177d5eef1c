"""The running sums as they were when a day began: with them, a window costs two readings.

Rules, in order:

1. A day's checkpoint is taken once, in the first minute of that day in which somebody sweeps, and
   never changed. What comes late counts in the day in which it comes.
2. It is read in one view and written in one transaction: all of it or nothing.
3. A checkpoint of a day that is still to come was taken by a clock that was wrong: it goes.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, Engine, bindparam, delete, func, select
from sqlalchemy.exc import IntegrityError

from telemetry.store import bulk, layouts, sums, tables
from telemetry.store.database import reading, writing
from telemetry.store.prepared import Prepared
from telemetry.sums import Block, Layout, Sums

DAY = 86_400.0
_AT_ONCE = 16  # rows


def take(engine: Engine, now: float) -> bool:
    """Today's, when it is not there yet and anybody has counted anything."""
    table, today = tables.checkpoints, int(now // DAY)
    with reading(engine) as connection:
        if today in days(connection, now):
            return False
        rows = [
            (today, place, block.layout.id, "\n".join(block.devices), block.columns.tobytes())
            for place, block in enumerate(sums.running(connection))
        ]
    try:
        with writing(engine) as connection:
            connection.execute(delete(table).where(table.c.day > today))
            for row in rows:  # one by one: each is large
                bulk.insert(connection, table, [row])
    except IntegrityError:
        return False  # another process was faster
    return bool(rows)


def days(connection: Connection, since: float) -> Sequence[int]:
    """The newest that is not after `since`, if there is one, and all later ones, in order."""
    return [row[0] for row in _DAYS.plain(connection, begin=int(since // DAY))]


def read(connection: Connection, day: int) -> Sums:
    known: dict[int, Layout] = {}
    return Sums(
        [
            Block.of_bytes(layouts.find(connection, key, known), devices.split("\n"), columns)
            for rows in _OF_DAY.pages(connection, _AT_ONCE, day=day)
            for key, devices, columns in rows
        ]
    )


_ALL = tables.checkpoints.c
_FIRST = select(func.max(_ALL.day)).where(_ALL.day <= bindparam("begin")).scalar_subquery()
_DAYS = Prepared(
    select(_ALL.day).distinct().where(_ALL.day >= func.coalesce(_FIRST, 0)).order_by(_ALL.day)
)
_OF_DAY = Prepared(
    select(_ALL.layout, _ALL.devices, _ALL.sums)
    .where(_ALL.day == bindparam("day"))
    .order_by(_ALL.place)
)
