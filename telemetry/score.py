"""The device score 0–100 with the parts that make it up: who goes first. Whole fleet at once.

One interface, four presets. `linear` is computed here: value = max(0, 100 − Σ penalty), penalty =
weight · clip((x − good) / (bad − good), 0, 1), where x is count / exposure · amount of the factor's
unit, or the mean of a gauge. `pif`, `tesla-2021` and `regression` predict a risk, day by day
(`telemetry.risk`). Whichever it is: value = 100 − Σ parts.

Rules, in order:

1. A device with less than `min_exposure` device hours, or none at all, is unscored: never "100".
2. So is one of whom a factor is unknown: no kilometre driven, no sample of the gauge.
3. A counter that a device with exposure never named counts as zero.
4. Unscored is NaN in arrays, band −1, and None where a person reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from telemetry import risk
from telemetry.policy import Factor, Preset, ScoreSpec, unit_of
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
    multiplier: float | None = None  # presets of risk: of one unit of x
    cap: float | None = None


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
    multipliers: Mapping[str, float] = field(default_factory=dict)  # presets of risk
    note: str = ""  # what a person should know of a fit, or why nobody is scored

    @property
    def factors(self) -> tuple[Factor, ...]:
        return risk.factors_of(self.spec)

    def explain(self, device: str) -> Explanation | None:
        """The arithmetic of one device; None for one that was never heard."""
        try:
            place = list(self.devices).index(device)
        except ValueError:
            return None
        names = _names(self.factors)
        parts = tuple(
            Part(
                metric=factor.metric,
                per=factor.per,
                x=_known(self.x[name][place]),
                good=factor.good,
                bad=factor.bad,
                weight=factor.weight,
                penalty=_known(self.parts[name][place]),
                multiplier=self.multipliers.get(name, factor.multiplier),
                cap=factor.cap,
            )
            for name, factor in zip(names, self.factors, strict=True)
        )
        value, hours = _known(self.value[place]), float(self.exposure_hours[place])
        return Explanation(
            device=device,
            value=value,
            exposure_hours=hours,
            parts=parts,
            sentence=_sentence(value, hours, parts, self.spec, self.note),
        )


def score(totals: Totals | Sequence[Totals], spec: ScoreSpec) -> Scores:
    """Scores of all devices in `totals`: the window's sums, or its days (see `daily`)."""
    if spec.preset is not Preset.LINEAR:
        return _by_risk([totals] if isinstance(totals, Totals) else totals, spec)
    if not isinstance(totals, Totals):
        totals = risk.summed(risk.aligned(totals))
    return _linear(totals, spec)


def daily(spec: ScoreSpec) -> bool:
    """Does this preset score day by day?"""
    return spec.preset is not Preset.LINEAR


def series_of(spec: ScoreSpec) -> frozenset[str]:
    """Names of all counters, units of exposure and levels that this score reads."""
    found = {HOURS, risk.MILES} | ({spec.target} if spec.target else set())
    for factor in risk.factors_of(spec):
        found |= {factor.metric, unit_of(factor.per)[1]}
    return frozenset(found)


def _by_risk(days: Sequence[Totals], spec: ScoreSpec) -> Scores:
    days = risk.aligned(days)
    devices = days[0].devices if days else []
    names = _names(risk.factors_of(spec))
    found = risk.score(days, spec, names)
    hours = np.zeros(len(devices))
    for day in days:
        hours += day.exposure.get(HOURS, 0.0)
    enough = (hours >= spec.min_exposure) & (hours > 0)
    return Scores(
        spec=spec,
        devices=devices,
        value=np.where(enough, found.value, np.nan),
        exposure_hours=hours,
        parts=found.parts,
        x=found.x,
        multipliers=found.multipliers,
        note=found.note,
    )


def _linear(totals: Totals, spec: ScoreSpec) -> Scores:
    """O(devices × factors), in blocks."""
    n = len(totals.devices)
    names = _names(spec.factors)
    value = np.full(n, 100.0)
    hours = totals.exposure.get(HOURS, np.zeros(n))
    parts = {name: np.empty(n) for name in names}
    x = {name: np.empty(n) for name in names}
    levels = [_level(totals, factor.metric) for factor in spec.factors]
    for first in range(0, n, _BLOCK):
        block = slice(first, first + _BLOCK)
        for name, factor, level in zip(names, spec.factors, levels, strict=True):
            seen = _rate(totals, factor, block) if level is None else level[block]
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


def placed(scores: Scores) -> dict[str, tuple[float | None, int]]:
    """Each device's score, None where it has none, and its band: what a draw reads."""
    values = [None if value != value else value for value in scores.value.tolist()]
    return dict(zip(scores.devices, zip(values, bands(scores).tolist(), strict=True), strict=True))


def _level(totals: Totals, metric: str) -> Floats | None:
    """The metric as a level; None where it counts events. What more devices report it as, it is:
    one that gives another's name to something else changes its own score, and not what the factor
    means for the fleet."""
    level, counts = totals.levels.get(metric), totals.counters.get(metric)
    if level is None or counts is None:
        return level
    return level if np.count_nonzero(~np.isnan(level)) > np.count_nonzero(counts) else None


def _rate(totals: Totals, factor: Factor, block: slice) -> Floats:
    """Events for each unit of exposure; NaN where there was none."""
    counts = totals.counters.get(factor.metric)
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


def _sentence(
    value: float | None, hours: float, parts: Sequence[Part], spec: ScoreSpec, note: str
) -> str:
    if hours < spec.min_exposure or hours == 0:
        return f"unscored: {hours:.1f} device hours of at least {spec.min_exposure:g}"
    unknown = [part.metric for part in parts if part.x is None]
    if value is None:
        return f"unscored: {note or 'nothing known of ' + ', '.join(unknown)}"
    linear = spec.preset is Preset.LINEAR
    lost = [
        f"{part.penalty:.1f} for {part.metric} ({_how(part, linear)})"
        for part in parts
        if part.penalty and part.penalty >= 0.05 and part.x is not None
    ]
    shown = f"{value:.1f} = 100 − " + " − ".join(lost) if lost else f"{value:.1f}: no penalty"
    return shown if linear else f"{shown}; {_means(spec)}" + (f"; {note}" if note else "")


def _how(part: Part, linear: bool) -> str:
    if linear:
        return f"{part.x:.3g} per {part.per}; good {part.good:g}, bad {part.bad:g}"
    cap = f", counts up to {part.cap:g}" if part.cap is not None else ""
    return f"{part.x:.3g} per {part.per}{cap}; × {part.multiplier or 1.0:.4g} of the risk for each"


def _means(spec: ScoreSpec) -> str:
    if spec.preset is Preset.TESLA_2021:
        return "mean of the days, weighted by exposure: 115.38 − 22.53 × predicted collisions"
    return "mean of the days, weighted by exposure: 25 points for each e-fold of the fleet's best"
