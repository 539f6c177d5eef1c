"""A whole fleet that lost its broker at once: when its devices come back, and how many a moment."""

from __future__ import annotations

import random
from collections import Counter
from heapq import heapify, heappop, heappush

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_agent.reconnect import FIRST, LONGEST, pause

DICE = st.floats(min_value=0, max_value=1, exclude_max=True)


@given(failures=st.integers(min_value=0, max_value=10**9), dice=DICE)
def test_a_pause_is_never_longer_than_its_bound(failures: int, dice: float) -> None:
    assert 0 <= pause(failures, dice) < min(LONGEST, FIRST * 2 ** min(failures, 10)) + 1e-9


@pytest.mark.parametrize("failures", [0, 1, 2, 5])
def test_a_fleet_is_spread_evenly_over_the_whole_pause(failures: int) -> None:
    dice, devices, parts = random.Random(failures), 20_000, 20
    highest = min(LONGEST, FIRST * 2**failures)
    seen = Counter(int(pause(failures, dice.random()) / highest * parts) for _ in range(devices))
    each = devices / parts
    assert set(seen) == set(range(parts))
    # six standard deviations of a binomial count
    assert max(abs(n - each) for n in seen.values()) < 6 * each**0.5


def returns(devices: int, admitted: int, seed: int) -> tuple[list[float], Counter[int]]:
    """When each device is served again by a broker that admits so many a second and refuses the
    others; and how many attempts came in each second."""
    dice = random.Random(seed)
    attempts = [(pause(0, dice.random()), number, 0) for number in range(devices)]
    heapify(attempts)
    served: list[float] = []
    came: Counter[int] = Counter()
    taken: Counter[int] = Counter()
    while attempts:
        now, number, failures = heappop(attempts)
        came[int(now)] += 1
        if taken[int(now)] < admitted:
            taken[int(now)] += 1
            served.append(now)
        else:
            wait = pause(failures + 1, dice.random())
            heappush(attempts, (now + wait, number, failures + 1))
    return served, came


@pytest.mark.parametrize("seed", range(3))
def test_ten_thousand_come_back_without_a_wave(seed: int) -> None:
    served, came = returns(10_000, admitted=10_000, seed=seed)
    assert max(served) < FIRST
    assert max(came.values()) < 1.1 * 10_000 / FIRST


@pytest.mark.parametrize("seed", range(3))
def test_a_broker_that_admits_few_is_not_hammered_and_serves_all(seed: int) -> None:
    devices, admitted = 20_000, 500
    served, came = returns(devices, admitted, seed)
    assert len(served) == devices
    assert max(served) < 3 * devices / admitted + LONGEST  # no starvation
    assert came.total() < 8 * devices  # attempts in all, refused ones included
    late = [n for second, n in came.items() if second > 2 * FIRST]
    assert max(late) < devices / FIRST / 2  # after the first wave it asks less, not more
