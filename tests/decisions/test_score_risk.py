"""Scores by predicted risk: published constants, declared and fitted multipliers, hostile data."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import optimize

from controller.manifests.policies import Refused, build
from telemetry import poisson, risk
from telemetry.policy import Factor, Preset, ScoreSpec
from telemetry.report import Totals
from telemetry.score import bands, score


def day(**columns: object) -> Totals:
    """One day; `mile`, `device_hour`, `km` are exposure, names ending in percent are levels."""
    n = len(next(iter(columns.values())))  # type: ignore[call-overload]
    arrays = {k: np.array(v, dtype=float) for k, v in columns.items()}
    exposure = {k: v for k, v in arrays.items() if k in ("mile", "device_hour", "km")}
    levels = {k: v for k, v in arrays.items() if k.endswith("percent")}
    counters = {k: v for k, v in arrays.items() if k not in exposure and k not in levels}
    names = [f"d-{i:05d}" for i in range(n)]
    return Totals(devices=names, counters=counters, exposure=exposure, levels=levels)


TESLA = ScoreSpec(preset=Preset.TESLA_2021, min_exposure=1.0)


def tesla(fcw: float, hb: float, at: float, uf: float, fad: float, miles: float = 1000.0) -> float:
    """The published formula, written out."""
    pcf = (
        0.682854
        * 1.014495 ** min(fcw, 101.9)
        * 1.127294 ** min(hb, 5.2)
        * 1.019630 ** min(at, 13.2)
        * 1.001444 ** min(uf, 63.2)
        * 1.317958 ** min(fad, 1.0)
    )
    return min(100.0, max(0.0, 115.382324 - 22.526504 * pcf))


def driven(
    fcw: float, hb: float, at: float, uf: float, fad: float, miles: float = 1000.0
) -> Totals:
    return day(
        mile=[miles], device_hour=[10.0], forward_collision_warning=[fcw * miles / 1000],
        hard_braking_percent=[hb], aggressive_turning_percent=[at],
        unsafe_following_percent=[uf], forced_disengagement=[fad * 10.0],
    )  # fmt: skip


# -- tesla-2021 -----------------------------------------------------------------------------------


def test_a_perfect_driver_has_exactly_100() -> None:
    assert score(driven(0, 0, 0, 0, 0), TESLA).value[0] == pytest.approx(100.0, abs=1e-4)


@pytest.mark.parametrize(
    "factors",
    [(10, 1.4, 2.0, 20, 0), (0, 1.4, 0, 0, 0), (101.9, 5.2, 13.2, 63.2, 1), (500, 40, 80, 99, 1)],
)
def test_tesla_is_the_published_formula_with_its_caps(factors: tuple[float, ...]) -> None:
    found = score(driven(*factors), TESLA)
    assert found.value[0] == pytest.approx(tesla(*factors), abs=1e-9)
    lost = sum(float(part[0]) for part in found.parts.values())
    assert 100 - lost == pytest.approx(found.value[0])


def test_the_published_example_of_hard_braking() -> None:
    """1.4 % of hard braking alone costs 2.8 points (Tesla's own calculator)."""
    assert score(driven(0, 1.4, 0, 0, 0), TESLA).value[0] == pytest.approx(97.2, abs=0.06)


def test_days_are_weighted_by_miles() -> None:
    days = [driven(0, 0, 0, 0, 0, miles=100), driven(20, 3, 0, 0, 0, miles=300)]
    good, bad = tesla(0, 0, 0, 0, 0), tesla(20, 3, 0, 0, 0)
    assert score(days, TESLA).value[0] == pytest.approx((100 * good + 300 * bad) / 400)


def test_own_names_take_declared_multipliers() -> None:
    own = (Factor(metric="jerk", per="1000km", multiplier=1.5, cap=2.0),)
    spec = ScoreSpec(preset=Preset.TESLA_2021, min_exposure=1.0, factors=own)
    found = score(day(km=[1000.0], device_hour=[9.0], jerk=[7.0]), spec)
    assert found.value[0] == pytest.approx(115.382324 - 22.526504 * 0.682854 * 1.5**2)


# -- pif ------------------------------------------------------------------------------------------

PIF = ScoreSpec(
    preset=Preset.PIF,
    min_exposure=1.0,
    factors=(
        Factor(metric="braking", per="device_hour", multiplier=2.0, cap=3.0),
        Factor(metric="near_miss", per="1000km", multiplier=1.1),
    ),
)


def test_pif_shrinks_rates_and_is_relative_to_the_best_of_the_fleet() -> None:
    braking, hours = np.array([0.0, 1.0, 10.0, 80.0]), np.full(4, 10.0)
    found = score(
        day(braking=braking, near_miss=[0, 0, 0, 0], device_hour=hours, km=[100.0] * 4), PIF
    )
    usual = braking.sum() / hours.sum()
    x = (braking + 0.5) / (hours + 0.5 / usual)
    logs = np.minimum(x, 3.0) * math.log(2.0)
    expected = np.clip(100 - 25 * (logs - np.quantile(logs, 0.05)), 0, 100)
    assert found.value == pytest.approx(expected)
    assert found.multipliers["braking"] == pytest.approx(2.0)
    for i in range(4):
        lost = sum(float(part[i]) for part in found.parts.values())
        assert 100 - lost == pytest.approx(found.value[i])


def test_a_risk_twice_as_high_costs_25_ln_2() -> None:
    spec = ScoreSpec(
        preset=Preset.PIF, min_exposure=1.0,
        factors=(Factor(metric="hot_percent", multiplier=2.0),),
    )  # fmt: skip
    found = score(day(hot_percent=[0.0] * 50 + [1.0], device_hour=[5.0] * 51), spec)
    assert found.value[0] == pytest.approx(100.0)
    assert found.value[50] == pytest.approx(100 - 25 * math.log(2))


def test_an_unknown_factor_or_too_little_exposure_is_unscored_never_100() -> None:
    found = score(
        day(braking=[0, 0, 0], near_miss=[0, 0, 0], device_hour=[10, 10, 0.5], km=[5, 0, 5]), PIF
    )
    assert not math.isnan(found.value[0])
    assert math.isnan(found.value[1])
    assert math.isnan(found.value[2])
    assert list(bands(found)[1:]) == [-1, -1]
    told = found.explain("d-00001")
    assert told is not None
    assert told.sentence == "unscored: nothing known of braking, near_miss"


def test_the_sentence_shows_the_arithmetic() -> None:
    braking = [0.0] * 30 + [20.0]
    found = score(
        day(braking=braking, near_miss=[0] * 31, device_hour=[10.0] * 31, km=[100.0] * 31), PIF
    )
    told = found.explain("d-00030")
    assert told is not None
    assert told.value is not None
    assert told.sentence.startswith(f"{told.value:.1f} = 100 − ")
    assert "for braking (" in told.sentence
    assert "counts up to 3; × 2 of the risk for each" in told.sentence


def test_nobody_heard_is_nobody_scored() -> None:
    for spec in (PIF, TESLA):
        assert score([], spec).value.size == 0
        empty = Totals(devices=[], counters={}, exposure={}, levels={})
        assert score(empty, spec).value.size == 0


# -- regression -----------------------------------------------------------------------------------

FITTED = ScoreSpec(
    preset=Preset.REGRESSION,
    target="crash",
    min_exposure=1.0,
    factors=(Factor(metric="hot_percent"), Factor(metric="wet_percent")),
)


def fleet(n: int = 4000, seed: int = 5) -> tuple[Totals, np.ndarray]:
    dice = np.random.default_rng(seed)
    x = np.column_stack([dice.gamma(2, 0.5, n), dice.normal(3, 1, n)])
    hours = dice.uniform(20, 200, n)
    mean = hours * 0.01 * np.exp(x @ np.array([0.7, -0.3]))
    totals = day(
        hot_percent=x[:, 0], wet_percent=x[:, 1], crash=dice.poisson(mean), device_hour=hours
    )
    return totals, x


def test_regression_finds_the_multipliers_that_made_the_data() -> None:
    totals, _ = fleet()
    found = score(totals, FITTED)
    assert found.multipliers["hot_percent"] == pytest.approx(math.exp(0.7), rel=0.05)
    assert found.multipliers["wet_percent"] == pytest.approx(math.exp(-0.3), rel=0.05)
    # The score ranks devices by the risk that they really have.
    truth = totals.levels["hot_percent"] * 0.7 - totals.levels["wet_percent"] * 0.3
    use = (found.value > 0) & (found.value < 100)
    assert np.corrcoef(found.value[use], truth[use])[0, 1] < -0.999


def test_the_fit_is_the_minimum_of_the_penalised_deviance() -> None:
    dice = np.random.default_rng(3)
    x = dice.normal(size=(200, 3))
    hours = dice.uniform(1, 5, 200)
    y = dice.poisson(hours * np.exp(-1 + 0.5 * x[:, 0]))
    found = poisson.fit(x, y.astype(float), hours, ["a", "b", "c"])
    z = np.clip((x - x.mean(0)) / x.std(0), -5, 5)
    design = np.column_stack([np.ones(200), z])

    def loss(beta: np.ndarray) -> float:
        eta = design @ beta + np.log(hours)
        return float((np.exp(eta) - y * eta).sum() + 0.5 * (beta[1:] ** 2).sum())

    best = optimize.minimize(loss, np.zeros(4), method="BFGS").x
    assert found.log_multipliers == pytest.approx(best[1:] / x.std(0), abs=1e-4)


def test_separation_stays_finite() -> None:
    x = np.concatenate([np.zeros(50), np.ones(50)])[:, None]
    y = np.concatenate([np.zeros(50), np.ones(50)])
    found = poisson.fit(x, y, np.ones(100), ["a"])
    assert found.log_multipliers is not None
    assert 0 < found.log_multipliers[0] < 20


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda x, y, h: (x, y * 0, h), "0 events in"),
        (lambda x, y, h: (x, y, h * 0), "0 devices have exposure"),
        (lambda x, y, h: (x * np.nan, y, h), "0 devices have exposure"),
        (lambda x, y, h: (x, y * np.nan, h), "0 devices have exposure"),
        (lambda x, y, h: (x[:, :0], y, h), "no factors are declared"),
        (lambda x, y, h: (x[:10], y[:10], h[:10]), "10 devices have exposure"),
        (lambda x, y, h: (x, -y - 1, h), "0 devices have exposure"),
    ],
)
def test_data_that_carry_no_fit_say_why(spoil, words: str) -> None:  # type: ignore[no-untyped-def]
    dice = np.random.default_rng(1)
    x, y, h = dice.normal(size=(100, 2)), dice.poisson(3, 100).astype(float), np.full(100, 5.0)
    found = poisson.fit(*spoil(x, y, h), ["a", "b"])
    assert found.log_multipliers is None
    assert words in found.note


@pytest.mark.parametrize("scale", [1e-12, 1e12, 1e300])
def test_constant_twin_and_gigantic_columns_are_survived(scale: float) -> None:
    dice = np.random.default_rng(2)
    one = dice.normal(size=300)
    x = np.column_stack([one * scale, one * scale, np.full(300, 7.0)])
    y = dice.poisson(np.exp(0.5 * one)).astype(float)
    found = poisson.fit(x, y, np.ones(300), ["a", "b", "c"])
    if found.log_multipliers is not None:
        assert np.isfinite(found.log_multipliers).all()
        assert found.log_multipliers[2] == 0.0
        assert "c" in found.note
    else:
        assert found.note


def test_a_fleet_that_cannot_be_fitted_is_unscored_with_the_reason() -> None:
    totals, _ = fleet(100)
    totals.counters["crash"][:] = 0
    found = score(totals, FITTED)
    assert np.isnan(found.value).all()
    told = found.explain("d-00003")
    assert told is not None
    assert "0 events in 100 devices" in told.sentence
    absent = ScoreSpec(
        preset=Preset.REGRESSION, target="nothing", min_exposure=1.0, factors=FITTED.factors
    )
    assert "no device ever reported nothing" in score(totals, absent).note
    bare = ScoreSpec(preset=Preset.REGRESSION, target="crash", min_exposure=1.0)
    assert "no factors" in score(totals, bare).note


# -- days and manifests ---------------------------------------------------------------------------


def test_days_of_different_devices_are_aligned() -> None:
    one = Totals(devices=["b"], counters={"x": np.array([1.0])}, exposure={}, levels={})
    two = Totals(devices=["a", "b"], counters={"x": np.array([2.0, 3.0])}, exposure={}, levels={})
    whole = risk.summed(risk.aligned([one, two]))
    assert list(whole.devices) == ["a", "b"]
    assert list(whole.counters["x"]) == [2.0, 4.0]


@pytest.mark.parametrize(
    ("spec", "field", "words"),
    [
        ({"preset": "pif", "factors": [{"metric": "a"}]}, "multiplier", "needs a multiplier"),
        ({"preset": "regression", "factors": [{"metric": "a"}]}, "target", "needs a target"),
        ({"preset": "linear", "target": "a"}, "target", "regression alone"),
        (
            {"preset": "regression", "target": "a", "factors": [{"metric": "a"}]},
            "metric",
            "cannot predict itself",
        ),
        ({"preset": "pif", "factors": [{"metric": "a", "multiplier": "-1"}]}, "", "above 0"),
        ({"preset": "pif", "factors": [{"metric": "a", "multiplier": "2", "cap": "0"}]}, "", "cap"),
    ],
)
def test_a_preset_says_what_it_needs(spec: dict[str, object], field: str, words: str) -> None:
    with pytest.raises(Refused) as refused:
        build({"name": "p"}, {"score": spec})
    path, message = refused.value.faults[0]
    assert words in message
    assert not field or path[-1] == field
