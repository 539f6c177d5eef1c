"""The telemetry store: one transaction per batch in, the rows of `telemetry.report` out.

Rules, in order:

1. A batch is one transaction, and one turn (`telemetry.store.turn`).
2. What to change is `fold`'s decision; this file gives it what is known and writes what it says.
3. What is known afterwards is remembered for the next batch (`telemetry.store.memory`), once the
   transaction is committed.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import Any

import msgspec
import psycopg
from sqlalchemy import Connection, Engine, Select, bindparam, delete, func, select, update
from sqlalchemy.exc import DataError, IntegrityError

from device_agent.protocol import ComponentReport, HistoryEntry, State
from telemetry.report import DeviceRow, HealthRow, Level, Totals
from telemetry.store import bulk, checkpoints, sums, tables, turn
from telemetry.store.database import reading, writing
from telemetry.store.fold import (
    Batch,
    Changes,
    Known,
    Written,
    boot_rows,
    contact_rows,
    fold,
    refused,
    report_rows,
)
from telemetry.store.memory import Memory
from telemetry.store.prepared import Prepared
from telemetry.store.rollups import HOUR
from telemetry.sums import Sums

_END = 1 << 62  # after every change

# Most devices say the same: one text is decoded once, and its value shared.
_components = lru_cache(4096)(msgspec.json.Decoder(dict[str, ComponentReport]).decode)
_history = lru_cache(4096)(msgspec.json.Decoder(tuple[HistoryEntry, ...]).decode)
_texts = lru_cache(4096)(msgspec.json.Decoder(tuple[str, ...]).decode)
_digests = lru_cache(4096)(msgspec.json.Decoder(dict[str, str]).decode)
_measured = msgspec.json.Decoder(tuple[dict[str, Level], dict[str, int], dict[str, float]]).decode
_STATES = {state.value: state for state in State}


# The rows are at fault, not the database: trying again cannot help. Bulk rows go past SQLAlchemy,
# therefore the drivers' own errors too.
_AT_FAULT = (
    DataError,
    IntegrityError,
    psycopg.DataError,
    psycopg.IntegrityError,
    sqlite3.DataError,
    sqlite3.IntegrityError,
    sqlite3.InterfaceError,
    sqlite3.ProgrammingError,
    OverflowError,
    TypeError,
    ValueError,
)


# What is asked all the time is put together once.
def _devices() -> Select[Any]:
    """The last word of devices, in the order in which `_device_row` takes it apart."""
    heard, said = tables.contacts.c, tables.reports.c
    return select(
        heard.device, heard.change, heard.last_contact, heard.heard_clock, heard.online,
        heard.sleeping_until, heard.boot, heard.boot_count, said.reported_at, said.state,
        said.reason, said.blocked_by, said.attempt, said.term, said.generation, said.components,
        said.history, said.log,
    ).outerjoin_from(tables.contacts, tables.reports, heard.device == said.device)  # fmt: skip


def _end_of_page() -> Select[Any]:
    """The change with which a page of rows ends; a change is never cut in two."""
    change = tables.contacts.c.change
    page = select(change).where(change > bindparam("since")).order_by(change)
    return page.offset(bindparam("offset")).limit(1)


def _messages() -> Select[Any]:
    """Messages of health, in the order in which `_health_row` takes one apart."""
    said = tables.health.c
    return select(
        said.batch, said.device, said.received_at, said.boot, said.seq, said.attempt,
        said.components, said.t0, said.seconds, said.measured,
    )  # fmt: skip


_CONTACTS, _HEALTH = tables.contacts.c, tables.health
_STATE = Prepared(select(tables.state))
_DEVICE = Prepared(_devices().where(_CONTACTS.device == bindparam("device")))
_ALL_CHANGED = (
    _devices()
    .where(_CONTACTS.change > bindparam("since"))
    .order_by(_CONTACTS.change, _CONTACTS.device)
)
_CHANGED = Prepared(_ALL_CHANGED)
_CHANGED_PAGE = Prepared(
    _ALL_CHANGED.where(_CONTACTS.change <= func.coalesce(_end_of_page().scalar_subquery(), _END))
)
_IN_ORDER = _messages().order_by(_HEALTH.c.batch, _HEALTH.c.place)
_HEALTH_SINCE = Prepared(
    _IN_ORDER.where(_HEALTH.c.batch > bindparam("since")).limit(bindparam("most"))
)
_HEALTH_OF = Prepared(_IN_ORDER.where(_HEALTH.c.batch == bindparam("batch")))


class Unstorable(Exception):
    """A batch that the database will never take; nothing of it was written."""


class Store:
    """Implements `telemetry.report.TelemetryReader`, and `write` for the ingest."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._memory = Memory()

    @property
    def engine(self) -> Engine:
        return self._engine

    def write(self, batch: Batch, now: float) -> Written:
        """Commit a batch; raises Unstorable, or what an absent database raises.

        Whatever is raised leaves nothing of the batch behind.
        """
        try:
            with writing(self._engine) as connection:
                own = turn.take(connection, probe=batch.probe, now=now, numbers=batch.numbers)
                known = self._memory.recall(connection, batch.heard, own.first)
                changes = fold(batch.heard, known, first=own.first, clock=own.clock, now=now)
                _save(connection, changes, known, batch, own.first, now)
        except _AT_FAULT as error:
            raise Unstorable(str(error)) from error
        self._memory.keep(known, own.number)
        return Written(
            batch=own.number, verdicts=tuple(changes.verdicts), shifted=changes.rollups.shifted
        )

    def forget(self, device: str, now: float) -> None:
        """A replaced board counts its boots from one again: drop what the old one had said last.

        Its counted messages stay; the device starts over as one that never reported.
        """
        with writing(self._engine) as connection:
            own = turn.take(connection, probe=False, now=now)
            for table in (tables.boots, tables.reports):
                connection.execute(delete(table).where(table.c.device == device))
            row = {"change": own.number, "boot": "", "boot_count": 0, "boot_floor": 0}
            contacts = tables.contacts
            connection.execute(update(contacts).where(contacts.c.device == device).values(row))

    # -- TelemetryReader ---------------------------------------------------------------------------

    def watermark(self) -> int:
        with reading(self._engine) as connection:
            return int(_STATE.one(connection).batch)

    def hearing(self) -> tuple[float, float]:
        with reading(self._engine) as connection:
            row = _STATE.one(connection)
        return float(row.hearing), float(row.hearing_at)

    def devices_changed(self, since: int, *, limit: int | None = None) -> Sequence[DeviceRow]:
        query = _CHANGED if limit is None else _CHANGED_PAGE
        page = {} if limit is None else {"offset": limit - 1}
        with reading(self._engine) as connection:
            rows = query.plain(connection, since=since, **page)
        return [_device_row(row) for row in rows]

    def device(self, device: str) -> DeviceRow | None:
        with reading(self._engine) as connection:
            rows = _DEVICE.plain(connection, device=device)
        return _device_row(rows[0]) if rows else None

    def health_since(self, batch: int, *, limit: int = 20_000) -> Sequence[HealthRow]:
        with reading(self._engine) as connection:
            rows = _HEALTH_SINCE.plain(connection, since=batch, most=limit + 1)
            if len(rows) > limit:
                last = rows[-1][0]  # perhaps cut in two: give it whole, or next time
                if rows[0][0] == last:
                    rows = _HEALTH_OF.plain(connection, batch=last)
                else:
                    rows = [row for row in rows if row[0] < last]
        return [_health_row(row) for row in rows]

    def totals(self, *, since: float, until: float, names: Collection[str] | None = None) -> Totals:
        hours = range(int(since // HOUR), -int(-until // HOUR))
        with reading(self._engine) as connection:
            return sums.add_up(connection, hours, names)

    def sums(self) -> Sums:
        with reading(self._engine) as connection:
            return sums.read(connection)

    def checkpoints(self, since: float) -> Sequence[int]:
        with reading(self._engine) as connection:
            return checkpoints.days(connection, since)

    def checkpoint(self, day: int) -> Sums:
        with reading(self._engine) as connection:
            return checkpoints.read(connection, day)

    def refusals(self) -> dict[str, int]:
        """reason → how many messages were not believed, since the beginning."""
        with reading(self._engine) as connection:
            rows = connection.execute(select(tables.refusals.c.reason, tables.refusals.c.n))
            return {row[0]: int(row[1]) for row in rows}


def _save(
    connection: Connection, changes: Changes, known: Known, batch: Batch, first: int, now: float
) -> None:
    bulk.insert(connection, tables.health, changes.health)
    bulk.upsert(connection, tables.boots, boot_rows(changes, known, now))
    bulk.upsert(connection, tables.contacts, contact_rows(changes, known, first))
    bulk.upsert(connection, tables.reports, report_rows(changes, now))
    sums.write(connection, changes.rollups.devices, known)
    counts = [(reason, n, now) for reason, n in sorted(refused(changes, batch).items())]
    bulk.upsert(connection, tables.refusals, counts, added=("n",))


def _device_row(row: tuple[Any, ...]) -> DeviceRow:
    # By place, not by name: a start reads a row of every device.
    (device, change, last_contact, heard_clock, online, sleeping_until, boot, boot_count,
     reported_at, state, reason, blocked_by, attempt, term, generation, components, history,
     log) = row  # fmt: skip
    never = reported_at is None
    return DeviceRow(
        device=device,
        change=change,
        last_contact=last_contact,
        heard_clock=heard_clock,
        online=bool(online),
        sleeping_until=sleeping_until,
        boot=boot,
        boot_count=boot_count,
        reported_at=reported_at,
        state=None if never else _STATES[state],
        reason=reason,
        blocked_by=() if never else _texts(blocked_by),
        attempt=attempt,
        term=0 if never else term,
        generation=0 if never else generation,
        components={} if never else _components(components),
        history=() if never else _history(history),
        log="" if never else log,
    )


def _health_row(row: tuple[Any, ...]) -> HealthRow:
    batch, device, received_at, boot, seq, attempt, components, t0, seconds, measured = row
    levels, counters, exposure = _measured(measured)
    return HealthRow(
        batch=batch,
        device=device,
        received_at=received_at,
        boot=boot,
        seq=seq,
        attempt=attempt,
        components=_digests(components),
        t0=t0,
        seconds=seconds,
        levels=levels,
        counters=counters,
        exposure=exposure,
    )
