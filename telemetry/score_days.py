"""Reads what a score is made of: one sum over the window, or its days one by one.

Rules, in order:

1. A window of `WHOLE_DAYS` or more begins with a checkpoint, the last one that is not after its
   beginning, and holds what was counted since: two readings, however long it is. Where there is no
   checkpoint so old, it holds everything.
2. A shorter one is added up from its hours.
3. Days are what was counted between two checkpoints; the last one is not over. Days that are over
   never change, and are kept in memory.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise

from telemetry.policy import ScoreSpec
from telemetry.report import TelemetryReader, Totals
from telemetry.score import daily, series_of
from telemetry.sums import Sums

DAY = 86_400.0
WHOLE_DAYS = 2 * DAY
_WINDOWS = 4  # of different length, whose beginnings are kept in memory

_Day = tuple[int | None, int | None, frozenset[str]]  # from which checkpoint to which, and of what


class ScoreDays:
    def __init__(self, reader: TelemetryReader) -> None:
        self._reader = reader
        self._begun: dict[int, Sums] = {}  # checkpoints with which windows begin
        self._over: dict[_Day, Totals] = {}
        self._last: tuple[float, Sums] | None = None  # when it was read, and what

    def read(self, spec: ScoreSpec, now: float) -> list[Totals]:
        """The window's totals, oldest day first; a single one where the preset needs no days."""
        since, names = now - spec.window.total_seconds(), series_of(spec)
        if now - since < WHOLE_DAYS:
            return [self._reader.totals(since=since, until=now, names=names)]
        if daily(spec):
            return self._day_by_day(self._marks(since), names, now)
        return [self.counted(since, now, names)[1]]

    def counted(
        self, since: float, now: float, names: Collection[str]
    ) -> tuple[float | None, Totals]:
        """What was counted since the last checkpoint that is not after `since`, and when that was;
        everything, and None, where there is no checkpoint so old."""
        first = self._marks(since)[0]
        totals = self._now(now).since(self._beginning(first), names)
        return None if first is None else first * DAY, totals

    def _marks(self, since: float) -> list[int | None]:
        """With which checkpoints the window begins and goes on."""
        days = self._reader.checkpoints(since)
        begun = bool(days) and days[0] * DAY <= since
        return [*([] if begun else [None]), *days]

    def _day_by_day(
        self, marks: Sequence[int | None], names: frozenset[str], now: float
    ) -> list[Totals]:
        over: dict[_Day, Totals] = {}
        then: Sums | None = None  # at the end of the day before, where that had to be read
        for first, last in pairwise(marks):
            key = first, last, names
            day = self._over.get(key)
            if day is None:
                before = self._beginning(first) if then is None else then
                then = self._beginning(last)
                day = then.since(before, names)
            else:
                then = None
            over[key] = day
        others = {key: day for key, day in self._over.items() if key[2] != names}
        self._over = others | over
        return [*over.values(), self._now(now).since(self._beginning(marks[-1]), names)]

    def _now(self, now: float) -> Sums:
        """Fleets that are scored at the same moment share one reading."""
        if self._last is None or self._last[0] != now:
            self._last = now, self._reader.sums()
        return self._last[1]

    def _beginning(self, day: int | None) -> Sums:
        if day is None:
            return Sums()
        if day not in self._begun:
            if len(self._begun) >= _WINDOWS:
                del self._begun[next(iter(self._begun))]
            self._begun[day] = self._reader.checkpoint(day)
        return self._begun[day]
