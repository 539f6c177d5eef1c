"""The audit trail: append-only rows, each chained to the one before by its hash.

`append` writes within the caller's transaction, so that a change and its record stand or fall
together. `verify` finds an edited, deleted or reordered row; a cut tail is found against a head
that was kept elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from hashlib import sha256
from typing import Any

from sqlalchemy import Connection, Text, cast, func, insert, select

from controller.store.tables import audit
from device_agent.protocol import canonical
from telemetry.store.database import from_json
from telemetry.store.prepared import Prepared

FIRST = "0" * 64
CHAIN = 0x62656C6C  # the advisory lock of the chain's end
_LAST = Prepared(select(audit.c.seq, audit.c.hash).order_by(audit.c.seq.desc()).limit(1))
_APPEND = Prepared(insert(audit))
# The detail as it is stored: what cannot be read must be found, not end the reading.
_TEXTS = select(
    *(column for column in audit.c if column.name != "detail"),
    cast(audit.c.detail, Text).label("detail"),
).order_by(audit.c.seq)


def append(
    conn: Connection,
    *,
    at: float,
    actor: str,
    action: str,
    subject: str,
    detail: Mapping[str, Any],
) -> int:
    """Append one row; answers its sequence number."""
    if conn.dialect.name == "postgresql":
        # One chain has one end: writers take their turn. (SQLite has one writer anyway.)
        conn.execute(select(func.pg_advisory_xact_lock(CHAIN)))
    last = _LAST.first(conn)
    seq: int = last.seq + 1 if last else 1
    row: dict[str, Any] = {
        "seq": seq,
        "at": at,
        "actor": actor,
        "action": action,
        "subject": subject,
        "detail": dict(detail),
        "previous": last.hash if last else FIRST,
    }
    _APPEND.run(conn, **row, hash=digest(row))
    return seq


def digest(row: Mapping[str, Any]) -> str:
    """The hash of a row over all its other columns, the previous hash among them."""
    names = ("seq", "at", "actor", "action", "subject", "detail", "previous")
    return sha256(canonical({name: row[name] for name in names})).hexdigest()


def intact(row: Mapping[str, Any]) -> bool:
    """Is the row what its hash says? What has no hash at all (NaN, endless depth) is not."""
    try:
        return bool(digest(row) == row["hash"])
    except (ValueError, TypeError, RecursionError):
        return False


def head(conn: Connection) -> tuple[int, str] | None:
    """(seq, hash) of the newest row: what is kept outside."""
    last = _LAST.first(conn)
    return None if last is None else (last.seq, last.hash)


def verify(
    conn: Connection,
    head: tuple[int, str] | None = None,
    heads: Iterable[tuple[int, str]] = (),
) -> list[str]:
    """What is wrong with the chain, in sentences; `heads` (seq, hash) were kept outside."""
    problems, previous, seq = [], FIRST, 0
    missing = {*heads, *([head] if head is not None else [])}
    for row in conn.execute(_TEXTS):
        if row.seq != seq + 1:
            problems.append(f"rows {seq + 1} to {row.seq - 1} are missing")
        if row.previous != previous:
            problems.append(f"row {row.seq} does not follow the row before it")
        if not intact(_read(dict(row._mapping))):
            problems.append(f"row {row.seq} was changed")
        previous, seq = row.hash, row.seq
        missing.discard((row.seq, row.hash))
    cut = [kept for kept in sorted(missing) if kept[0] > seq]
    other = [kept for kept in sorted(missing) if kept[0] <= seq]
    if cut:
        problems.append(f"the tail was cut: rows {seq + 1} to {cut[-1][0]} were there once")
    if other:
        problems.append(f"the kept head (row {other[-1][0]}) is not in the chain")
    return problems


def _read(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The row with its detail, which somebody may have made unreadable: then it has none."""
    try:
        return {**stored, "detail": from_json(stored["detail"])}
    except (ValueError, RecursionError):
        return {**stored, "detail": math.nan}
