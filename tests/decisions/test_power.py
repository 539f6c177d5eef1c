"""What a plan says it can see, against a simulator that shares no code with it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from controller.rollout.gate import StepLimits
from controller.rollout.power import Baseline, History, PlannedWave, history, power
from telemetry.policy import UPDATE_OK, Gate, GateType, Margin, Policy
from telemetry.report import Totals

GATE = Gate(metric="braking", type=GateType.RATE, margin=Margin(ratio=1.5))
POLICY = Policy(name="p", gates=(Gate(metric=UPDATE_OK, type=GateType.PROPORTION), GATE))
RATE, SPREAD, PAST, DAILY = 0.01, 0.8, 100.0, 10.0
FLEET = History(
    devices=5000,
    rates={"braking": Baseline(rate=RATE, spread=SPREAD, past=PAST, daily=(DAILY,))},
)


def wave(exposed: int, control: int, soak: float = 24, longest: float = 48) -> PlannedWave:
    limits = StepLimits(wave=0, min_soak=soak * 3600, max_soak=longest * 3600)
    return PlannedWave(exposed=exposed, control=control, limits=limits)


# -- the other simulator: hour by hour, device by device, formulas written from the design ---------


def simulated(n1: int, n0: int, rise: float, runs: int, seed: int) -> tuple[float, float]:
    """Share of runs that roll back within 24 h and 48 h. Looks every hour."""
    dice = np.random.default_rng(seed)
    grid = np.exp(np.linspace(np.log(0.05), np.log(20), 121))
    prior = np.where(grid > 1 + 1e-9, np.exp(-0.5 * (np.log(grid) / np.log(2)) ** 2), 0.0)
    prior /= prior.sum()
    weight = 0.25 / (0.20 + 0.10 + 0.20 + 0.25)
    hit24 = hit48 = 0
    for _ in range(runs):
        arms = np.repeat([1, 0], [n1, n0])
        own = dice.gamma(1 / SPREAD, SPREAD, n1 + n0) * RATE
        before = dice.poisson(own * PAST)
        expected_h = (before + 0.5) / (PAST + 0.5 / RATE) * DAILY / 24
        mean = own * DAILY / 24 * np.where(arms == 1, rise, 1.0)
        total = np.zeros(n1 + n0)
        ell = np.zeros(121)
        for hour in range(1, 49):
            new = dice.poisson(mean)
            fell = (new > 0) & (total == 0)
            y1, y0 = ((total == 0) & (arms == a) for a in (1, 0))
            d1, d0 = int((fell & (arms == 1)).sum()), int((fell & (arms == 0)).sum())
            w = y1.sum() / (y1.sum() + y0.sum())
            ell += d1 * np.log(grid) - (d1 + d0) * np.log(1 + w * (grid - 1))
            total += new
            first = float((prior * np.exp(ell - ell[60])).sum())
            repeat = _repeat(total, expected_h * hour, arms)
            # The others: K1 twice without a failure, silence without a word.
            # Nobody is enrolled for long here: that part of the evidence stays at 1.
            if weight * (0.2 * first + 0.6 * repeat + 0.2) + (1 - weight) * 0.6 >= 20:
                hit24 += hour <= 24
                hit48 += 1
                break
    return hit24 / runs, hit48 / runs


def _repeat(total: np.ndarray, expected: np.ndarray, arms: np.ndarray) -> float:
    capped = np.minimum(total, 2 + 3 * np.ceil(expected))
    o = [capped[arms == a] for a in (0, 1)]
    x = [expected[arms == a] for a in (0, 1)]
    if min(o[0].sum(), o[1].sum()) < 10:
        return 1.0
    many = [float(o[a].sum()) for a in (0, 1)]
    scatter = [float(((o[a] - many[a] / x[a].sum() * x[a]) ** 2).sum()) for a in (0, 1)]
    squares = [float((o[a] ** 2).sum()) for a in (0, 1)]
    spoke = [many[a] ** 2 / squares[a] for a in (0, 1)]  # as many, equally busy
    told = sum(squares[a] * (1 - 1 / spoke[a]) for a in (0, 1))  # one device alone tells nothing
    coming = max(0.0, sum(scatter) - sum(many)) / told if told else 0.0
    flat = max(1.0, sum(scatter) / sum(many))
    usual = [max(flat, 1 + coming * squares[a] / many[a]) for a in (0, 1)]
    lean = [30 / (spoke[a] + 30) for a in (0, 1)]
    own = [lean[a] * usual[a] + (1 - lean[a]) * scatter[a] / many[a] for a in (0, 1)]
    parts = [max(usual[a], own[a]) / many[a] for a in (0, 1)]
    # What is estimated: beyond Poisson, and no less than so few devices leave open.
    open_ = [math.sqrt(2 / spoke[a]) / many[a] for a in (0, 1)]
    beyond = [min(parts[a], max(parts[a] - 1 / many[a], open_[a])) for a in (0, 1)]
    free = [min(1e4, spoke[a] * (parts[a] / beyond[a]) ** 2) for a in (0, 1)]
    variance = sum(parts)
    df = variance**2 / sum(parts[a] ** 2 / free[a] for a in (0, 1))
    share = x[1].sum() / (x[0].sum() + x[1].sum())
    due = [sum(many) * (1 - share), sum(many) * share]
    deviance = 2 * sum(many[a] * math.log(many[a] / due[a]) for a in (0, 1))
    root = math.copysign(math.sqrt(max(deviance, 0)), many[1] - due[1])
    t = root / math.sqrt(variance / (1 / many[0] + 1 / many[1]))
    sigma = math.sqrt(variance)
    z = float(stats.norm.isf(stats.t.sf(t, df)))
    s, i, tau = z / sigma, 1 / variance, math.log(2)
    u = tau * s / math.sqrt(1 + tau**2 * i)
    mixture = 2 / math.sqrt(1 + tau**2 * i) * math.exp(u * u / 2) * stats.norm.cdf(u)
    modest = math.exp(min(700, math.log(1.5) * s - math.log(1.5) ** 2 * i / 2))
    return float(0.5 * mixture + 0.5 * modest)


@pytest.mark.parametrize(
    ("n", "controls", "rise", "runs"),
    [(100, 500, 2.0, 1000), (300, 1500, 1.5, 1000), (300, 60, 2.5, 300)],  # few controls too
)
def test_power_agrees_with_another_simulator_within_five_points(
    n: int, controls: int, rise: float, runs: int
) -> None:
    by24, by48 = simulated(n, controls, rise, runs=runs, seed=11)
    found = power(POLICY, [wave(n, controls)], FLEET, rises=(rise,), runs=1000, seed=5)[0]
    chance = found.gates[1].chances[0]
    assert 0.1 < by48 < 0.95  # a question that has no answer by itself
    assert chance.by_soak == pytest.approx(by24, abs=0.05)
    assert chance.by_max == pytest.approx(by48, abs=0.05)


# -- rules ----------------------------------------------------------------------------------------


def test_more_devices_more_time_and_more_harm_are_seen_more_often() -> None:
    small, large = power(
        POLICY, [wave(50, 250), wave(400, 2000)], FLEET, rises=(1.5, 3.0), runs=100, seed=2
    )
    low, high = small.gates[1].chances
    assert low.by_max <= high.by_max
    assert high.by_soak <= high.by_max
    assert high.by_max < large.gates[1].chances[1].by_max
    assert large.gates[1].chances[1].hours is not None
    assert (large.gates[1].proves or 0) > (small.gates[1].proves or 0)


def test_a_harmless_release_is_seldom_seen_as_harmful() -> None:
    found = power(POLICY, [wave(200, 1000)], FLEET, rises=(1.0,), runs=400, seed=3)[0]
    assert found.gates[1].chances[0].by_max <= 0.05


def test_a_cohort_that_cannot_prove_anything_is_told_so() -> None:
    found = power(POLICY, [wave(12, 60)], FLEET, runs=20)[0]
    assert found.gates[0].sentence == (
        "12 devices cannot prove failed < 8 %: 44 are needed without a failure"
    )


def test_the_sentence_names_devices_hours_rise_and_chance() -> None:
    found = power(POLICY, [wave(1000, 5000)], FLEET, rises=(1.5, 3.0), runs=60, seed=4)[0]
    chance = found.gates[1].chances[0]
    hours, share = (24, chance.by_soak) if chance.by_soak >= 0.8 else (48, chance.by_max)
    assert found.gates[1].sentence.startswith(
        f"with 1,000 devices and {hours} h, a 1.5× rise of braking is seen with "
        f"{share * 100:.0f} % probability"
    )


def test_the_exact_chance_of_failures_is_the_binomial() -> None:
    found = power(POLICY, [wave(100, 500)], FLEET, runs=20)[0].gates[0]
    # Five failures of a hundred roll back (published: weight 0.3; 4 to 6 here).
    enough = int(found.sentence.split("(")[1].split()[0])
    assert 4 <= enough <= 6
    for chance in found.chances:
        assert chance.by_max == pytest.approx(stats.binom.sf(enough - 1, 100, chance.size))


def test_the_same_seed_gives_the_same_figures() -> None:
    plans = [wave(40, 200)]
    first = power(POLICY, plans, FLEET, runs=30, seed=9)
    assert power(POLICY, plans, FLEET, runs=30, seed=9) is first
    assert power(POLICY, plans, FLEET, runs=30, seed=10) != first


@pytest.mark.parametrize(
    "plan", [wave(0, 0), wave(1, 0), wave(5, 0), wave(0, 50), wave(30, 30, 0, 0)]
)
def test_extreme_plans_have_a_sentence(plan: PlannedWave) -> None:
    for gate in power(POLICY, [plan], FLEET, runs=5)[0].gates:
        assert gate.sentence
        assert all(0 <= c.by_soak <= c.by_max <= 1 for c in gate.chances)


def test_without_history_it_says_so() -> None:
    found = power(POLICY, [wave(100, 500)], History(devices=0))[0]
    assert found.gates[1].chances == ()
    assert "no history" in found.gates[1].sentence


def test_history_finds_rate_and_scatter_again() -> None:
    dice = np.random.default_rng(1)
    hours = dice.uniform(50, 150, 20_000)
    rates = RATE * dice.gamma(1 / SPREAD, SPREAD, 20_000)
    totals = Totals(
        devices=[str(i) for i in range(20_000)],
        counters={"braking": dice.poisson(rates * hours).astype(float)},
        exposure={"device_hour": hours},
        levels={},
    )
    found = history(totals, POLICY, days=10).rates["braking"]
    assert found.rate == pytest.approx(RATE, rel=0.05)
    assert found.spread == pytest.approx(SPREAD, rel=0.15)
    assert found.past == pytest.approx(100, rel=0.02)
    assert sum(found.daily) / len(found.daily) == pytest.approx(10, rel=0.02)


@pytest.mark.parametrize("counts", [[], [0.0, 0.0], [math.nan, math.nan], [-1.0, -1.0]])
def test_a_past_without_events_is_no_baseline(counts: list[float]) -> None:
    totals = Totals(
        devices=[str(i) for i in range(len(counts))],
        counters={"braking": np.array(counts)},
        exposure={"device_hour": np.full(len(counts), 10.0)},
        levels={},
    )
    assert history(totals, POLICY, days=10).rates == {}
