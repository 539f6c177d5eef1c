"""Sums over groups are the sums of their members, whatever the order of the units."""

from __future__ import annotations

import numpy as np
import pytest

from telemetry.evidence.grouping import Grouping


@pytest.mark.parametrize("slots", [1, 4, 50])
@pytest.mark.parametrize("ordered", [True, False])
def test_sums_are_those_of_the_members(slots: int, ordered: bool) -> None:
    dice = np.random.default_rng(slots)
    slot = dice.integers(0, slots, 200)
    if ordered:
        slot = np.sort(slot)
    rows = dice.normal(0, 1, (3, 200))
    groups = Grouping(slot, slots + 2)  # the last two have nobody
    found = groups.sums(rows)
    assert found.shape == (3, slots + 2)
    for k in range(slots + 2):
        mine = slot == k
        assert groups.sizes[k] == mine.sum()
        assert found[:, k] == pytest.approx(rows[:, mine].sum(axis=1), abs=1e-12)


def test_nobody_sums_to_nothing() -> None:
    groups = Grouping(np.zeros(0, dtype=np.int64), 3)
    assert (groups.sums(np.zeros((2, 0))) == 0).all()
    assert groups.sums(np.zeros((2, 0))).shape == (2, 3)
