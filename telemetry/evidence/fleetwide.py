"""What a rate means for the whole eligible fleet: post-stratified, as a ratio and as an excess.

Decides how the strata of the draw (score band × hardware) are weighted; not what follows. A wave
rarely holds the bands in the fleet's own shares (hybrid draws half of it from the top band), and a
ratio hides how many events it stands for, so that both numbers stand beside each other:

    r_as = Σ O_i / Σ h_i                 capped events per exposure, arm a, stratum s
    R_a  = Σ_s W_s r_as / Σ_s W_s        W_s = devices of the eligible fleet × exposure per device
    ratio = R₁/R₀,   excess = R₁ − R₀,   V(r_as) = Σ (O_i − r_as h_i)² / (Σ h_i)²

Strata without both arms have no weight; `covered` is the share of the fleet that the others hold,
and a number that covers less says so. Bands are always valid (normal mixture, asymptotic).
Source: post-stratification, Holt & Smith 1979; ratio estimator, Cochran 1977, ch. 6.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from telemetry.evidence import levels
from telemetry.evidence.levels import Normal, Sums
from telemetry.evidence.observations import BandSums

PER = 1000.0  # units of exposure (device hours, km) that an excess is given for


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleetwide:
    ratio: float  # NaN without events in control
    ratio_band: tuple[float, float]
    excess: float  # events per 1,000 units of exposure, exposed − control
    excess_band: tuple[float, float]
    covered: float  # share of the eligible fleet in strata with both arms, 0…1

    def to_json(self) -> dict[str, Any]:
        return {
            "ratio": self.ratio,
            "ratio_band": list(self.ratio_band),
            "excess_per_1000": self.excess,
            "excess_band": list(self.excess_band),
            "covered": self.covered,
        }


def estimate(
    bands: Iterable[BandSums], weights: Mapping[str, float], scale: float
) -> Fleetwide | None:
    """None where no stratum has both arms.

    `weights`: `band/hardware` → devices of the eligible fleet (empty: as many as were seen);
    `scale`: τ of the band, of a log ratio.
    """
    strata = _strata(bands)
    both = {key: arms for key, arms in strata.items() if all(arm.x > 0 for arm in arms)}
    counted = {
        key: float(weights.get(key, 0.0)) if weights else one.n + zero.n
        for key, (one, zero) in both.items()
    }
    if not any(n > 0 for n in counted.values()):
        return None
    share = {
        key: n * (both[key][0].x + both[key][1].x) / (both[key][0].n + both[key][1].n)
        for key, n in counted.items()
    }
    whole = math.fsum(share.values())
    rates, spreads = [], []
    for arm in (0, 1):
        parts = [(w / whole, both[key][arm]) for key, w in share.items()]
        rates.append(math.fsum(w * sums.y / sums.x for w, sums in parts))
        spreads.append(math.fsum(w * w * _variance(sums) for w, sums in parts))
    everybody = math.fsum(weights.values()) if weights else math.fsum(counted.values())
    return _fleetwide(rates, spreads, math.fsum(counted.values()) / everybody, scale)


def _fleetwide(rates: list[float], spreads: list[float], covered: float, scale: float) -> Fleetwide:
    one, zero = rates
    ratio, ratio_band = math.nan, (0.0, math.inf)
    if one > 0 and zero > 0:
        relative = spreads[0] / one**2 + spreads[1] / zero**2
        low, high = levels.band(_normal(math.log(one / zero), relative), scale)
        ratio, ratio_band = one / zero, (_exp(low), _exp(high))
    # A doubled rate (τ = log 2) is an excess of the control's own rate.
    usual = max(zero, one) * math.expm1(scale)
    low, high = levels.band(_normal(one - zero, spreads[0] + spreads[1]), usual)
    return Fleetwide(
        ratio=ratio,
        ratio_band=ratio_band,
        excess=(one - zero) * PER,
        excess_band=(low * PER, high * PER),
        covered=min(1.0, covered),
    )


def _strata(bands: Iterable[BandSums]) -> dict[str, tuple[Sums, Sums]]:
    """`band/hardware` → (exposed, control), over all waves."""
    found: dict[str, tuple[Sums, Sums]] = {}
    for part in bands:
        key = f"{part.band}/{part.hardware}"
        one, zero = found.get(key, (Sums(), Sums()))
        found[key] = one + part.exposed, zero + part.control
    return found


def _variance(arm: Sums) -> float:
    """Of y/x, devices being the units."""
    rate = arm.y / arm.x
    squares = arm.yy - 2 * rate * arm.xy + rate * rate * arm.xx
    return max(0.0, squares) / arm.x**2


def _normal(estimate: float, variance: float) -> Normal:
    if not (variance > 0 and math.isfinite(variance) and math.isfinite(estimate)):
        return Normal()
    return Normal(s=estimate / variance, i=1 / variance)


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0)) if value > -math.inf else 0.0
