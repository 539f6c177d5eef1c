"""Reports kept until the server has committed them: SQLite, WAL, synchronous=NORMAL, bounded.

A power cut may lose the last messages (their loss shows as a gap in the sequence); an outage of
days loses the oldest health first, and `lost` counts what went. What is unacknowledged is sent
again; the server counts a (boot, seq) once. On a full disk samples are lost, and counted; a state
report may take what was kept for it (`device_agent.reserve`).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from device_agent.journal import WAL_PAGES
from device_agent.protocol import Channel
from device_agent.reserve import Reserve


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    boot: str
    seq: int
    channel: Channel
    payload: bytes


class Outbox:
    def __init__(
        self, path: Path, reserve: Reserve | None = None, *, max_messages: int = 5_000
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._reserve = reserve or Reserve()
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._max = max_messages
        self._unwritten = 0  # lost, and no room to write that down
        self._reserve.urgently(self._open)
        self._count: int = self._db.execute("SELECT count(*) FROM message").fetchone()[0]

    def _open(self) -> None:
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.execute(f"PRAGMA wal_autocheckpoint={WAL_PAGES}")
        self._db.execute(
            "CREATE TABLE IF NOT EXISTS message (id INTEGER PRIMARY KEY, boot TEXT NOT NULL, "
            "seq INTEGER NOT NULL, channel TEXT NOT NULL, payload BLOB NOT NULL, "
            "UNIQUE (boot, seq))"
        )
        self._db.execute("CREATE TABLE IF NOT EXISTS lost (n INTEGER NOT NULL)")

    def __len__(self) -> int:
        return self._count

    def put(self, boot: str, seq: int, channel: Channel, payload: bytes, tells: int = 0) -> None:
        """`tells`: of so many lost ones; when it is lost itself, the next one tells of them."""
        row = (boot, seq, channel.value, payload)
        sample = channel is Channel.HEALTH
        if (sample and self._reserve.scarce) or not self._kept(self._add, row, urgent=not sample):
            self._unwritten += 1 + tells
            return
        self._count += 1
        if self._count > self._max:
            self._kept(self._shed)

    def _kept(self, write: Callable[..., object], *words: object, urgent: bool = True) -> bool:
        """Written, be it (when `urgent`) into the room that was kept for that?"""
        act = partial(write, *words)
        try:
            if urgent:
                self._reserve.urgently(act)
            else:
                act()
        except sqlite3.OperationalError as error:
            if not self._reserve.is_full(error):
                raise
            return False
        return True

    def _add(self, row: tuple[str, int, str, bytes]) -> None:
        self._db.execute(
            "INSERT INTO message (boot, seq, channel, payload) VALUES (?, ?, ?, ?)", row
        )

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
        """Forget what the server has committed; without room for that, it is sent once more."""
        for first, last in ranges:
            self._kept(self._forget, boot, first, last)

    def _forget(self, boot: str, first: int, last: int) -> None:
        done = self._db.execute(
            "DELETE FROM message WHERE boot = ? AND seq BETWEEN ? AND ?", (boot, first, last)
        )
        self._count -= done.rowcount

    def take_lost(self) -> int:
        """Messages lost since the last call."""
        unwritten, self._unwritten = self._unwritten, 0
        (n,) = self._db.execute("SELECT coalesce(sum(n), 0) FROM lost").fetchone()
        if n and not self._kept(self._db.execute, "DELETE FROM lost"):
            n = 0  # told when it can be forgotten
        return int(n) + unwritten

    def close(self) -> None:
        self._db.close()

    def _shed(self) -> None:
        # A state report says more than a sample: health goes first, the oldest first.
        with self._db:  # what goes and its count: both or none
            self._db.execute("BEGIN")
            done = self._db.execute(
                "DELETE FROM message WHERE id IN "
                "(SELECT id FROM message ORDER BY channel != 'health', id LIMIT ?)",
                (max(1, self._max // 100),),
            )
            self._db.execute("INSERT INTO lost VALUES (?)", (done.rowcount,))
        self._count -= done.rowcount
