"""The device score 0–100 with the parts that make it up: who goes first. Whole fleet at once.

`linear`: value = max(0, 100 − Σ penalty), penalty = weight · clip((x − good) / (bad − good), 0, 1)
where x is count / exposure · amount of the factor's unit, or the mean of a gauge.
The other presets of the manifests are accepted, and scored by this formula until they are in force.

Rules, in order:

1. A device with less than `min_exposure` device hours, or none at all, is unscored: never "100".
2. So is one of whom a factor is unknown: no kilometre driven, no sample of the gauge.
3. A counter that a device with exposure never named counts as zero.
4. Unscored is NaN in arrays, band −1, and None where a person reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from telemetry.policy import Factor, ScoreSpec, unit_of
from telemetry.report import Totals

HOURS = "device_hour"
BANDS = 5
_BLOCK = 65_536  # rows whose temporaries stay in the processor's cache

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One line of a score's arithmetic."""

    metric: str
    per: str
    x: float | None  # None: unknown
    good: float
    bad: float
    weight: float
    penalty: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    device: str
    value: float | None  # None: unscored
    exposure_hours: float
    parts: tuple[Part, ...]
    sentence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Arrays of shape (n,) beside `devices`; `parts` holds penalties, `x` what they come from."""

    spec: ScoreSpec
    devices: Sequence[str]
    value: Floats
    exposure_hours: Floats
    parts: Mapping[str, Floats]
    x: Mapping[str, Floats]

    def explain(self, device: str) -> Explanation | None:
        """The arithmetic of one device; None for one that was never heard."""
        try:
            place = list(self.devices).index(device)
        except ValueError:
            return None
        names = _names(self.spec.factors)
        parts = tuple(
            Part(
                metric=factor.metric,
                per=factor.per,
                x=_known(self.x[name][place]),
                good=factor.good,
                bad=factor.bad,
                weight=factor.weight,
                penalty=_known(self.parts[name][place]),
            )
            for name, factor in zip(names, self.spec.factors, strict=True)
        )
        value, hours = _known(self.value[place]), float(self.exposure_hours[place])
        return Explanation(
            device=device,
            value=value,
            exposure_hours=hours,
            parts=parts,
            sentence=_sentence(value, hours, parts, self.spec),
        )


def score(totals: Totals, spec: ScoreSpec) -> Scores:
    """Scores of all devices in `totals`; O(devices × factors), in blocks."""
    n = len(totals.devices)
    names = _names(spec.factors)
    value = np.full(n, 100.0)
    hours = totals.exposure.get(HOURS, np.zeros(n))
    parts = {name: np.empty(n) for name in names}
    x = {name: np.empty(n) for name in names}
    for first in range(0, n, _BLOCK):
        block = slice(first, first + _BLOCK)
        for name, factor in zip(names, spec.factors, strict=True):
            seen = _seen(totals, factor, block)
            penalty = np.clip((seen - factor.good) / (factor.bad - factor.good), 0.0, 1.0)
            penalty *= factor.weight
            x[name][block], parts[name][block] = seen, penalty
            value[block] -= penalty
        np.maximum(value[block], 0.0, out=value[block])
        enough = (hours[block] >= spec.min_exposure) & (hours[block] > 0)
        value[block][~enough] = np.nan
    return Scores(
        spec=spec, devices=totals.devices, value=value, exposure_hours=hours, parts=parts, x=x
    )


def bands(scores: Scores) -> npt.NDArray[np.int64]:
    """Quintile of each scored device, 0 (worst) to 4; equals share a band; −1 is unscored."""
    found = np.full(len(scores.devices), -1, dtype=np.int64)
    scored = ~np.isnan(scores.value)
    if not scored.any():
        return found
    values = scores.value[scored]
    edges = np.quantile(values, np.arange(1, BANDS) / BANDS, method="lower")
    found[scored] = np.searchsorted(edges, values, side="right")
    return found


def _seen(totals: Totals, factor: Factor, block: slice) -> Floats:
    """x of one factor; NaN where it is unknown."""
    level = totals.levels.get(factor.metric)
    counts = totals.counters.get(factor.metric)
    if counts is None and level is not None:
        return level[block]
    amount, unit = unit_of(factor.per)
    size = len(totals.devices[block])
    exposure = totals.exposure.get(unit)
    known = np.zeros(size) if exposure is None else exposure[block]
    events = np.zeros(size) if counts is None else counts[block]
    out = np.full(size, np.nan)
    np.divide(events * amount, known, out=out, where=known > 0)
    return out


def _names(factors: Sequence[Factor]) -> list[str]:
    """A name for each factor: its metric, with the unit where a metric stands twice."""
    metrics = [factor.metric for factor in factors]
    return [
        f.metric if metrics.count(f.metric) == 1 else f"{f.metric}/{f.per}#{place}"
        for place, f in enumerate(factors)
    ]


def _known(number: float) -> float | None:
    return None if np.isnan(number) else float(number)


def _sentence(value: float | None, hours: float, parts: Sequence[Part], spec: ScoreSpec) -> str:
    if hours < spec.min_exposure or hours == 0:
        return f"unscored: {hours:.1f} device hours of at least {spec.min_exposure:g}"
    unknown = [part.metric for part in parts if part.x is None]
    if value is None:
        return f"unscored: nothing known of {', '.join(unknown)}"
    lost = [
        f"{part.penalty:.1f} for {part.metric} ({part.x:.3g} per {part.per}; "
        f"good {part.good:g}, bad {part.bad:g})"
        for part in parts
        if part.penalty and part.x is not None
    ]
    return f"{value:.1f} = 100 − " + " − ".join(lost) if lost else f"{value:.1f}: no penalty"
