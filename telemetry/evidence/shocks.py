"""What befell everybody in a tick: the hour of the day, the weather, a holiday.

Units do not report in the same ticks: an updated device counts from its own install on, a control
until it is updated itself. Their means would then compare noon with midnight. So each tick's common
part is taken out of both arms alike, from all units that reported in it:

    level  c_t = (mean of the tick − mean of the same units' own past) · n/(n + 1)
    rate   g_t = (events_t + 5) / (hours_t · usual rate + 5)

Units that reported in the same ticks lose the same amount: their difference is untouched. A tick's
part is fixed when the tick closes; the few open ticks are taken anew each time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

_OPEN = 2  # ticks that late messages may still change
LEVEL_PRIOR = 1.0  # units
RATE_PRIOR = 5.0  # events


class Shocks:
    """One metric's common part: per unit, its sum over the ticks in which the unit reported."""

    def __init__(self) -> None:
        self._ticks = np.zeros((64, 3))  # column: n or hours, Σ or events, eventful
        self._fixed = np.zeros(64)  # of the closed ticks
        self._closed = 0  # columns
        self._last = -1
        self._sums = np.zeros((4, 64))  # Σ and number of ticks: all, late

    def add(self, columns: npt.NDArray[np.int64], parts: tuple[npt.NDArray[Any], ...]) -> None:
        """Messages of these columns; `parts` are up to three arrays of the same shape."""
        top = int(columns.max())
        self._reach(top)
        for i, part in enumerate(parts):
            self._ticks[: top + 1, i] += np.bincount(columns, weights=part, minlength=top + 1)
        self._last = max(self._last, top)

    def late(self, units: npt.NDArray[np.int64], columns: npt.NDArray[np.int64], sign: int) -> None:
        """Units that appear in (or vanish from) ticks that were closed before."""
        old = columns < self._closed
        if old.any():
            self._room(int(units.max()) + 1)
            np.add.at(self._sums[0], units[old], sign * self._fixed[columns[old]])
            np.add.at(self._sums[1], units[old], float(sign))

    def of(
        self,
        present: Bools,
        late_from: npt.NDArray[np.int64],
        part: Callable[[Floats, Bools], float],
    ) -> tuple[Floats, Floats]:
        """Each unit's mean common part over all its ticks, and over its late ones; shape (units,).

        `part` says a tick's from its sums; a unit's tick is late from column `late_from` on.
        """
        units = late_from.size
        self._room(units)
        until = max(self._closed, self._last + 1 - _OPEN)
        for column in range(self._closed, until):
            here = present[:units, column]
            self._fixed[column] = part(self._ticks[column], here)
            _into(self._sums[:, :units], self._fixed[column], here, column >= late_from)
        self._closed = until
        total = self._sums[:, :units].copy()
        for column in range(until, self._last + 1):
            here = present[:units, column]
            _into(total, part(self._ticks[column], here), here, column >= late_from)
        whole, seen, late, late_seen = total
        return (
            np.divide(whole, seen, out=np.zeros(units), where=seen > 0),
            np.divide(late, late_seen, out=np.zeros(units), where=late_seen > 0),
        )

    def shift(self, columns: int) -> None:
        if columns:
            self._ticks = np.pad(self._ticks, ((columns, 0), (0, 0)))
            self._fixed = np.pad(self._fixed, (columns, 0))
            # What is older than anything closed before stays as it was reported.
            self._closed += columns if self._closed else 0
            self._last += columns if self._last >= 0 else 0

    def _reach(self, column: int) -> None:
        size = self._fixed.size
        if column >= size:
            more = max(size, column + 1 - size)
            self._ticks = np.pad(self._ticks, ((0, more), (0, 0)))
            self._fixed = np.pad(self._fixed, (0, more))

    def _room(self, units: int) -> None:
        size = self._sums.shape[1]
        if units > size:
            self._sums = np.pad(self._sums, ((0, 0), (0, max(size, units - size))))


def _into(sums: Floats, amount: float, here: Bools, late: Bools) -> None:
    sums[0] += amount * here
    sums[1] += here
    late = here & late
    if late.any():
        sums[2] += amount * late
        sums[3] += late
