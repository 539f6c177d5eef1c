"""The device score against naive loops, and its rules."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from telemetry.policy import Factor, ScoreSpec
from telemetry.report import Totals
from telemetry.score import bands, score

SPEC = ScoreSpec(
    min_exposure=20.0,
    factors=(
        Factor(metric="braking", per="1000km", good=0.0, bad=8.0, weight=35.0),
        Factor(metric="disengagement", per="device_hour", good=0.1, bad=0.5, weight=50.0),
        Factor(metric="battery", per="device_hour", good=90.0, bad=40.0, weight=30.0),
    ),
)


def fleet(n: int, seed: int = 1) -> Totals:
    chance = random.Random(seed)
    hours = [chance.choice([0.0, 5.0, 20.0, 200.0 * chance.random()]) for _ in range(n)]
    battery = [math.nan if chance.random() < 0.1 else chance.uniform(20, 100) for _ in range(n)]
    return Totals(
        devices=[f"d-{i:07d}" for i in range(n)],
        counters={
            "braking": np.array([float(chance.randint(0, 30)) for _ in range(n)]),
            "disengagement": np.array([float(chance.randint(0, 60)) for _ in range(n)]),
        },
        exposure={
            "device_hour": np.array(hours),
            "km": np.array([h * chance.choice([0, 30, 60]) for h in hours]),
        },
        levels={"battery": np.array(battery)},
    )


def naive(totals: Totals, place: int) -> float | None:
    hours, km = totals.exposure["device_hour"][place], totals.exposure["km"][place]
    if hours < 20 or km == 0 or math.isnan(totals.levels["battery"][place]):
        return None
    value = 100.0
    xs = (
        totals.counters["braking"][place] / km * 1000,
        totals.counters["disengagement"][place] / hours,
        totals.levels["battery"][place],
    )
    for x, factor in zip(xs, SPEC.factors, strict=True):
        share = (x - factor.good) / (factor.bad - factor.good)
        value -= factor.weight * min(1.0, max(0.0, share))
    return max(0.0, value)


def test_one_device_does_not_change_what_a_factor_means_for_the_others() -> None:
    honest = fleet(100)
    names = [*honest.devices, "z-liar"]

    def longer(columns: dict[str, np.ndarray], own: float) -> dict[str, np.ndarray]:
        return {name: np.append(column, own) for name, column in columns.items()}

    counters = longer(dict(honest.counters), 5.0)
    counters["battery"] = np.append(np.zeros(100), 9.0)  # a level's name for events
    levels = longer(dict(honest.levels), math.nan)
    levels["braking"] = np.append(np.full(100, math.nan), 4.0)  # and the other way round
    lied = Totals(
        devices=names,
        counters=counters,
        exposure=longer(dict(honest.exposure), 100.0),
        levels=levels,
    )
    np.testing.assert_array_equal(score([lied], SPEC).value[:100], score([honest], SPEC).value)


def test_the_whole_fleet_at_once_equals_a_naive_loop() -> None:
    totals = fleet(70_000)  # more than one block
    result = score(totals, SPEC)
    chance = random.Random(5)
    for place in [0, 65_535, 65_536, 69_999, *chance.sample(range(70_000), 3000)]:
        expected = naive(totals, place)
        if expected is None:
            assert math.isnan(result.value[place])
        else:
            assert result.value[place] == pytest.approx(expected, abs=1e-9)


def test_the_parts_make_up_the_score() -> None:
    result = score(fleet(500), SPEC)
    scored = ~np.isnan(result.value)
    assert scored.any()
    total = sum(part[scored] for part in result.parts.values())
    np.testing.assert_allclose(result.value[scored], np.maximum(0.0, 100.0 - total))


def test_too_little_exposure_is_unscored_and_never_perfect() -> None:
    totals = Totals(
        devices=["new", "short", "enough"],
        counters={},
        exposure={"device_hour": np.array([0.0, 19.9, 20.0])},
        levels={},
    )
    spec = ScoreSpec(min_exposure=20.0, factors=(Factor(metric="x", bad=1.0),))
    assert np.isnan(score(totals, spec).value).tolist() == [True, True, False]
    no_floor = ScoreSpec(min_exposure=0.0)
    assert np.isnan(score(totals, no_floor).value).tolist() == [True, False, False]


def test_a_counter_never_named_is_zero_and_a_perfect_score_is_exactly_100() -> None:
    totals = Totals(
        devices=["a"], counters={}, exposure={"device_hour": np.array([30.0])}, levels={}
    )
    spec = ScoreSpec(min_exposure=20.0, factors=(Factor(metric="x", bad=3.0, weight=7.0),))
    assert score(totals, spec).value.tolist() == [100.0]


def test_an_unknown_factor_leaves_the_device_unscored() -> None:
    totals = Totals(
        devices=["parked"],
        counters={"braking": np.array([0.0])},
        exposure={"device_hour": np.array([99.0]), "km": np.array([0.0])},
        levels={},
    )
    spec = ScoreSpec(factors=SPEC.factors[:1])
    explained = score(totals, spec).explain("parked")
    assert explained is not None
    assert explained.value is None
    assert explained.sentence == "unscored: nothing known of braking"


def test_explain_shows_the_arithmetic() -> None:
    totals = Totals(
        devices=["a", "b"],
        counters={"x": np.array([0.0, 60.0])},
        exposure={"device_hour": np.array([10.0, 120.0])},
        levels={},
    )
    spec = ScoreSpec(
        min_exposure=20.0, factors=(Factor(metric="x", good=0.0, bad=1.0, weight=40.0),)
    )
    result = score(totals, spec)
    explained = result.explain("b")
    assert explained is not None
    assert (explained.value, explained.parts[0].penalty) == (80.0, 20.0)
    wanted = "80.0 = 100 − 20.0 for x (0.5 per device_hour; good 0, bad 1)"
    assert explained.sentence == wanted
    short = result.explain("a")
    assert short is not None
    assert short.sentence == "unscored: 10.0 device hours of at least 20"
    assert result.explain("never-heard") is None


def test_a_metric_may_stand_twice() -> None:
    factors = (Factor(metric="x", weight=10.0), Factor(metric="x", per="km", weight=20.0))
    totals = Totals(
        devices=["a"],
        counters={"x": np.array([100.0])},
        exposure={"device_hour": np.array([30.0]), "km": np.array([30.0])},
        levels={},
    )
    assert score(totals, ScoreSpec(factors=factors)).value.tolist() == [70.0]


def test_bands_are_quintiles_and_equals_share_one() -> None:
    result = score(fleet(5000), SPEC)
    found = bands(result)
    scored = ~np.isnan(result.value)
    assert (found[~scored] == -1).all()
    assert set(found[scored]) <= set(range(5))
    values = result.value
    order = np.argsort(values[scored], kind="stable")
    assert (np.diff(found[scored][order]) >= 0).all()
    for value in np.unique(values[scored]):
        assert len(set(found[values == value])) == 1


def test_a_fleet_of_equals_is_one_band_and_an_empty_fleet_none() -> None:
    totals = Totals(
        devices=["a", "b"], counters={}, exposure={"device_hour": np.array([30.0, 40.0])}, levels={}
    )
    assert bands(score(totals, ScoreSpec())).tolist() == [4, 4]
    empty = Totals(devices=[], counters={}, exposure={}, levels={})
    assert bands(score(empty, SPEC)).tolist() == []
