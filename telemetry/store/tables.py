"""The tables of the telemetry store, the same for SQLite and PostgreSQL.

Ingest alone writes them; everybody else reads. Names carry the prefix `telemetry_`, so that they
can share one PostgreSQL database with the control tables. Times are Unix seconds, server clock.
"""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Double,
    Engine,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
)

from telemetry.store.schema import Schema, bring_to_head

metadata = MetaData()
SCHEMA = Schema(
    name="telemetry",
    metadata=metadata,
    folder=Path(__file__).parent / "migrations",
    lock=0x62775F746D,  # "bw_tm"
)

state = Table(  # one row: every batch updates it first, which puts all commits in one order
    "telemetry_state",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("batch", BigInteger, nullable=False),  # the last committed batch: the watermark
    Column("hearing", Double, nullable=False),  # seconds in which the server could hear
    Column("hearing_at", Double, nullable=False),  # when it last advanced
)

contacts = Table(  # rewritten by every message, therefore narrow
    "telemetry_contacts",
    metadata,
    Column("device", String(63), primary_key=True),
    Column("change", BigInteger, nullable=False, index=True),
    Column("last_contact", Double, nullable=False),
    Column("heard_clock", Double, nullable=False),
    Column("online", Boolean, nullable=False),
    Column("sleeping_until", Double),
    Column("boot", String(64), nullable=False),
    Column("boot_count", BigInteger, nullable=False),
    Column("boot_floor", BigInteger, nullable=False),  # boots below it are forgotten: refused late
)

reports = Table(  # the last `reported` by (boot_count, seq)
    "telemetry_reports",
    metadata,
    Column("device", String(63), primary_key=True),
    Column("boot", String(64), nullable=False),
    Column("boot_count", BigInteger, nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("reported_at", Double, nullable=False),
    Column("state", String(16), nullable=False),
    Column("reason", String(64)),
    Column("blocked_by", Text, nullable=False),  # JSON
    Column("attempt", String(128)),
    Column("term", BigInteger, nullable=False),
    Column("generation", BigInteger, nullable=False),
    Column("components", Text, nullable=False),  # JSON
    Column("history", Text, nullable=False),  # JSON
    Column("log", Text, nullable=False),
)

boots = Table(  # what was counted already; outlives the raw messages
    "telemetry_boots",
    metadata,
    Column("device", String(63), primary_key=True),
    Column("boot", String(64), primary_key=True),
    Column("boot_count", BigInteger, nullable=False),
    Column("high", BigInteger, nullable=False),  # the highest seq seen
    Column("missing", LargeBinary, nullable=False),  # see telemetry.store.seen
    Column("last_seen", Double, nullable=False),
    sqlite_with_rowid=False,
)

health = Table(  # raw messages, counted once
    "telemetry_health",
    metadata,
    Column("batch", BigInteger, primary_key=True, autoincrement=False),
    Column("place", Integer, primary_key=True, autoincrement=False),  # within the batch
    Column("device", String(63), nullable=False),
    Column("received_at", Double, nullable=False),
    Column("boot", String(64), nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("attempt", String(128)),
    Column("components", Text, nullable=False),  # JSON: component → digest
    Column("t0", Double, nullable=False),
    Column("seconds", Double, nullable=False),
    # JSON: [{gauge: [n, total, squares]}, {counter: count}, {unit: exposure}]
    Column("measured", Text, nullable=False),
    sqlite_with_rowid=False,
)

layouts = (
    Table(  # which numbers a packed row holds (`telemetry.sums`); never changed, never deleted
        "telemetry_layouts",
        metadata,
        Column("id", BigInteger, primary_key=True, autoincrement=False),  # a hash of the names
        Column("names", Text, nullable=False),  # JSON: [counters, units of exposure, levels]
    )
)

rollups = Table(  # what a device measured in an hour
    "telemetry_rollups",
    metadata,
    Column("hour", Integer, primary_key=True, autoincrement=False),  # Unix hours: seconds // 3600
    Column("device", String(63), primary_key=True),
    Column("layout", BigInteger, nullable=False),
    Column("sums", LargeBinary, nullable=False),
    sqlite_with_rowid=False,
)

sums = Table(  # what a device measured ever: what the score reads, less a checkpoint
    "telemetry_sums",
    metadata,
    Column("device", String(63), primary_key=True),
    Column("layout", BigInteger, nullable=False),
    Column("sums", LargeBinary, nullable=False),
    sqlite_with_rowid=False,
)

checkpoints = Table(  # `telemetry_sums` as they were when a day began, a thousand devices a row
    "telemetry_checkpoints",
    metadata,
    Column("day", Integer, primary_key=True, autoincrement=False),  # Unix days: seconds // 86400
    Column("place", Integer, primary_key=True, autoincrement=False),
    Column("layout", BigInteger, nullable=False),
    Column("devices", Text, nullable=False),  # one a line
    Column("sums", LargeBinary, nullable=False),  # column by column
)

refusals = Table(  # what was not believed, by reason
    "telemetry_refusals",
    metadata,
    Column("reason", String(64), primary_key=True),
    Column("n", BigInteger, nullable=False),
    Column("last_at", Double, nullable=False),
)


def create_schema(engine: Engine) -> None:
    """All tables at their newest revision, and the one row of `telemetry_state`."""
    bring_to_head(engine, SCHEMA)
