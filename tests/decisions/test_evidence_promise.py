"""The promise behind the evidence: exact parts by enumeration, the others by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from telemetry.evidence import curves, first_events, levels, outcome
from telemetry.evidence.levels import Sums
from telemetry.evidence.tally import Rollup, Tally, observe
from telemetry.policy import Engine, Gate, GateType, Margin

ENGINE = Engine()
RATE = Gate(metric="crash", type=GateType.RATE)
LEVEL = Gate(metric="heat", type=GateType.MEAN, margin=Margin(absolute=2.0))


# -- early failures --------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0.0003, 0.0022, 0.02])
@pytest.mark.parametrize("level", [0.0005, 0.005])
def test_early_failures_spend_no_more_than_their_level(budget: float, level: float) -> None:
    limits = outcome.quick_limits(budget, level)
    assert limits
    # Walk device by device through every history of failures that has not met a pair yet.
    longest = min(max(n for _, n in limits), 4_000)
    alive, spent = np.array([1.0]), 0.0
    for n in range(1, longest + 1):
        alive = np.append(alive, 0.0) * (1 - budget) + np.append(0.0, alive) * budget
        met = [k for k, most in limits if n <= most]
        if met:
            spent += float(alive[min(met) :].sum())
            alive[min(met) :] = 0.0
        alive = alive[:12]
    assert spent <= level
    assert spent > level / 20  # not so careful that it could never speak


def test_the_early_limits_are_the_binomials() -> None:
    for k, n in outcome.quick_limits(0.0022, 0.003):
        shares = dict(outcome._QUICK)
        assert stats.binom.sf(k - 1, n, 0.0022) <= 0.003 * shares[k]
        assert stats.binom.sf(k - 1, n + 1, 0.0022) > 0.003 * shares[k]


def test_one_failure_is_never_early_evidence() -> None:
    assert outcome.quick(1, 1, 0.0022, 0.5) is None
    assert outcome.quick(3, 2, 0.0022, 0.5) is None


# -- the fleet's own past --------------------------------------------------------------------------


def test_a_clean_past_lowers_the_budget_and_a_declared_one_is_only_raised() -> None:
    clean = ((2, 1000), (1, 1000), (3, 1000))
    assert outcome.budget(ENGINE, None, clean, 0.005) == pytest.approx(
        stats.beta.ppf(0.8, 7, 2994), rel=0.2
    )
    assert outcome.budget(ENGINE, None, clean, 0.005) >= 0.003  # its worst release was accepted
    assert outcome.budget(ENGINE, 0.01, clean, 0.005) == 0.01
    assert outcome.budget(ENGINE, 0.001, clean, 0.005) > 0.001
    assert outcome.budget(ENGINE, None, (), 0.005) == 0.005
    assert outcome.budget(ENGINE, None, ((0, 100),), 0.005) == 0.005
    assert outcome.budget(ENGINE, None, ((0, 100_000),), 0.001) >= ENGINE.history_floor


# -- K2 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", ["first lead", "peak", "late"])
def test_first_events_are_a_supermartingale_whatever_the_stopping_rule(stop: str) -> None:
    chance = np.random.default_rng(11)
    stopped = []
    for _ in range(400):
        when = chance.exponential(1 / chance.lognormal(-2, 1.5, 40))
        exposed = chance.permutation(40) < 10
        ell, path = first_events.flat(ENGINE), []
        for i in np.argsort(when)[:25]:
            risk = when >= when[i]
            y1, y0 = int((risk & exposed).sum()), int((risk & ~exposed).sum())
            tick = (int(exposed[i]), int(not exposed[i]), y1, y0)
            ell = ell + first_events.curve(ENGINE, [tick])
            path.append(first_events.harm(ENGINE, ell))
        at = {"first lead": next((e for e in path if e > 1.5), path[-1]), "late": path[-1]}
        # Even the best moment in hindsight is bounded by Ville: P(max ≥ x) ≤ 1/x.
        stopped.append(max(path) if stop == "peak" else at[stop])
    if stop == "peak":
        for x in (4, 10, 20):
            assert np.mean(np.array(stopped) >= x) <= 1 / x + 0.02
    else:
        assert np.mean(stopped) <= 1.1


@pytest.mark.parametrize("ratio", [1.0, 2.5])
def test_bands_cover_at_every_time_at_once(ratio: float) -> None:
    chance = np.random.default_rng(5)
    missed = 0
    for _ in range(200):
        when = chance.exponential(1 / np.where(np.arange(300) < 60, 0.01 * ratio, 0.01))
        exposed = np.arange(300) < 60
        ell = first_events.flat(ENGINE)
        for k, i in enumerate(np.argsort(when)[:120]):
            risk = when >= when[i]
            y1, y0 = int((risk & exposed).sum()), int((risk & ~exposed).sum())
            ell = ell + first_events.curve(ENGINE, [(int(exposed[i]), int(not exposed[i]), y1, y0)])
            low, high = first_events.band(ENGINE, ell)
            if k % 4 == 0 and not low / 1.06 <= ratio <= high * 1.06:
                missed += 1
                break
    assert missed / 200 <= 0.05


def test_turning_the_arms_turns_the_curve() -> None:
    ticks = [(3, 1, 20, 60), (0, 2, 17, 59)]
    turned = first_events.turned(ENGINE, first_events.curve(ENGINE, ticks))
    other = first_events.curve(ENGINE, [(d0, d1, y0, y1) for d1, d0, y1, y0 in ticks])
    assert np.allclose(turned, other, atol=1e-9)


# -- K3 --------------------------------------------------------------------------------------------


def test_three_devices_that_agree_are_not_certain() -> None:
    few = Sums(n=3, y=15.3, yy=78.0302, x=0.0, xx=0.0, xy=0.0)  # 5.09, 5.10, 5.11
    chance = np.random.default_rng(2)
    y = chance.normal(5.0, 1.0, 3_000)
    many = Sums(n=3_000, y=y.sum(), yy=(y * y).sum())
    assert levels.harm(levels.level([(few, many)]), 1.0) < 2


def test_degrees_of_freedom_are_welchs() -> None:
    chance = np.random.default_rng(4)
    a, b = chance.normal(1, 3, 6), chance.normal(0, 1, 400)
    arm = [Sums(n=x.size, y=x.sum(), yy=(x * x).sum()) for x in (a, b)]
    found = levels.level([(arm[0], arm[1])])
    p = stats.ttest_ind(a, b, equal_var=False, alternative="greater").pvalue
    assert found.s / math.sqrt(found.i) == pytest.approx(stats.norm.isf(p), abs=0.02)


def test_few_events_are_judged_by_their_deviance() -> None:
    # Each device counted or not: no scatter beyond Poisson's.
    one = Sums(n=1000, y=12, x=5.0, yy=12, xy=0.06, xx=0.025)
    zero = Sums(n=5000, y=500, x=500.0, yy=500, xy=50, xx=50)
    found = levels.repeat([(one, zero)], 10)
    p = stats.binom.sf(11, 512, 5 / 505)
    assert found.s / math.sqrt(found.i) == pytest.approx(stats.norm.isf(p), abs=0.35)


# -- what befell everybody -------------------------------------------------------------------------


def _hours(tally: Tally, units: np.ndarray, at: int, heat: np.ndarray, crash: np.ndarray) -> None:
    tally.fold(
        Rollup(
            unit=units,
            tick=np.full(units.size, at),
            hours=np.ones(units.size),
            counts={"crash": crash},
            levels={"heat": (np.ones(units.size), heat)},
        )
    )


@pytest.mark.parametrize("fault", [0.0, 1.5])
def test_the_hour_of_the_day_is_no_harm(fault: float) -> None:
    """Controls are updated at noon and stop counting; the others go on into the hot hours."""
    chance = np.random.default_rng(8)
    tally = Tally(ENGINE, (RATE,), (LEVEL,))
    new = tally.enrol_all(0, ["a"] * 40, 0, True)
    old = tally.enrol_all(0, ["a"] * 200, 0, False)
    own = chance.normal(50, 3, 240)
    tally.past("n heat")[:240] = 100
    tally.past("sum heat")[:240] = 100 * own
    for at in range(24):
        here = new if at >= 12 else np.concatenate([new, old])
        if at >= 12:  # twenty controls are left to say what the hour is like
            here = np.concatenate([new, old[:20]])
        heat = (
            own[here] + 6 * math.sin(2 * math.pi * (at - 12) / 24) + chance.normal(0, 1, here.size)
        )
        heat[: new.size] += fault
        _hours(tally, here, at, heat, np.zeros(here.size, dtype=np.int64))
    seen = observe(tally, (RATE,), (LEVEL,)).metric("heat")
    normal = levels.level([(p.exposed, p.control) for p in seen.levels])
    # Where the updated are most of who reports, some of their fault counts as common: never more.
    assert 0.6 * fault - 0.25 <= normal.estimate <= fault + 0.25
    assert (levels.harm(normal, 3.0) > 20) == (fault > 0)


def test_a_fault_that_comes_with_time_is_heard_by_itself() -> None:
    chance = np.random.default_rng(9)
    tally = Tally(ENGINE, (RATE,), ())
    tally.late_ticks = 24
    units = np.concatenate(
        [tally.enrol_all(0, ["a"] * 100, 0, True), tally.enrol_all(0, ["a"] * 500, 0, False)]
    )
    for at in range(48):
        rate = np.full(600, 0.02)
        rate[:100] *= 3 if at >= 24 else 1
        tally.fold(
            Rollup(
                unit=units,
                tick=np.full(600, at),
                hours=np.ones(600),
                counts={"crash": chance.poisson(rate)},
            )
        )
    seen = observe(tally, (RATE,), ()).metric("crash")

    def ratio(parts: tuple) -> float:
        return math.exp(levels.repeat([(p.exposed, p.control) for p in parts], 10).estimate)

    assert ratio(seen.late) == pytest.approx(3, rel=0.25)
    assert ratio(seen.repeats) < ratio(seen.late)


def test_a_burst_of_messages_is_one_vote_where_events_are_rare() -> None:
    for many in (1, 50):
        tally = Tally(ENGINE, (RATE,), ())
        units = tally.enrol_all(0, ["a"] * 30, 0, False)
        crash = np.zeros(30, dtype=np.int64)
        crash[0] = many
        tally.fold(
            Rollup(unit=units, tick=np.zeros(30, int), hours=np.ones(30), counts={"crash": crash})
        )
        (sums,) = tally.repeats(RATE)[0]
        assert sums.control.y == 1


def test_shares_of_hardware_and_all_sum_to_one_e_value() -> None:
    # Exact: two kinds of hardware, every outcome weighted by its chance at the budget.
    from telemetry.evidence import guardrails

    p, n = 0.005, 40
    weight = stats.binom.pmf(range(8), n, p)
    total = sum(
        weight[i]
        * weight[j]
        * guardrails.shares(ENGINE, "x", "outcome", {"a": (i, n), "b": (j, n)}, p, 0.2).harm
        for i in range(8)
        for j in range(8)
    )
    assert total <= 1 + 1e-9


def test_the_ratio_grid_has_one_in_its_middle() -> None:
    grid = curves.ratio_grid(ENGINE)
    assert grid[60] == pytest.approx(1)
