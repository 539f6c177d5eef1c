"""K3 against regression and resampling, with arms so large that no small-sample rule matters."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from controller.rollout.gate import StepLimits, needed
from telemetry.evidence import first_events, levels, outcome
from telemetry.evidence.levels import Sums
from telemetry.policy import UPDATE_OK, Engine, Gate, GateType, Margin, Policy

ENGINE = Engine()


def sums(y: np.ndarray, x: np.ndarray) -> Sums:
    return Sums(
        n=float(y.size), y=float(y.sum()), x=float(x.sum()), yy=float((y * y).sum()),
        xy=float((x * y).sum()), xx=float((x * x).sum()),
    )  # fmt: skip


def arm(dice: np.random.Generator, n: int, shift: float, base: float) -> tuple[np.ndarray, ...]:
    x = dice.normal(base, 4, n)
    return 0.6 * x + shift + dice.normal(0, 2, n), x


def test_level_is_the_analysis_of_covariance() -> None:
    dice = np.random.default_rng(1)
    data = [
        (arm(dice, 3000, 0.3, 50), arm(dice, 6000, 0.0, 50)),
        (arm(dice, 2000, 5.3, 90), arm(dice, 4000, 5.0, 90)),  # a hotter kind of hardware
    ]
    found = levels.level([(sums(*one), sums(*zero)) for one, zero in data])
    # One regression: an intercept for each stratum and arm pair, one slope, one effect.
    y, x, effect, where = [], [], [], []
    for stratum, pair in enumerate(data):
        for treated, (ys, xs) in zip((1.0, 0.0), pair, strict=True):
            y.append(ys)
            x.append(xs)
            effect.append(np.full(ys.size, treated))
            where.append(np.full(ys.size, stratum))
    place = np.concatenate(where)
    design = np.column_stack(
        [place == 0, place == 1, np.concatenate(x), np.concatenate(effect)]
    ).astype(float)
    whole = np.concatenate(y)
    beta, rest, *_ = np.linalg.lstsq(design, whole, rcond=None)
    variance = rest[0] / (whole.size - 4) * np.linalg.inv(design.T @ design)[3, 3]
    assert found.estimate == pytest.approx(beta[3], rel=0.03)
    assert 1 / found.i == pytest.approx(variance, rel=0.03)


def test_a_past_that_never_varies_explains_nothing() -> None:
    dice = np.random.default_rng(2)
    one, zero = dice.normal(0.1, 1, 2000), dice.normal(0.0, 1, 2000)
    flat = np.full(2000, 7.0)
    found = levels.level([(sums(one, flat), sums(zero, flat))])
    assert found.estimate == pytest.approx(one.mean() - zero.mean(), rel=0.02)
    assert 1 / found.i == pytest.approx(one.var() / 2000 + zero.var() / 2000, rel=0.03)


def test_one_device_alone_in_an_arm_says_nothing() -> None:
    dice = np.random.default_rng(3)
    one, many = arm(dice, 1, 9.0, 50), arm(dice, 500, 0.0, 50)
    assert levels.level([(sums(*one), sums(*many))]) == levels.Normal()
    assert levels.level([(sums(*many), sums(*one))]) == levels.Normal()
    assert levels.repeat([(sums(*one), sums(*many))], 1) == levels.Normal()


def test_repeat_is_the_log_ratio_with_the_scatter_of_devices() -> None:
    dice = np.random.default_rng(4)

    def counts(n: int, ratio: float) -> tuple[np.ndarray, np.ndarray]:
        expected = dice.uniform(0.5, 3, n)
        return dice.poisson(expected * dice.gamma(2, 0.5, n) * ratio).astype(float), expected

    (o1, x1), (o0, x0) = counts(3000, 1.3), counts(6000, 1.0)
    found = levels.repeat([(sums(o1, x1), sums(o0, x0))], 10)
    truth = math.log((o1.sum() / x1.sum()) / (o0.sum() / x0.sum()))
    draws = []
    for _ in range(400):
        a, b = dice.integers(0, 3000, 3000), dice.integers(0, 6000, 6000)
        ratio = (o1[a].sum() / x1[a].sum()) / (o0[b].sum() / x0[b].sum())
        draws.append(math.log(ratio))
    assert found.estimate == pytest.approx(truth, rel=0.05)
    assert found.i**-0.5 == pytest.approx(float(np.std(draws)), rel=0.12)


def test_only_what_exceeds_poisson_has_few_degrees_of_freedom() -> None:
    # Fifteen events of fifteen devices: the binomial, not Student's t of fourteen.
    rare = Sums(n=600, y=15, x=8.0, yy=15, xy=0.2, xx=8.0**2 / 600)
    many = Sums(n=3000, y=40, x=40.0, yy=40, xy=0.5, xx=40.0**2 / 3000)
    found = levels.repeat([(rare, many)], 10)
    exact = stats.norm.isf(stats.binom.sf(14, 55, 8 / 48))
    assert found.s / math.sqrt(found.i) == pytest.approx(exact, abs=0.3)
    # The same events of three devices are three observations.
    burst = Sums(n=600, y=15, x=8.0, yy=75, xy=0.2, xx=8.0**2 / 600)
    loud = levels.repeat([(burst, many)], 10)
    # Most of that is the variance; if it were taken as known, the share would be .52.
    assert loud.s / math.sqrt(loud.i) < 0.5 * found.s / math.sqrt(found.i)


def test_few_devices_lean_on_the_scatter_of_all() -> None:
    # By luck none of ten devices had two events, but their fleet bursts: no claim of Poisson.
    calm = Sums(n=200, y=10, x=5.0, yy=10, xy=0.25, xx=0.125)
    bursting = Sums(n=1000, y=200, x=200.0, yy=1600, xy=40, xx=40)
    steady = Sums(n=1000, y=200, x=200.0, yy=240, xy=40, xx=40)
    wild = levels.repeat([(calm, bursting)], 10)
    mild = levels.repeat([(calm, steady)], 10)
    assert wild.s / math.sqrt(wild.i) < 0.6 * mild.s / math.sqrt(mild.i)


@pytest.mark.parametrize("devices", [4, 10])
def test_few_devices_of_a_heavy_tailed_fleet_are_rarely_wrong(devices: int) -> None:
    """Rates over four orders of magnitude that come and go, none of them risen.

    One device brings nearly all events of its arm, and lies on the arm's rate whatever it did.
    """
    dice, wrong = np.random.default_rng(11), 0
    for _ in range(1500):
        expected = np.minimum(dice.lognormal(0, 2, 6 * devices), 50.0)
        seen = dice.negative_binomial(0.5, 0.5 / (0.5 + expected)).astype(float)
        seen = np.minimum(seen, 2 + 3 * np.ceil(expected))  # as a device's repeats are capped
        one = sums(seen[:devices], expected[:devices])
        zero = sums(seen[devices:], expected[devices:])
        found = levels.repeat([(one, zero)], 10)
        wrong += levels.harm(found, Engine().ratio_prior) > 1 / Engine().alpha
    assert wrong <= 18  # at one look: the rest of α is for the others


@pytest.mark.parametrize("information", [0.5, 10.0, 60.0])
def test_a_bet_on_one_rise_is_an_e_value_and_the_best_one_there(information: float) -> None:
    rise, root = math.log(1.5), math.sqrt(information)
    z = np.linspace(-12, 12, 20_001)

    def mean(truth: float) -> float:
        bets = [
            levels.harm_at(levels.Normal(s=root * x + truth * information, i=information), rise)
            for x in z
        ]
        return float(np.trapezoid(np.array(bets) * stats.norm.pdf(z), z))

    assert mean(0.0) == pytest.approx(1.0, abs=1e-3)
    assert mean(-0.2) < 1.0
    there = levels.Normal(s=rise * information, i=information)
    assert levels.harm_at(there, rise) > levels.harm(there, math.log(2)) * (information > 1)
    assert math.isnan(levels.harm_at(levels.Normal(s=math.nan, i=1.0), rise))


def test_few_events_are_not_compared() -> None:
    one = sums(np.array([1.0, 0.0, 2.0]), np.ones(3))
    zero = sums(np.full(20, 1.0), np.ones(20))
    assert levels.repeat([(one, zero)], 10) == levels.Normal()


def test_the_scale_is_the_margin_of_the_second_wave() -> None:
    assert levels.scale_of(ENGINE, 2.0) == pytest.approx(3.0)
    assert levels.scale_of(Engine(level_loosening=(4.0,)), 2.0) == pytest.approx(8.0)


def test_an_estimate_to_be_shown_keeps_its_value_and_widens() -> None:
    found = levels.widened(2.0, 0.25, 3)
    assert found.estimate == pytest.approx(2.0)
    assert found.i < 4.0
    assert levels.widened(2.0, 0.25, 1e6).i == pytest.approx(4.0, rel=1e-3)
    for hostile in ((math.nan, 1.0, 5), (1.0, 0.0, 5), (1.0, math.inf, 5), (1.0, 1.0, 0)):
        assert levels.widened(*hostile) == levels.Normal()


@pytest.mark.parametrize(("s", "n"), [(0, 0), (5, 5), (7, 5)])
def test_a_bound_that_nothing_limits_is_one(s: int, n: int) -> None:
    assert outcome.upper_bound(s, n, 0.8) == 1.0


def test_the_bound_of_one_device() -> None:
    assert outcome.upper_bound(0, 1, 0.8) == pytest.approx(0.8)


def test_needed_names_each_gate_with_its_own_numbers() -> None:
    rate = Gate(
        metric="braking", type=GateType.RATE, margin=Margin(ratio=1.5), budget={"per_1000h": 40}
    )
    plain = Gate(metric="stops", type=GateType.RATE, per="1000km", margin=Margin(ratio=3.0))
    shown = Gate(metric="shown", type=GateType.RATE, dry_run=True)
    policy = Policy(
        name="p", gates=(Gate(metric=UPDATE_OK, type=GateType.PROPORTION), rate, plain, shown)
    )
    step = StepLimits(wave=2, min_soak=7200.0, margins={"failed": 0.02})
    found = needed(policy, step)
    engine = policy.engine
    assert found["failed"] == outcome.needed(engine, 0.02)
    assert found["lost"] == outcome.needed(engine, engine.lost_margins[2])
    assert found["devices"] == max(found["failed"], found["lost"])
    assert found["soak"] == 7200.0
    assert set(found["gates"]) == {"braking", "stops"}
    braking, stops = found["gates"]["braking"], found["gates"]["stops"]
    assert (braking["ratio"], braking["budget"], braking["unit"]) == (1.5, 0.04, "device_hour")
    assert braking["hours"] == first_events.hours_needed(engine, 0.04)
    assert braking["events"] == first_events.events_needed(engine, 1.5, 1 / 6)
    assert (stops["ratio"], stops["budget"], stops["unit"]) == (3.0, None, "km")
    assert stops["hours"] is None
    few = needed(policy, step, controls_per_device=1.0)
    assert few["gates"]["stops"]["events"] == first_events.events_needed(engine, 3.0, 0.5)
