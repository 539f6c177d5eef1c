"""The first event of each unit, and who was at risk in each tick: what a K2 curve is made of.

Counts per (tick, stratum, arm), whatever the number of units. A late message changes the risk set
of its own time; only then are the closed ticks of that time added up again. Decides nothing.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from telemetry.evidence import first_events
from telemetry.policy import Engine

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

NEVER = 1 << 62
_OPEN = 2  # ticks whose part of the curve is computed anew each time
_DIGITS = 6  # of a stored log-likelihood: far below what any verdict feels


class Firsts:
    """One metric's first events: who, when, and the risk set of each tick. Columns, not ticks."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._at: dict[int, dict[int, int]] = {}  # unit → column → events
        self._first = np.full(64, NEVER, dtype=np.int64)
        self._events = np.zeros((64, 8, 2), dtype=np.int64)  # column, stratum, arm
        self._risk = np.zeros((64, 8, 2), dtype=np.int64)
        self._closed: dict[int, tuple[int, Floats]] = {}  # stratum → (columns, their curve)
        self._last = -1
        self._totals = np.zeros((8, 2), dtype=np.int64)

    def appear(
        self, unit: Ints, column: Ints, stratum: Ints, exposed: npt.NDArray[np.bool_]
    ) -> None:
        self._room(int(unit.max()), int(column.max()), int(stratum.max()))
        risk = column <= self._first[unit]
        at = (column[risk], stratum[risk], exposed[risk].astype(np.int64))
        np.add.at(self._risk, at, 1)
        self._touch(int(column.min()))
        self._last = max(self._last, int(column.max()))

    def leave(self, unit: int, column: int, stratum: int, exposed: bool) -> None:
        if column <= self._first[unit]:
            self._risk[column, stratum, int(exposed)] -= 1
            self._touch(column)

    def happen(
        self,
        unit: int,
        column: int,
        number: int,
        stratum: int,
        exposed: bool,
        present: npt.NDArray[np.bool_],
    ) -> None:
        """`number` events (fewer than 0: taken out again) of a unit in a tick."""
        at = self._at.setdefault(unit, {})
        at[column] = at.get(column, 0) + number
        if at[column] <= 0:
            del at[column]
        before, after = int(self._first[unit]), min(at, default=NEVER)
        if before == after:
            return
        arm = int(exposed)
        self._first[unit] = after
        for moved, step in ((before, -1), (after, 1)):
            if moved < NEVER:
                self._events[moved, stratum, arm] += step
                self._totals[stratum, arm] += step
        # Between the two it was, or was not, at risk after all.
        low, high = sorted((min(before, self._last), min(after, self._last)))
        between = np.flatnonzero(present[low + 1 : high + 1]) + low + 1
        self._risk[between, stratum, arm] += -1 if after < before else 1
        self._touch(min(before, after))

    def events(self, stratum: int) -> tuple[int, int]:
        """(control, updated) units with a first event."""
        if stratum >= self._totals.shape[0]:
            return 0, 0
        control, exposed = self._totals[stratum].tolist()
        return control, exposed

    def has(self, units: int) -> npt.NDArray[np.bool_]:
        self._room(units - 1, 0, 0)
        return np.asarray(self._first[:units] < NEVER)

    def share_at_risk(self, present: npt.NDArray[np.bool_], seen: Ints) -> Floats:
        """Share of each unit's reported ticks up to its first event (reports are evenly long)."""
        share = np.ones(seen.size)
        self._room(seen.size - 1, 0, 0)
        some = np.flatnonzero((self._first[: seen.size] < NEVER) & (seen > 0))
        if some.size:
            until = np.arange(self._last + 1) <= self._first[some, None]
            share[some] = (present[some, : self._last + 1] & until).sum(axis=1) / seen[some]
        return share

    def curve(self, stratum: int) -> tuple[float, ...]:
        """ℓ on the ratio grid: old ticks once, the open ones anew."""
        since, old = self._closed.get(stratum, (0, first_events.flat(self._engine)))
        until = max(since, self._last - _OPEN)
        old = old + self._between(stratum, since, until)
        self._closed[stratum] = (until, old)
        total = old + self._between(stratum, until, self._last + 1)
        return tuple((np.round(total, _DIGITS) + 0.0).tolist())

    def _between(self, stratum: int, since: int, until: int) -> Floats:
        d = self._events[since:until, stratum]
        some = np.flatnonzero(d.sum(axis=1))
        y = self._risk[since:until, stratum][some]
        d = d[some]
        return first_events.curve(
            self._engine, np.column_stack([d[:, 1], d[:, 0], y[:, 1], y[:, 0]])
        )

    def _touch(self, column: int) -> None:
        """Data of a closed tick arrived: its strata are added up again."""
        for stratum in [s for s, (until, _) in self._closed.items() if column < until]:
            del self._closed[stratum]

    def shift(self, columns: int) -> None:
        if columns:
            self._first[self._first < NEVER] += columns
            self._at = {u: {c + columns: n for c, n in at.items()} for u, at in self._at.items()}
            grown = ((columns, 0), (0, 0), (0, 0))
            self._events, self._risk = np.pad(self._events, grown), np.pad(self._risk, grown)
            self._closed.clear()
            self._last += columns if self._last >= 0 else 0

    def _room(self, unit: int, column: int, stratum: int) -> None:
        if unit >= self._first.size:
            more = max(self._first.size, unit + 1 - self._first.size)
            self._first = np.pad(self._first, (0, more), constant_values=NEVER)
        ticks, strata = self._events.shape[:2]
        if column >= ticks or stratum >= strata:
            taller = max(ticks, column + 1 - ticks) if column >= ticks else 0
            wider = max(strata, stratum + 1 - strata) if stratum >= strata else 0
            grown = ((0, taller), (0, wider), (0, 0))
            self._events, self._risk = np.pad(self._events, grown), np.pad(self._risk, grown)
            self._totals = np.pad(self._totals, ((0, wider), (0, 0)))
