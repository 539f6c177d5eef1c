"""The curves against exact enumeration, scipy and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from telemetry.evidence import curves, first_events, levels, outcome
from telemetry.policy import Engine, Gate, GateType, Margin, Policy, unit_of

ENGINE = Engine()


def test_44_clean_devices_refute_eight_percent() -> None:
    assert outcome.safe(ENGINE, 0, 43, 0.08) < 10 <= outcome.safe(ENGINE, 0, 44, 0.08)
    assert outcome.needed(ENGINE, 0.08) == 44


@pytest.mark.parametrize(("n", "failures"), [(5, 2), (20, 3), (50, 4), (100, 5), (500, 10)])
def test_failures_that_roll_back_at_the_published_weight(n: int, failures: int) -> None:
    assert 0.3 * outcome.harm(ENGINE, failures - 1, n, 0.005) < 20
    assert 0.3 * outcome.harm(ENGINE, failures, n, 0.005) >= 20


@pytest.mark.parametrize("p", [0.001, 0.005])
def test_outcome_evidence_has_expectation_at_most_one_by_exact_enumeration(p: float) -> None:
    n = 60
    weights = stats.binom.pmf(range(n + 1), n, p)
    values = [outcome.harm(ENGINE, s, n, 0.005) for s in range(n + 1)]
    assert float(np.dot(weights, values)) <= 1 + 1e-6


def test_safe_evidence_has_expectation_at_most_one_at_the_margin() -> None:
    n = 80
    weights = stats.binom.pmf(range(n + 1), n, 0.08)
    values = [outcome.safe(ENGINE, s, n, 0.08) for s in range(n + 1)]
    assert float(np.dot(weights, values)) == pytest.approx(1, abs=1e-6)


def test_outcome_curve_is_the_binomial_likelihood() -> None:
    grid = curves.share_grid(ENGINE)
    ours = outcome.curve(ENGINE, 3, 40)
    oracle = stats.binom.logpmf(3, 40, grid)
    assert np.allclose(ours - ours[0], oracle - oracle[0])


@pytest.mark.parametrize(("s", "n"), [(0, 30), (2, 50), (9, 200)])
def test_upper_bound_is_clopper_pearson(s: int, n: int) -> None:
    assert outcome.upper_bound(s, n, 0.8) == pytest.approx(stats.beta.ppf(0.8, s + 1, n - s))


def test_first_event_evidence_matches_the_published_example() -> None:
    ell = first_events.curve(ENGINE, [(28, 52, 498, 1990)])
    assert first_events.harm(ENGINE, ell) == pytest.approx(50, abs=1)
    low, high = first_events.band(ENGINE, ell)
    assert (low, high) == (pytest.approx(1.05, abs=0.01), pytest.approx(4.25, abs=0.05))


@pytest.mark.parametrize("y1", [1, 3, 10])
def test_first_event_tick_is_fair_under_the_randomisation_null(y1: int) -> None:
    # d events fall on any of the devices at risk: hypergeometric, enumerated.
    y0, d = 12, 4
    null = stats.hypergeom(y1 + y0, y1, d)
    expected = sum(
        null.pmf(d1) * first_events.harm(ENGINE, first_events.curve(ENGINE, [(d1, d - d1, y1, y0)]))
        for d1 in range(max(0, d - y0), min(d, y1) + 1)
    )
    assert expected <= 1 + 1e-9


def test_no_events_prove_nothing() -> None:
    ell = first_events.curve(ENGINE, [(0, 0, 50, 250)])
    assert first_events.harm(ENGINE, ell) == pytest.approx(1)
    assert first_events.safe(ENGINE, ell, 4.0) == pytest.approx(1)


def test_without_a_control_the_ratio_says_nothing() -> None:
    ell = first_events.curve(ENGINE, [(9, 0, 50, 0)])
    assert first_events.harm(ENGINE, ell) == pytest.approx(1)


def test_no_event_over_enough_hours_refutes_a_budget() -> None:
    hours = first_events.hours_needed(ENGINE, 0.04)
    assert first_events.budget_safe(ENGINE, 0, hours * 1.01, 0.04) >= 10
    assert first_events.budget_safe(ENGINE, 0, hours * 0.9, 0.04) < 10
    assert first_events.budget_safe(ENGINE, 0, 0, 0.04) == pytest.approx(1)


def test_budget_curve_is_the_poisson_likelihood() -> None:
    grid = curves.ratio_grid(ENGINE)
    ours = first_events.budget_curve(ENGINE, 3, 100, 0.04)
    oracle = stats.poisson.logpmf(3, grid * 4)
    assert np.allclose(ours - ours[0], oracle - oracle[0])


def test_curves_of_disjoint_data_add() -> None:
    ticks = [(1, 0, 10, 50), (0, 2, 9, 50), (1, 1, 9, 48)]
    together = first_events.curve(ENGINE, ticks)
    apart = sum(first_events.curve(ENGINE, [tick]) for tick in ticks)
    assert np.allclose(together, apart)


def test_peeking_at_harmless_first_events_stays_below_alpha() -> None:
    chance = np.random.default_rng(7)
    crossed = 0
    for _ in range(300):
        hazard = chance.lognormal(-3, 1.5, 72)  # frail devices, 12 exposed and 60 controls
        when = chance.exponential(1 / hazard)
        exposed = np.arange(72) < 12
        ticks = []
        for i in np.argsort(when)[:40]:
            risk = when >= when[i]
            one, zero = int((risk & exposed).sum()), int((risk & ~exposed).sum())
            ticks.append((int(exposed[i]), int(not exposed[i]), one, zero))
        total = np.cumsum([first_events.curve(ENGINE, [t]) for t in ticks], axis=0)
        crossed += any(first_events.harm(ENGINE, ell) >= 20 for ell in total)
    assert crossed / 300 <= 0.05


@pytest.mark.parametrize("ratio", [0.5, 1.0, 3.0])
def test_bands_cover_the_truth(ratio: float) -> None:
    chance = np.random.default_rng(3)
    covered = 0
    for _ in range(200):
        d = 30
        w = 0.25 * ratio / (1 + 0.25 * (ratio - 1))
        d1 = int(chance.binomial(d, w))
        low, high = first_events.band(
            ENGINE, first_events.curve(ENGINE, [(d1, d - d1, 2500, 7500)])
        )
        covered += low <= ratio * 1.06 and high >= ratio / 1.06
    assert covered / 200 >= 0.95


@pytest.mark.parametrize("t", [0.0, 0.3, 2.0, 6.0, 15.0])
@pytest.mark.parametrize("df", [1, 3, 17, 400])
def test_student_tail_is_scipys(t: float, df: int) -> None:
    assert levels.student_tail(t, df) == pytest.approx(stats.t.sf(t, df), rel=1e-8)


def test_level_evidence_is_the_integral_over_its_prior() -> None:
    from scipy.integrate import quad

    normal, scale = levels.Normal(s=3.0, i=2.0), 0.7

    def integrand(d: float) -> float:
        prior = 2 * stats.norm.pdf(d, scale=scale)
        return float(prior * math.exp(d * normal.s - d * d * normal.i / 2))

    assert levels.harm(normal, scale) == pytest.approx(quad(integrand, 0, 20)[0], rel=1e-6)


def test_a_shifted_level_is_harm_and_an_equal_one_becomes_safe() -> None:
    chance = np.random.default_rng(1)

    def arm(n: int, shift: float) -> levels.Sums:
        x = chance.normal(50, 6, n)
        y = x + shift + chance.normal(0, 1, n)
        return levels.Sums(
            n=n, y=y.sum(), x=x.sum(), yy=(y * y).sum(), xy=(x * y).sum(), xx=(x * x).sum()
        )

    control = arm(100, 0)
    assert levels.harm(levels.level([(arm(30, 3), control)]), 3.0) > 20
    assert levels.safe(levels.level([(arm(30, 0), control)]), 3.0, 3.0) > 10


def test_nonsense_is_nan_and_passes_nothing() -> None:
    assert math.isnan(outcome.safe(ENGINE, math.nan, 50, 0.08))
    assert math.isnan(outcome.harm(ENGINE, 5, 4, 0.005))
    ell = first_events.curve(ENGINE, [(math.nan, 0, 5, 5)])
    assert math.isnan(first_events.safe(ENGINE, ell, 2.0))


def test_policy_round_trips_through_json() -> None:
    policy = Policy(
        name="driving",
        gates=(
            Gate(
                metric="disengagement",
                type=GateType.RATE,
                per="1000km",
                margin=Margin(ratio=1.5),
                budget={"per_1000h": 40},
            ),
        ),
    )
    assert Policy.from_json(policy.to_json()) == policy
    assert policy.gates[0].budget_rate() == (0.04, "device_hour")


@pytest.mark.parametrize("text", ["", "1000", "-5km", "0km", "km per hour", "9" * 400 + "km"])
def test_hostile_units_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no unit"):
        unit_of(text)


def test_the_average_of_evidence_is_its_mean() -> None:
    assert curves.average([1.0, 4.0, 40.0]) == pytest.approx(15.0)
    assert curves.average([]) == 1.0
    assert math.isnan(curves.average([1.0, math.nan]))
