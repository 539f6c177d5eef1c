"""Reports kept until the server has committed them: SQLite, WAL, synchronous=NORMAL, bounded.

A power cut may lose the last messages (their loss shows as a gap in the sequence); an outage of
days loses the oldest health first, and `lost` counts what went. What is unacknowledged is sent
again; the server counts a (boot, seq) once.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from device_agent.protocol import Channel


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    boot: str
    seq: int
    channel: Channel
    payload: bytes


class Outbox:
    def __init__(self, path: Path, *, max_messages: int = 5_000) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS message (id INTEGER PRIMARY KEY, boot TEXT NOT NULL, "
            "seq INTEGER NOT NULL, channel TEXT NOT NULL, payload BLOB NOT NULL, "
            "UNIQUE (boot, seq))"
        )
        self._db.execute("CREATE TABLE IF NOT EXISTS lost (n INTEGER NOT NULL)")
        self._max = max_messages
        self._count: int = self._db.execute("SELECT count(*) FROM message").fetchone()[0]

    def __len__(self) -> int:
        return self._count

    def put(self, boot: str, seq: int, channel: Channel, payload: bytes) -> None:
        self._db.execute(
            "INSERT INTO message (boot, seq, channel, payload) VALUES (?, ?, ?, ?)",
            (boot, seq, channel.value, payload),
        )
        self._count += 1
        if self._count > self._max:
            self._shed()

    def oldest(self, limit: int, *, without: Collection[tuple[str, int]] = ()) -> list[Waiting]:
        """The first `limit` messages in order of writing that are not among `without`."""
        rows = self._db.execute(
            "SELECT boot, seq, channel, payload FROM message ORDER BY id LIMIT ?",
            (limit + len(without),),
        )
        waiting = [
            Waiting(boot=boot, seq=seq, channel=Channel(channel), payload=payload)
            for boot, seq, channel, payload in rows
            if (boot, seq) not in without
        ]
        return waiting[:limit]

    def acknowledge(self, boot: str, ranges: Iterable[tuple[int, int]]) -> None:
        """Forget what the server has committed."""
        for first, last in ranges:
            done = self._db.execute(
                "DELETE FROM message WHERE boot = ? AND seq BETWEEN ? AND ?", (boot, first, last)
            )
            self._count -= done.rowcount

    def take_lost(self) -> int:
        """Messages lost since the last call."""
        (n,) = self._db.execute("SELECT coalesce(sum(n), 0) FROM lost").fetchone()
        if n:
            self._db.execute("DELETE FROM lost")
        return int(n)

    def close(self) -> None:
        self._db.close()

    def _shed(self) -> None:
        # A state report says more than a sample: health goes first, the oldest first.
        done = self._db.execute(
            "DELETE FROM message WHERE id IN "
            "(SELECT id FROM message ORDER BY channel != 'health', id LIMIT ?)",
            (max(1, self._max // 100),),
        )
        self._count -= done.rowcount
        self._db.execute("INSERT INTO lost VALUES (?)", (done.rowcount,))
