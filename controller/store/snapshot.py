"""Reads both databases into `controller.facts.Tables`: one consistent view of each."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from sqlalchemy import Engine, select

from controller.facts import Counted, Tables
from controller.store import lease, tables
from telemetry.store import tables as telemetry
from telemetry.store.database import reading
from telemetry.store.prepared import Prepared
from telemetry.store.reports import Store
from telemetry.store.rollups import Kind
from telemetry.store.seen import unpack

_CONTROL = (
    "devices",
    "releases",
    "rollouts",
    "members",
    "decisions",
    "commands",
    "holds",
    "stops",
    "desired",
    "audit",
    "proven",
)
_ROWS = {name: Prepared(select(getattr(tables, name))) for name in _CONTROL}
_COUNTED = Prepared(
    select(telemetry.health.c.device, telemetry.health.c.boot, telemetry.health.c.seq)
)
_BOOTS, _STATE = Prepared(select(telemetry.boots)), Prepared(select(telemetry.state.c.hearing_at))


def read(control: Engine, reports: Store | None, *, sums: bool = False) -> Tables:
    """All rows; `sums` compares raw messages with rollups, where no retention has run yet."""
    with reading(control) as conn:
        rows: dict[str, Any] = {
            name: [row._asdict() for row in query.all(conn)] for name, query in _ROWS.items()
        }
        term = lease.look(conn).term
    if reports is None:
        return Tables(term=term, **rows)
    devices = reports.devices_changed(0)
    with reading(reports.engine) as conn:
        counted = [(row[0], row[1], int(row[2])) for row in _COUNTED.all(conn)]
        boots = {
            (row.device, row.boot): Counted(int(row.high), unpack(bytes(row.missing)))
            for row in _BOOTS.all(conn)
        }
        heard = _STATE.first(conn)
    return Tables(
        term=term,
        **rows,
        reports=devices,
        health=counted,
        boots=boots,
        sums=_sums(reports) if sums else (),
        hearing_at=None if heard is None else float(heard[0]),
    )


def _sums(store: Store) -> list[tuple[str, str, float, float]]:
    """(device, counter, total of raw messages, total of rollups)."""
    raw: dict[tuple[str, str], float] = defaultdict(float)
    rolled: dict[tuple[str, str], float] = defaultdict(float)
    batch, rollups = 0, telemetry.rollups
    while rows := store.health_since(batch):
        batch = max(row.batch for row in rows)
        for row in rows:
            for name, n in row.counters.items():
                raw[row.device, name] += n
    with reading(store.engine) as conn:
        query = select(rollups.c.device, rollups.c.name, rollups.c.total)
        for device, name, total in conn.execute(query.where(rollups.c.kind == Kind.COUNTER.value)):
            rolled[device, name] += total
    return [(*key, raw[key], rolled[key]) for key in sorted(raw.keys() | rolled.keys())]
