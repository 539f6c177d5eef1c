"""Deletes what is too old, a bounded piece at a time, in ingest's own transactions.

Rules, in order:

1. Raw messages go first, then hourly sums and checkpoints; running sums stay, and what was counted
   is remembered longer than all messages.
2. A boot is forgotten only together with a floor: what that boot or an older one sends afterwards
   is refused as late, so that forgetting never counts a message twice.
3. A device keeps at most `BOOTS` boots, however many it invents.
4. Floors are raised and boots deleted in a turn of their own (`telemetry.store.turn`): no batch is
   being written that read the old ones, and none after it remembers them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Engine, Select, and_, bindparam, delete, func, select, update

from telemetry.store import tables, turn
from telemetry.store.database import reading, writing
from telemetry.store.rollups import HOUR

DAY = 86_400.0
BOOTS = 64
_PIECE = 20_000  # rows per transaction: the ingest shall not wait for a long delete


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """Seconds to keep each kind of row."""

    raw: float = 30 * DAY
    rollups: float = 400 * DAY
    boots: float = 90 * DAY


def sweep(engine: Engine, now: float, keep: Retention | None = None) -> int:
    """One piece of each kind; returns how many rows went, 0 when all is done."""
    keep = keep or Retention()
    gone = 0
    with writing(engine) as connection:
        gone += _raw(connection, now - keep.raw)
    with writing(engine) as connection:
        gone += _rollups(connection, int((now - keep.rollups) // HOUR))
        gone += _checkpoints(connection, int((now - keep.rollups) // DAY))
    return gone + _boots(engine, now - keep.boots, now)


def _raw(connection: Connection, before: float) -> int:
    table = tables.health
    oldest = select(table.c.batch).where(table.c.batch < _first_kept(connection, before))
    last = connection.execute(
        select(func.max(oldest.order_by(table.c.batch).limit(_PIECE).subquery().c.batch))
    ).scalar()
    if last is None:
        return 0
    return connection.execute(delete(table).where(table.c.batch <= last)).rowcount


def _first_kept(connection: Connection, before: float) -> int:
    """The batch with which the raw messages to keep begin, by halving.

    Batches are numbered as they were committed, so their times rise with them, and no index of
    times has to be written for every message. A server clock that was wrong for a while makes some
    batches go with their neighbours.
    """
    table = tables.health
    # Two queries: for both in one, SQLite reads the whole table.
    low = connection.execute(select(func.min(table.c.batch))).scalar()
    if low is None:
        return 0
    high = connection.execute(select(func.max(table.c.batch))).scalar_one() + 1
    while low < high:
        middle = (low + high) // 2
        query = select(table.c.batch, table.c.received_at).where(table.c.batch >= middle)
        row = connection.execute(query.order_by(table.c.batch).limit(1)).first()
        if row is not None and row.received_at < before:
            low = row.batch + 1
        else:
            high = middle
    return int(low)


def _rollups(connection: Connection, before: int) -> int:
    table = tables.rollups
    first = connection.execute(select(func.min(table.c.hour)).where(table.c.hour < before)).scalar()
    if first is None:
        return 0
    return connection.execute(delete(table).where(table.c.hour == first)).rowcount


def _checkpoints(connection: Connection, before: int) -> int:
    table = tables.checkpoints
    return connection.execute(delete(table).where(table.c.day < before)).rowcount


def _boots(engine: Engine, before: float, now: float) -> int:
    with reading(engine) as connection:  # most often there is nothing to do, which needs no turn
        found = [connection.execute(q.limit(1)).first() for q in (_old(before), _crowded())]
    if found == [None, None]:
        return 0
    with writing(engine) as connection:
        turn.take(connection, probe=False, now=now)
        return _old_boots(connection, before) + _surplus_boots(connection)


def _old(before: float) -> Select[Any]:
    """(device, highest count) of boots not heard of for long, except each device's present one."""
    boots, contacts = tables.boots, tables.contacts
    return (
        select(boots.c.device, func.max(boots.c.boot_count))
        .join(contacts, contacts.c.device == boots.c.device)
        .where(boots.c.last_seen < before, boots.c.boot_count < contacts.c.boot_count)
        .group_by(boots.c.device)
    )


def _crowded() -> Select[Any]:
    """Devices with more boots than they may keep."""
    boots = tables.boots
    return select(boots.c.device).group_by(boots.c.device).having(func.count() > BOOTS)


def _old_boots(connection: Connection, before: float) -> int:
    found = connection.execute(_old(before).limit(_PIECE))
    return _raise_floors(connection, [(device, count + 1) for device, count in found])


def _surplus_boots(connection: Connection) -> int:
    boots = tables.boots
    rank = func.row_number().over(
        partition_by=boots.c.device,
        order_by=(boots.c.boot_count.desc(), boots.c.last_seen.desc(), boots.c.boot),
    )
    ranked = (
        select(boots.c.device, boots.c.boot, boots.c.boot_count, rank.label("rank"))
        .where(boots.c.device.in_(_crowded().limit(100)))
        .subquery()
    )
    lowest_kept = connection.execute(
        select(ranked.c.device, ranked.c.boot_count).where(ranked.c.rank == BOOTS)
    ).all()
    surplus = connection.execute(
        select(ranked.c.device, ranked.c.boot).where(ranked.c.rank > BOOTS)
    ).all()
    _raise_floors(connection, [(row.device, row.boot_count) for row in lowest_kept])
    # Several boots with one number are a device's invention: they go without a floor, because a
    # floor above its present boot would silence it.
    if surplus:
        matches = and_(boots.c.device == bindparam("d"), boots.c.boot == bindparam("b"))
        rows = [{"d": row.device, "b": row.boot} for row in surplus]
        connection.execute(delete(boots).where(matches), rows)
    return len(surplus)


def _raise_floors(connection: Connection, floors: list[tuple[str, int]]) -> int:
    if not floors:
        return 0
    boots, contacts = tables.boots, tables.contacts
    rows = [{"d": device, "f": floor} for device, floor in floors]
    below = and_(contacts.c.device == bindparam("d"), contacts.c.boot_floor < bindparam("f"))
    connection.execute(update(contacts).where(below).values(boot_floor=bindparam("f")), rows)
    forgotten = and_(boots.c.device == bindparam("d"), boots.c.boot_count < bindparam("f"))
    connection.execute(delete(boots).where(forgotten), rows)
    return len(floors)
