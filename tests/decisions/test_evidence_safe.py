"""Proof that a repeat rate has not risen by its margin: F is an e-value there, and grows."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from telemetry.evidence import levels
from telemetry.evidence.levels import Sums
from telemetry.policy import Engine

ENOUGH = 1 / Engine().beta
LEAST = Engine().safe_min_events
MARGIN = math.log(1.9)


def sums(y: np.ndarray, x: np.ndarray) -> Sums:
    return Sums(
        n=float(y.size), y=float(y.sum()), x=float(x.sum()), yy=float((y * y).sum()),
        xy=float((x * y).sum()), xx=float((x * x).sum()),
    )  # fmt: skip


def single(events: float, expected: float, devices: float) -> Sums:
    """Events of as many devices, none with a second: no scatter beyond Poisson's."""
    return Sums(
        n=devices, y=events, x=expected, yy=events, xy=events * expected / devices,
        xx=expected**2 / devices,
    )  # fmt: skip


def safe(one: Sums, zero: Sums, margin: float = MARGIN) -> float:
    return levels.repeat_safe([(one, zero)], margin, LEAST)[0]


@pytest.mark.parametrize(
    ("events", "arms"), [(20, 1.0), (30, 1.0), (60, 5.0), (150, 5.0), (150, 1.0)]
)
def test_at_the_margin_it_is_worth_one_on_average(events: int, arms: float) -> None:
    share = math.exp(MARGIN) / (math.exp(MARGIN) + arms)
    ones = np.arange(1, events)
    worth = np.array(
        [
            safe(single(o, 20.0, 1000), single(events - o, 20.0 * arms, 1000 * arms))
            for o in ones.tolist()
        ]
    )
    mean = float((worth * stats.binom.pmf(ones, events, share)).sum())
    assert mean == pytest.approx(1.0, abs=0.15)


def test_without_a_rise_it_is_the_likelihood_ratio_of_the_binomial() -> None:
    one, zero = single(30, 30.0, 3000), single(150, 150.0, 15_000)
    at_none, at_margin = 1 / 6, 1.9 / 6.9
    exact = stats.binom.logpmf(30, 180, at_none) - stats.binom.logpmf(30, 180, at_margin)
    assert math.log(safe(one, zero)) == pytest.approx(exact, rel=0.12)


def test_fewer_events_than_usual_prove_more_not_less() -> None:
    zero = single(150, 150.0, 15_000)
    proofs = [safe(single(events, 30.0, 3000), zero) for events in (60, 40, 30, 20, 10)]
    assert proofs == sorted(proofs)
    assert proofs[0] < 1 < proofs[1] < ENOUGH < proofs[2]
    assert safe(single(3, 30.0, 3000), zero) > ENOUGH  # three devices vary too, but not so much


def test_where_the_margin_would_bring_few_events_nothing_is_said() -> None:
    one, zero = single(2, 3.0, 300), single(15, 15.0, 1500)  # 5.1 of 17 at the margin
    assert levels.repeat_safe([(one, zero)], MARGIN, LEAST) == (1.0, False)
    assert levels.repeat_safe([], MARGIN, LEAST) == (1.0, False)


def test_scatter_between_devices_makes_it_say_less() -> None:
    zero = single(150, 150.0, 15_000)
    calm = single(30, 30.0, 3000)
    loud = Sums(n=3000, y=30, x=30.0, yy=150, xy=0.3, xx=0.3)  # the events of six devices
    assert 1 < math.log(safe(calm, zero)) > 2 * math.log(safe(loud, zero))


def test_strata_add_up() -> None:
    pairs = [(single(20, 20.0, 2000), single(100, 100.0, 9000)),
             (single(30, 30.0, 3000), single(150, 150.0, 15_000))]  # fmt: skip
    both, _ = levels.repeat_safe(pairs, MARGIN, LEAST)
    assert both == pytest.approx(math.prod(safe(*pair) for pair in pairs), rel=0.05)


def test_what_is_not_a_number_proves_nothing() -> None:
    one = Sums(n=100, y=20, x=20.0, yy=math.nan, xy=4, xx=4)
    found = safe(one, single(100, 100.0, 9000))
    assert not found >= ENOUGH


@pytest.mark.parametrize(("devices", "spread"), [(30, 0.5), (100, 1.0), (100, 2.0)])
def test_a_rise_of_the_margin_is_seldom_called_safe_however_often_it_is_asked(
    devices: int, spread: float
) -> None:
    """Rates that differ between devices and come and go, looked at after each of 40 days."""
    dice, wrong, runs = np.random.default_rng(5), 0, 400
    for _ in range(runs):
        own = np.minimum(dice.lognormal(-(spread**2) / 2, spread, 6 * devices), 20.0) * 0.05
        true = own * dice.gamma(2.0, 0.5, own.size)
        true[:devices] *= 1.9
        days = np.arange(1, 41)
        seen = dice.poisson(np.broadcast_to(true, (40, own.size))).cumsum(axis=0).astype(float)
        wrong += any(
            safe(
                sums(seen[d - 1, :devices], own[:devices] * d),
                sums(seen[d - 1, devices:], own[devices:] * d),
            )
            >= ENOUGH
            for d in days.tolist()
        )
    assert wrong <= 1.25 * runs * Engine().beta
