"""Counts the devices of each fleet as they change: what they run, since when, who is heard.

Follows the registry and telemetry by their change numbers: a page costs what has changed since the
last one, not the fleet. The first count reads everything once.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from sqlalchemy import Connection

from controller.http.dashboard.shares import Move, moves
from controller.http.devicebook import DeviceBook
from controller.store import lookups
from telemetry.report import DeviceRow

UNHEARD = ""  # the release of a device that never said what it runs


@dataclass(slots=True)
class Counts:
    """Devices of one fleet. `runs`: component → release as reported → devices."""

    status: Counter[str] = field(default_factory=Counter)
    online: int = 0
    heard: int = 0
    runs: dict[str, Counter[tuple[str, str]]] = field(default_factory=dict)  # (release, digest)
    moves: dict[str, Counter[tuple[int, str]]] = field(default_factory=dict)  # (day, release)

    @property
    def active(self) -> int:
        return self.status["active"]


@dataclass(frozen=True, slots=True)
class _Counted:
    """What one device added to the counts."""

    fleet: str
    status: str
    online: bool
    heard: bool
    runs: tuple[tuple[str, str, str], ...]  # (component, release, digest)
    moves: tuple[Move, ...]


class Census:
    def __init__(self, book: DeviceBook) -> None:
        self._book = book
        self._news: deque[DeviceRow] = deque()
        book.follow(self._news.append)
        self._lock = threading.Lock()
        self._counted: dict[str, _Counted] = {}
        self._registry: dict[str, tuple[str, str]] = {}  # device → (fleet, status)
        self._seen: dict[str, DeviceRow] = {}
        self._since = 0
        self._fleets: dict[str, Counts] = {}

    def fleets(self, conn: Connection) -> Mapping[str, Counts]:
        """fleet → its counts, as of now."""
        with self._lock:
            self._follow(conn)
            return dict(self._fleets)

    def _follow(self, conn: Connection) -> None:
        touched: set[str] = set()
        for row in lookups.changed_places(conn, since=self._since):
            self._registry[row.id] = (row.fleet, row.status)
            self._since = max(self._since, row.change)
            touched.add(row.id)
        self._book.seen()  # what is new comes to `_news`
        while self._news:
            news = self._news.popleft()
            self._seen[news.device] = news
            touched.add(news.device)
        for device in touched:
            self._count(device)

    def _count(self, device: str) -> None:
        before = self._counted.pop(device, None)
        if before is not None:
            self._add(before, -1)
        place = self._registry.get(device)
        if place is None:
            return
        now = _counted(place, self._seen.get(device))
        self._counted[device] = now
        self._add(now, 1)

    def _add(self, one: _Counted, by: int) -> None:
        counts = self._fleets.setdefault(one.fleet, Counts())
        counts.status[one.status] += by
        if one.status != "active":
            return
        counts.online += by * one.online
        counts.heard += by * one.heard
        for component, release, digest in one.runs:
            runs = counts.runs.setdefault(component, Counter())
            runs[release, digest] += by
            if not runs[release, digest]:
                del runs[release, digest]
        for component, day, release, n in one.moves:
            days = counts.moves.setdefault(component, Counter())
            days[day, release] += by * n
            if not days[day, release]:
                del days[day, release]


def _counted(place: tuple[str, str], seen: DeviceRow | None) -> _Counted:
    fleet, status = place
    runs = {} if seen is None else seen.components
    return _Counted(
        fleet=fleet,
        status=status,
        online=seen is not None and seen.online,
        heard=seen is not None and seen.reported_at is not None,
        runs=tuple((name, part.release, part.digest) for name, part in sorted(runs.items())),
        moves=() if seen is None else tuple(moves(seen)),
    )
