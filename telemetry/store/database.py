"""Opens a database: SQLite in WAL mode with every commit synced, or PostgreSQL by URL.

Both stores use it; it knows no tables.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import make_url

BUSY_MS = 10_000  # how long a writer waits for another one
_PRAGMAS = (
    "journal_mode=WAL",
    "synchronous=FULL",
    "foreign_keys=ON",
    "cache_size=-8000",  # KiB: the pages that every batch of some thousand devices touches
    "wal_autocheckpoint=8000",  # pages: a large batch fills the default of 1,000 every time
)
IDLE_MS = 60_000  # after which PostgreSQL ends a transaction whose owner says nothing
_decode = msgspec.json.Decoder().decode
OVERFLOW = 50  # connections beyond five: one for each thread of the API, so that none waits for one


def open_engine(url: str) -> Engine:
    """An engine for `sqlite:///file` or `postgresql+psycopg://…`; raises ValueError for others."""
    backend = make_url(url).get_backend_name()
    if backend == "sqlite":
        return _sqlite(url)
    if backend == "postgresql":
        return _postgresql(url)
    raise ValueError(f"{backend}: use sqlite:///FILE or postgresql+psycopg://USER@HOST/DATABASE")


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """One transaction that may write: committed at the end, rolled back by an exception."""
    with engine.begin() as connection:
        yield connection


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """One consistent view that takes no write lock; closing it ends it."""
    with engine.connect().execution_options(bellwether_reading=True) as connection:
        yield connection


def from_json(text: str | bytes) -> Any:
    """What a JSON column says: as `json.loads`, and at a tenth of its price where it can."""
    try:
        return _decode(text)
    except msgspec.MsgspecError:  # NaN, Infinity, half a surrogate pair: JSON only to Python
        return json.loads(text)


def _postgresql(url: str) -> Engine:
    # A dead or stopped peer must not hold us, nor we others: the kernel gives up on a silent
    # connection, and the server ends a transaction whose owner says nothing for a minute (a
    # process that was stopped in the middle of one, with rows locked). The URL may say otherwise.
    silent = {
        "connect_timeout": 10,
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": 30_000,  # ms
        "options": f"-c idle_in_transaction_session_timeout={IDLE_MS}",
    }
    named = make_url(url).query
    given = {name: value for name, value in silent.items() if name not in named}
    return create_engine(
        url,
        pool_pre_ping=True,
        max_overflow=OVERFLOW,
        connect_args=given,
        json_deserializer=from_json,
    )


def _sqlite(url: str) -> Engine:
    engine = create_engine(
        url,
        connect_args={"timeout": BUSY_MS / 1000},
        max_overflow=OVERFLOW,
        json_deserializer=from_json,
    )

    @event.listens_for(engine, "connect")
    def _pragmas(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # we say BEGIN ourselves, see below
        for pragma in _PRAGMAS:
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Any) -> None:
        if connection.get_execution_options().get("bellwether_reading"):
            # It takes no lock and cannot fail, and there are many: past SQLAlchemy.
            connection.connection.driver_connection.execute("BEGIN")
            return
        # IMMEDIATE: a read that becomes a write in mid-transaction fails with "locked" at once,
        # whatever the timeout; taking the lock first makes the second writer wait instead.
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine
