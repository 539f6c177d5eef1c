"""Server-sent events: what was recorded, as it is recorded; resumed with Last-Event-ID.

The audit is the stream: its sequence numbers are the events' ids, so nothing is lost between two
connections. One task reads it for all listeners; a listener that comes late, or falls behind, reads
its own part from the database first.

Who may see some fleets hears of these alone: a row is of the fleets that its rollout, its devices
or its own words name. What is of no fleet (tokens, stops, logins) is for who may see all of them.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import structlog
from sqlalchemy import Engine
from starlette.concurrency import run_in_threadpool

from controller.roles import Principal
from controller.store import views
from telemetry.store.database import reading

POLL = 0.25  # seconds between two looks at the audit
KEPT = 2_000  # newest rows in memory
_AT_ONCE = 500
log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Row:
    """One audit row, and its JSON, made once for all listeners."""

    seq: int
    action: str
    plain: dict[str, Any]
    text: str
    fleets: frozenset[str]  # that it is of; empty: of none, or of all

    def of(self, who: Principal) -> bool:
        """Is it for this person?"""
        if not who.fleets:
            return True
        return bool(self.fleets) and all(map(who.sees, self.fleets))


class Events:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._rows: list[Row] = []
        self._news: asyncio.Event | None = None
        self._seq = -1  # of the newest row in memory; -1: not looked yet
        self._task: asyncio.Task[None] | None = None

    async def since(self, seq: int, *, patience: float) -> list[Row]:
        """Rows after `seq`, oldest first; waits up to `patience` seconds for the first one."""
        news = self._listen()
        found = await self._later_than(seq)
        if not found:
            try:
                await asyncio.wait_for(news.wait(), patience)
            except TimeoutError:
                return []
            found = await self._later_than(seq)
        return found[:_AT_ONCE]

    async def _later_than(self, seq: int) -> list[Row]:
        """From memory, where that reaches back so far; else from the database."""
        if seq < self._oldest() - 1 and (found := await run_in_threadpool(self._rows_after, seq)):
            return found
        return self._after(seq)

    async def head(self) -> int:
        """The number of the newest event."""
        return await run_in_threadpool(self._head)

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _listen(self) -> asyncio.Event:
        """The bell of the next news; the first listener starts the reading."""
        loop = asyncio.get_running_loop()
        if self._news is None or self._task is None or self._task.get_loop() is not loop:
            self._news, self._rows, self._seq = asyncio.Event(), [], -1
            self._task = loop.create_task(self._follow())
        return self._news

    async def _follow(self) -> None:
        while True:
            try:
                if await run_in_threadpool(self._read):
                    news, self._news = self._news, asyncio.Event()
                    if news is not None:
                        news.set()
            except Exception:  # the outermost turn: the database may be away for a while
                log.exception("events")
            await asyncio.sleep(POLL)

    def _read(self) -> bool:
        """Is there news? At the first look there may be: what came while nobody looked is in no
        memory, and a listener who found nothing before it must look again."""
        first = self._seq < 0
        if first:
            self._seq = self._head()
        found = self._rows_after(self._seq)
        if found:
            self._rows = [*self._rows, *found][-KEPT:]
            self._seq = found[-1].seq
        return first or bool(found)

    def _oldest(self) -> int:
        rows = self._rows
        if self._seq < 0:
            return 1 << 62  # nothing is in memory yet: the database has it
        return rows[0].seq if rows else self._seq + 1

    def _after(self, seq: int) -> list[Row]:
        rows = self._rows
        if not rows:
            return []
        return rows[max(0, seq + 1 - rows[0].seq) :]

    def _head(self) -> int:
        with reading(self._engine) as conn:
            return views.audit_head(conn)

    def _rows_after(self, seq: int) -> list[Row]:
        with reading(self._engine) as conn:
            found = views.list_audit(conn, after=seq, limit=_AT_ONCE)
            fleets = views.fleets_of_audit(conn, found)
        return [
            Row(row["seq"], row["action"], row, json.dumps(row), of)
            for row, of in zip(found, fleets, strict=True)
        ]


async def stream(
    events: Events, seq: int, who: Principal, *, lasts: float, beat: float
) -> AsyncIterator[Row | None]:
    """Rows after `seq` that are for this person, for `lasts` seconds; None for each `beat` seconds
    of silence."""
    loop = asyncio.get_running_loop()
    until = loop.time() + lasts
    while (left := until - loop.time()) > 0:
        rows = await events.since(seq, patience=min(beat, left))
        if not rows:
            yield None
        for row in rows:
            seq = row.seq
            if row.of(who):
                yield row
