"""Rows of the registry: devices and their one-time tokens.

Every change of a device takes a new number of the counter `registry` in `meta`; the counter's row
is locked until the commit, so who reads "changed since n" misses nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Row, func, insert, select, update

from controller.store.tables import devices, enrolment_tokens, meta

COUNTER = "registry"


def next_changes(conn: Connection, count: int) -> range:
    """`count` new numbers of the registry's counter."""
    query = select(meta.c.value).where(meta.c.key == COUNTER).with_for_update()
    row = conn.execute(query).first()
    if row is None:
        conn.execute(insert(meta).values(key=COUNTER, value=0))
    last = 0 if row is None else int(row[0])
    conn.execute(update(meta).where(meta.c.key == COUNTER).values(value=last + count))
    return range(last + 1, last + count + 1)


def get(conn: Connection, device: str) -> Row[Any] | None:
    return conn.execute(select(devices).where(devices.c.id == device)).first()


def get_many(conn: Connection, ids: Sequence[str]) -> dict[str, Row[Any]]:
    found: dict[str, Row[Any]] = {}
    for start in range(0, len(ids), 500):
        query = select(devices).where(devices.c.id.in_(ids[start : start + 500]))
        found |= {row.id: row for row in conn.execute(query)}
    return found


def count(conn: Connection) -> int:
    return int(conn.execute(select(func.count()).select_from(devices)).scalar_one())


def add(conn: Connection, rows: Sequence[Mapping[str, Any]]) -> None:
    if rows:
        conn.execute(insert(devices), [dict(row) for row in rows])


def change(conn: Connection, device: str, **values: Any) -> None:
    number = next_changes(conn, 1)[0]
    conn.execute(update(devices).where(devices.c.id == device).values(**values, change=number))


def accounts(conn: Connection) -> Sequence[Any]:
    """(id, password_issue) of every device that may have a broker account."""
    query = select(devices.c.id, devices.c.password_issue)
    return conn.execute(query.where(devices.c.status.in_(("pending", "active")))).all()


def add_tokens(conn: Connection, rows: Sequence[Mapping[str, Any]]) -> None:
    if rows:
        conn.execute(insert(enrolment_tokens), [dict(row) for row in rows])


def spend_tokens(conn: Connection, ids: Iterable[str], now: float) -> None:
    """No token that was given out for these devices before works any more."""
    wanted = list(ids)
    for start in range(0, len(wanted), 500):
        conn.execute(
            update(enrolment_tokens)
            .where(
                enrolment_tokens.c.device.in_(wanted[start : start + 500]),
                enrolment_tokens.c.used_at.is_(None),
            )
            .values(used_at=now)
        )


def take_token(conn: Connection, digest: str, now: float) -> str | None:
    """Use a token up: its device, or None when it is unknown, expired or used."""
    taken = conn.execute(
        update(enrolment_tokens)
        .where(
            enrolment_tokens.c.hash == digest,
            enrolment_tokens.c.used_at.is_(None),
            enrolment_tokens.c.expires_at > now,
        )
        .values(used_at=now)
    )
    if not taken.rowcount:
        return None
    query = select(enrolment_tokens.c.device).where(enrolment_tokens.c.hash == digest)
    return str(conn.execute(query).scalar_one())
