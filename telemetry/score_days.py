"""Reads what a score is made of: one sum over the window, or its days one by one.

Days that are over are kept in memory: late data may still come for a day, after that they stand.
"""

from __future__ import annotations

import math

from telemetry.policy import ScoreSpec
from telemetry.report import TelemetryReader, Totals
from telemetry.score import daily

DAY = 86_400.0


class ScoreDays:
    def __init__(self, reader: TelemetryReader) -> None:
        self._reader = reader
        self._kept: dict[float, Totals] = {}
        self._last: tuple[float, float, Totals] | None = None  # (since, now, what was read)

    def read(self, spec: ScoreSpec, now: float) -> list[Totals]:
        """The window's totals, oldest day first; a single one where the preset needs no days."""
        since = now - spec.window.total_seconds()
        if not daily(spec):
            return [self._whole(since, now)]
        first = math.floor(since / DAY) * DAY
        starts = [first + i * DAY for i in range(math.ceil((now - first) / DAY))]
        days = [self._day(start, now) for start in starts]
        self._kept = {start: day for start, day in self._kept.items() if start >= first}
        return days

    def _whole(self, since: float, now: float) -> Totals:
        """Fleets that are scored at the same moment over the same window share one reading."""
        if self._last is None or self._last[:2] != (since, now):
            self._last = since, now, self._reader.totals(since=since, until=now)
        return self._last[2]

    def _day(self, start: float, now: float) -> Totals:
        known = self._kept.get(start)
        if known is not None:
            return known
        day = self._reader.totals(since=start, until=min(start + DAY, now))
        if start + 2 * DAY <= now:
            self._kept[start] = day
        return day
