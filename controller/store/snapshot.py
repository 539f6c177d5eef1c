"""Reads both databases into `controller.facts.Tables`: one consistent view of each."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from sqlalchemy import Engine, select

from controller.facts import Counted, Summed, Tables
from controller.store import lease, tables
from telemetry.report import Totals
from telemetry.store import tables as telemetry
from telemetry.store.database import reading
from telemetry.store.prepared import Prepared
from telemetry.store.reports import Store
from telemetry.store.seen import unpack
from telemetry.sums import Sums

_EVER = 1e11  # seconds
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
    """All rows; `sums` compares raw messages with their sums, where no retention has run yet."""
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


def _sums(store: Store) -> list[Summed]:
    raw: dict[tuple[str, str], float] = defaultdict(float)
    batch = 0
    while rows := store.health_since(batch):
        batch = max(row.batch for row in rows)
        for row in rows:
            for name, n in row.counters.items():
                raw[row.device, name] += n
    hourly = _counters(store.totals(since=0, until=_EVER))
    ever = _counters(store.sums().since(Sums()))
    return [
        Summed(
            device=device,
            counter=name,
            messages=raw[device, name],
            hours=hourly.get((device, name), 0.0),
            ever=ever.get((device, name), 0.0),
        )
        for device, name in sorted(raw.keys() | hourly.keys() | ever.keys())
    ]


def _counters(totals: Totals) -> dict[tuple[str, str], float]:
    return {
        (device, name): total
        for name, column in totals.counters.items()
        for device, total in zip(totals.devices, column.tolist(), strict=True)
    }
