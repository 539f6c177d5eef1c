"""The number for the whole fleet, against sums written out."""

from __future__ import annotations

import math

import pytest

from telemetry.evidence.fleetwide import estimate
from telemetry.evidence.levels import Sums
from telemetry.evidence.observations import BandSums, MetricSeen, Observations, merge


def arm(events: list[float], hours: list[float]) -> Sums:
    return Sums(
        n=len(events), y=sum(events), x=sum(hours), yy=sum(e * e for e in events),
        xy=sum(e * h for e, h in zip(events, hours, strict=True)), xx=sum(h * h for h in hours),
    )  # fmt: skip


def stratum(band: int, one: Sums, zero: Sums, wave: int = 0) -> BandSums:
    return BandSums(wave=wave, hardware="hw", band=band, exposed=one, control=zero)


ONE = [
    stratum(0, arm([3, 1, 0], [10, 10, 10]), arm([1, 1, 0, 0], [10, 10, 10, 10])),
    stratum(4, arm([1, 0], [20, 20]), arm([0, 1, 0], [20, 20, 20])),
]


def test_strata_are_weighted_by_the_fleet_and_its_exposure() -> None:
    found = estimate(ONE, {"0/hw": 900, "4/hw": 100}, math.log(2))
    assert found is not None
    weights = [900 * 10, 100 * 20]
    one, zero = [4 / 30, 1 / 40], [2 / 40, 1 / 60]
    r1 = sum(w * r for w, r in zip(weights, one, strict=True)) / sum(weights)
    r0 = sum(w * r for w, r in zip(weights, zero, strict=True)) / sum(weights)
    assert found.ratio == pytest.approx(r1 / r0)
    assert found.excess == pytest.approx((r1 - r0) * 1000)
    assert found.covered == 1.0


def test_the_band_is_the_normal_mixture_around_it() -> None:
    found = estimate(ONE[:1], {}, math.log(2))
    assert found is not None
    r1, r0 = 4 / 30, 2 / 40
    v1 = sum((e - r1 * 10) ** 2 for e in (3, 1, 0)) / 30**2
    v0 = sum((e - r0 * 10) ** 2 for e in (1, 1, 0, 0)) / 40**2
    v, tau = v1 / r1**2 + v0 / r0**2, math.log(2)
    delta = math.log(r1 / r0)
    wide = 1 + tau**2 / v
    mixed = -0.5 * math.log(wide) + 0.5 * (tau * delta / v) ** 2 / wide
    reach = math.sqrt(2 * v * (math.log(20) + 0.5 * delta**2 / v - mixed))
    assert found.ratio_band == pytest.approx((math.exp(delta - reach), math.exp(delta + reach)))


def test_a_stratum_without_a_control_is_not_covered() -> None:
    lonely = stratum(2, arm([9], [10]), Sums())
    found = estimate([*ONE, lonely], {"0/hw": 60, "2/hw": 20, "4/hw": 20}, 0.7)
    assert found is not None
    assert found.covered == pytest.approx(0.8)
    assert estimate([lonely], {"2/hw": 20}, 0.7) is None
    assert estimate([], {}, 0.7) is None
    assert estimate(ONE, {"9/hw": 5}, 0.7) is None


def test_without_events_in_control_there_is_an_excess_and_no_ratio() -> None:
    found = estimate([stratum(0, arm([3], [10]), arm([0, 0], [10, 10]))], {}, 0.7)
    assert found is not None
    assert math.isnan(found.ratio)
    assert found.excess == pytest.approx(300.0)


def test_waves_of_one_stratum_add_and_shards_merge() -> None:
    first, second = ONE[0], stratum(0, arm([2], [10]), arm([1], [10]), wave=1)
    both = estimate([first, second], {}, 0.7)
    whole = stratum(0, arm([3, 1, 0, 2], [10] * 4), arm([1, 1, 0, 0, 1], [10] * 5))
    assert both == estimate([whole], {}, 0.7)
    shards = [
        Observations(metrics={"m": MetricSeen(metric="m", bands=(part,))})
        for part in (
            stratum(0, arm([3, 1], [10, 10]), arm([1], [10])),
            stratum(0, arm([0], [10]), arm([1, 0, 0], [10] * 3)),
        )
    ]
    merged = merge(shards).metric("m").bands
    assert estimate(merged, {}, 0.7) == estimate([first], {}, 0.7)
