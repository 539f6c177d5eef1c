"""Sums over groups of units: one pass over all rows at once, with the units' order kept.

Units are only ever added, so the order changes with their number alone. Decides nothing.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class Grouping:
    """`slot` of shape (units,): each unit's group, of `slots` groups."""

    def __init__(self, slot: Ints, slots: int) -> None:
        self.units = slot.size
        self.slots = slots
        self.sizes = np.bincount(slot, minlength=slots)
        self._filled = np.flatnonzero(self.sizes)
        self._starts = (np.cumsum(self.sizes) - self.sizes)[self._filled]
        order = np.argsort(slot, kind="stable")
        self._order = None if (order == np.arange(slot.size)).all() else order

    def sums(self, rows: Floats) -> Floats:
        """Rows of shape (k, units), added within each group; shape (k, slots)."""
        found = np.zeros((rows.shape[0], self.slots))
        if self._filled.size:
            ordered = rows if self._order is None else rows[:, self._order]
            found[:, self._filled] = np.add.reduceat(ordered, self._starts, axis=1)
        return found
