"""Scores by predicted risk: the presets `pif`, `tesla-2021` and `regression`.

Pure. All three share one form. A device's day has the predicted incident frequency

    PIF = PIF₀ Π_j m_j^min(x_j, cap_j)

with one multiplier per factor: declared (`pif`), published (`tesla-2021`), or fitted to the fleet's
own events (`regression`). The score of a day is

    pif, regression   clip(100 − 25 ln(PIF / p5), 0, 100), p5 = 5 % quantile of the fleet's days
    tesla-2021        clip(115.382324 − 22.526504 · PCF, 0, 100), PCF₀ = 0.682854

and a device's score is the mean of its days, weighted by exposure (miles for tesla-2021 where they
are reported). Rules:

1. Rates of `pif` and `regression` are shrunk: (N + a)/(H + a/m̄), a = 0.5, m̄ the fleet's rate: a
   day without an event is no proof of a perfect device. Tesla's are taken as they are.
2. The points lost on a day are shared out over the factors by x_j ln m_j, so that a score is always
   100 minus its parts.
3. A day without exposure, or with an unknown factor, does not count; without any day the device is
   unscored. A regression that the data do not carry scores nobody and says why.

Sources: Tesla Safety Score Beta v1 (support page of 2021): constants, caps (101.9 warnings per
1,000 miles, 5.2 %, 13.2 %, 63.2 %), daily scores weighted by miles over up to 30 days.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from telemetry import poisson
from telemetry.policy import Factor, Preset, ScoreSpec, unit_of
from telemetry.report import Totals

Floats = npt.NDArray[np.float64]

SHRINK = 0.5  # pseudo-events of the fleet's own rate
POINTS = 25.0  # lost per factor e of risk
REFERENCE = 0.05  # quantile of the fleet's days that scores 100
HOURS = "device_hour"
MILES = "mile"
TESLA_BASE, TESLA_TOP, TESLA_SLOPE = 0.682854, 115.382324, 22.526504

TESLA = (
    Factor(metric="forward_collision_warning", per="1000mile", multiplier=1.014495, cap=101.9),
    Factor(metric="hard_braking_percent", multiplier=1.127294, cap=5.2),
    Factor(metric="aggressive_turning_percent", multiplier=1.019630, cap=13.2),
    Factor(metric="unsafe_following_percent", multiplier=1.001444, cap=63.2),
    Factor(metric="forced_disengagement", multiplier=1.317958, cap=1.0),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Risk:
    """Arrays of shape (n,) beside the devices; `parts` sum to 100 − value, day by day."""

    value: Floats  # NaN: unscored
    x: Mapping[str, Floats]  # exposure-weighted mean of each factor
    parts: Mapping[str, Floats]  # points lost
    multipliers: Mapping[str, float]
    note: str = ""  # what a person should know of the fit


def factors_of(spec: ScoreSpec) -> tuple[Factor, ...]:
    """The factors in force: Tesla's own where none are declared.

    Declared ones take Tesla's multiplier and cap by their place, under the fleet's own names.
    """
    if spec.preset is not Preset.TESLA_2021:
        return spec.factors
    if not spec.factors:
        return TESLA
    known = {factor.metric: factor for factor in TESLA}
    return tuple(
        replace(
            own,
            multiplier=own.multiplier
            or (known[own.metric].multiplier if own.metric in known else 1.0),
            cap=own.cap or (known[own.metric].cap if own.metric in known else None),
        )
        for own in spec.factors
    )


def score(days: Sequence[Totals], spec: ScoreSpec, names: Sequence[str]) -> Risk:
    """Scores of the devices that every one of `days` lists in the same order."""
    factors = factors_of(spec)
    n = len(days[0].devices) if days else 0
    tesla = spec.preset is Preset.TESLA_2021
    shrink = 0.0 if tesla else SHRINK
    usual = [_usual(days, factor) for factor in factors]
    tables = [
        np.stack([_seen(day, f, m, shrink) for f, m in zip(factors, usual, strict=True)])
        if factors
        else np.zeros((0, n))
        for day in days
    ]
    logs, note = _logs(days, spec, factors, usual)
    if logs is None:
        empty = {name: np.full(n, math.nan) for name in names}
        return Risk(value=np.full(n, math.nan), x=empty, parts=empty, multipliers={}, note=note)
    caps = np.array([math.inf if f.cap is None else f.cap for f in factors])
    shares = [np.clip(table, 0, caps[:, None]) * logs[:, None] for table in tables]
    weights = [_weight(day, tesla) for day in days]
    lost = _lost([share.sum(axis=0) for share in shares], weights, tesla)
    return _mean(names, logs, tables, shares, lost, weights, note)


def _logs(
    days: Sequence[Totals],
    spec: ScoreSpec,
    factors: Sequence[Factor],
    usual: Sequence[float],
) -> tuple[Floats | None, str]:
    """ln m of each factor; None with the reason where a fit is not possible."""
    if spec.preset is not Preset.REGRESSION:
        return np.array([math.log(f.multiplier or 1.0) for f in factors]), ""
    whole = summed(days)
    if not factors:
        return None, "no factors are declared: there is nothing to fit"
    x = np.stack([_seen(whole, f, m, SHRINK) for f, m in zip(factors, usual, strict=True)], axis=1)
    caps = np.array([math.inf if f.cap is None else f.cap for f in factors])
    events = whole.counters.get(spec.target or "")
    if events is None:
        return None, f"no device ever reported {spec.target}: there is nothing to fit to"
    exposure = whole.exposure.get(HOURS, np.zeros(len(whole.devices)))
    fitted = poisson.fit(np.minimum(x, caps), events, exposure, [f.metric for f in factors])
    return fitted.log_multipliers, fitted.note


def _lost(logs: Sequence[Floats], weights: Sequence[Floats], tesla: bool) -> list[Floats]:
    """Points lost on each day; NaN where the day does not count."""
    counted = [np.where(w > 0, log, math.nan) for log, w in zip(logs, weights, strict=True)]
    if tesla:
        return [
            100 - np.clip(TESLA_TOP - TESLA_SLOPE * TESLA_BASE * np.exp(log), 0, 100)
            for log in counted
        ]
    known = np.concatenate(counted) if counted else np.zeros(0)
    known = known[np.isfinite(known)]
    best = float(np.quantile(known, REFERENCE)) if known.size else 0.0
    return [np.clip(POINTS * (log - best), 0, 100) for log in counted]


def _mean(
    names: Sequence[str],
    logs: Floats,
    tables: Sequence[Floats],
    shares: Sequence[Floats],
    lost: Sequence[Floats],
    weights: Sequence[Floats],
    note: str,
) -> Risk:
    n = lost[0].size if lost else 0
    whole, gone = np.zeros(n), np.zeros(n)
    x, parts = np.zeros((len(names), n)), np.zeros((len(names), n))
    for table, share, points, weight in zip(tables, shares, lost, weights, strict=True):
        use = np.where(np.isfinite(points), weight, 0.0)
        whole += use
        gone += use * np.nan_to_num(points)
        x += use * np.nan_to_num(table)
        parts += use * np.nan_to_num(points) * _portion(np.nan_to_num(share))
    known = whole > 0

    def mean(sums: Floats) -> Floats:
        result: Floats = np.divide(sums, whole, out=np.full(n, math.nan), where=known)
        return result

    return Risk(
        value=100 - mean(gone),
        x={name: mean(row) for name, row in zip(names, x, strict=True)},
        parts={name: mean(row) for name, row in zip(names, parts, strict=True)},
        multipliers=dict(zip(names, np.exp(logs).tolist(), strict=True)),
        note=note,
    )


def _portion(share: Floats) -> Floats:
    """Each factor's part of what raises the risk; evenly where none does (a reference below 0)."""
    risen = np.maximum(share, 0.0)
    total = risen.sum(axis=0)
    even = np.full_like(risen, 1 / max(risen.shape[0], 1))
    result: Floats = np.divide(risen, total, out=even, where=total > 0)
    return result


def _seen(totals: Totals, factor: Factor, usual: float, shrink: float) -> Floats:
    """x of one factor on one day; NaN where it is unknown."""
    level, counts = totals.levels.get(factor.metric), totals.counters.get(factor.metric)
    if counts is None and level is not None:
        return level
    amount, unit = unit_of(factor.per)
    n = len(totals.devices)
    exposure = totals.exposure.get(unit, np.zeros(n))
    events = np.zeros(n) if counts is None else counts
    if shrink and not usual > 0:
        return np.where(exposure > 0, 0.0, math.nan)  # the fleet never had one
    more = shrink / usual if shrink else 0.0
    out = np.full(n, math.nan)
    np.divide((events + shrink) * amount, exposure + more, out=out, where=exposure > 0)
    return out


def _usual(days: Sequence[Totals], factor: Factor) -> float:
    """The fleet's rate per one unit of exposure."""
    _, unit = unit_of(factor.per)
    events = sum(float(np.nansum(d.counters[factor.metric])) for d in days
                 if factor.metric in d.counters)  # fmt: skip
    exposure = sum(float(np.nansum(d.exposure[unit])) for d in days if unit in d.exposure)
    return events / exposure if exposure > 0 else 0.0


def _weight(day: Totals, tesla: bool) -> Floats:
    hours = day.exposure.get(HOURS, np.zeros(len(day.devices)))
    miles = day.exposure.get(MILES)
    return np.nan_to_num(miles if tesla and miles is not None else hours)


def aligned(days: Sequence[Totals]) -> list[Totals]:
    """The same days, each listing every device of any of them, in one order."""
    devices = sorted({name for day in days for name in day.devices})
    place = {name: i for i, name in enumerate(devices)}
    found = []
    for day in days:
        at = np.array([place[name] for name in day.devices], dtype=np.intp)

        def spread(
            columns: Mapping[str, Floats], empty: float, at: npt.NDArray[np.intp] = at
        ) -> dict[str, Floats]:
            wide = {}
            for name, column in columns.items():
                wide[name] = np.full(len(devices), empty)
                wide[name][at] = column
            return wide

        found.append(
            Totals(
                devices=devices,
                counters=spread(day.counters, 0.0),
                exposure=spread(day.exposure, 0.0),
                levels=spread(day.levels, math.nan),
            )
        )
    return found


def summed(days: Sequence[Totals]) -> Totals:
    """Counts and exposures of aligned days added; levels by the mean of the days that have one."""
    n = len(days[0].devices) if days else 0

    def total(columns: Sequence[Mapping[str, Floats]]) -> dict[str, Floats]:
        names = dict.fromkeys(name for each in columns for name in each)
        return {
            name: np.sum([each.get(name, np.zeros(n)) for each in columns], axis=0)
            for name in names
        }

    levels: dict[str, Floats] = {}
    for name in dict.fromkeys(name for day in days for name in day.levels):
        rows = np.stack([day.levels.get(name, np.full(n, math.nan)) for day in days])
        known = np.isfinite(rows).sum(axis=0)
        levels[name] = np.divide(
            np.nansum(rows, axis=0), known, out=np.full(n, math.nan), where=known > 0
        )
    return Totals(
        devices=days[0].devices if days else [],
        counters=total([day.counters for day in days]),
        exposure=total([day.exposure for day in days]),
        levels=levels,
    )
