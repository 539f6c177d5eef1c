"""The agent's durable memory: one SQLite file, WAL, synchronous=FULL, one row.

`save` returns only when the record is on the disk; the agent lets no effect happen before. Writing
the whole record (a few KiB) in one transaction leaves no half-written state to recover from.
"""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

from device_agent.codec import from_wire, to_wire
from device_agent.record import Record
from device_agent.reserve import Reserve

WAL_PAGES = 128  # half a MiB: SQLite's own 1,000 are much of a small device's disk


class JournalBroken(RuntimeError):
    """The journal cannot be read: the device keeps what it runs and needs a person."""


class Journal:
    def __init__(self, path: Path, reserve: Reserve | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._reserve = reserve or Reserve()
        try:
            self._reserve.urgently(self._open)
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise JournalBroken(f"{path}: {error}") from error
        self._path = path

    def _open(self) -> None:
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.execute(f"PRAGMA wal_autocheckpoint={WAL_PAGES}")
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS record (id INTEGER PRIMARY KEY CHECK (id = 1), "
            "format INTEGER NOT NULL, body TEXT NOT NULL)"
        )

    def load(self) -> Record:
        """The last saved record; a fresh one before the first save. Raises JournalBroken."""
        try:
            row = self._db.execute("SELECT body FROM record").fetchone()
            return Record() if row is None else from_wire(Record, json.loads(row[0]))
        except (sqlite3.DatabaseError, ValueError) as error:
            raise JournalBroken(f"{self._path}: {error}") from error

    def save(self, record: Record) -> None:
        body = json.dumps(to_wire(record), separators=(",", ":"))
        self._reserve.urgently(lambda: self._write(body))

    def _write(self, body: str) -> None:
        self._db.execute(
            "INSERT INTO record VALUES (1, 1, ?) ON CONFLICT (id) DO UPDATE SET body=excluded.body",
            (body,),
        )

    def close(self) -> None:
        self._db.close()
