"""K2: the first event of each device in a wave, exposed against control at the same moments.

Per tick and stratum: d1, d0 = first events, y1, y0 = online devices at risk, w = y1/(y1 + y0),

    ℓ(r) += d1 log r − (d1 + d0) log(1 + w (r − 1))

Valid under the randomisation null whatever the heterogeneity, bursts or common shocks: the unit is
the device, and only the order of first events counts. With no control at risk w = 1: the curve
stays flat and says nothing.

K2' judges an absolute budget without a control: ℓ(l) = s log l − l·hours for s first events in
`hours` of exposure at risk (Poisson), on a grid of l ÷ budget.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from telemetry.evidence import curves
from telemetry.evidence.curves import Array
from telemetry.policy import Engine

Tick = tuple[float, float, float, float]  # d1, d0, y1, y0
_FEW = 16  # ticks that cost less to add up than to sort


def flat(engine: Engine) -> Array:
    """The curve of no event at all."""
    return np.zeros_like(curves.ratio_grid(engine))


def curve(engine: Engine, ticks: Iterable[Tick] | npt.NDArray[np.generic]) -> Array:
    """ℓ on `ratio_grid`; shape (ratio_points,). Zero without events; NaN for impossible counts.

    `ticks`: rows of d1, d0, y1, y0, or an array of shape (n, 4).
    """
    rows = ticks if isinstance(ticks, np.ndarray) else list(ticks)
    table = np.array(rows, dtype=np.float64).reshape(-1, 4)
    if table.shape[0] == 0:
        return flat(engine)
    if not _possible(table):
        return np.full_like(curves.ratio_grid(engine), math.nan)
    grid = curves.ratio_grid(engine)
    d1, d0, y1, y0 = table.T
    w = np.divide(y1, y1 + y0, out=np.zeros_like(y1), where=(y1 + y0) > 0)
    shares, both = w, d1 + d0
    if w.size > _FEW:  # the same risk-set shares are gathered first: a fleet's ticks repeat them
        shares, which = np.unique(w, return_inverse=True)
        gathering = np.bincount(which.reshape(-1), weights=both, minlength=shares.size)
        both = gathering.astype(np.float64)
    gathered = np.log1p(np.outer(shares, grid - 1))
    result: Array = d1.sum() * np.log(grid) - both @ gathered
    return result


def turned(engine: Engine, ell: Array) -> Array:
    """The curve with the arms in each other's place: ℓ at 1/r, where fewer events are the harm."""
    log = np.log(curves.ratio_grid(engine))
    result: Array = np.interp(-log, log, ell)
    return result


def harm(engine: Engine, ell: Array) -> float:
    """E against "ratio ≤ 1"."""
    grid = curves.ratio_grid(engine)
    return curves.harm(grid, ell, at(grid, ell, 1.0), 1.0, engine.ratio_prior)


def safe(engine: Engine, ell: Array, margin: float) -> float:
    """F against "ratio ≥ margin": a good release lies around 1."""
    grid = curves.ratio_grid(engine)
    return curves.safe(grid, ell, at(grid, ell, margin), margin, _around_one(engine))


def band(engine: Engine, ell: Array) -> tuple[float, float]:
    return curves.band(curves.ratio_grid(engine), ell, prior=_around_one(engine))


@lru_cache(maxsize=64)
def _around_one(engine: Engine) -> Array:
    grid = curves.ratio_grid(engine)
    result: Array = np.exp(-0.5 * (np.log(grid) / engine.ratio_prior) ** 2)
    return result


def at(grid: Array, ell: Array, ratio: float) -> float:
    """ℓ at a ratio off the grid, interpolated in log r (the curve is smooth on its step)."""
    return float(np.interp(math.log(ratio), np.log(grid), ell))


def budget_harm(engine: Engine, events: float, hours: float, budget: float) -> float:
    """K2' E against "at most `budget` per unit of exposure"."""
    ell = budget_curve(engine, events, hours, budget)
    grid = curves.ratio_grid(engine)
    return curves.harm(grid, ell, _poisson(1.0, events, hours * budget), 1.0, engine.ratio_prior)


def budget_safe(engine: Engine, events: float, hours: float, budget: float) -> float:
    """K2' F against "at least `budget` per unit of exposure". No event over enough hours passes."""
    ell = budget_curve(engine, events, hours, budget)
    grid = curves.ratio_grid(engine)
    at_budget = _poisson(1.0, events, hours * budget)
    return curves.safe(grid, ell, at_budget, 1.0, curves.flat_in_share(grid))


def budget_curve(engine: Engine, events: float, hours: float, budget: float) -> Array:
    """ℓ of (rate ÷ budget) on `ratio_grid`."""
    grid = curves.ratio_grid(engine)
    good = math.isfinite(events) and math.isfinite(hours) and events >= 0 and hours >= 0
    if not good or not budget > 0:
        return np.full_like(grid, math.nan)
    result: Array = events * np.log(grid) - grid * (hours * budget)
    return result


@lru_cache(maxsize=4096)
def hours_needed(engine: Engine, budget: float, events: int = 0) -> float:
    """Exposure with `events` first events that refutes the budget."""
    low, high = 0.0, max(1.0, float(events)) / budget
    while budget_safe(engine, events, high, budget) < 1 / engine.beta:
        low, high = high, high * 2
    for _ in range(40):
        middle = (low + high) / 2
        if budget_safe(engine, events, middle, budget) >= 1 / engine.beta:
            high = middle
        else:
            low = middle
    return high


@lru_cache(maxsize=4096)
def events_needed(engine: Engine, margin: float, share: float) -> int:
    """First events in both arms, at no harm, that refute the ratio; `share` = exposed ÷ all."""
    return _events_needed(engine, margin, round(share, 2))


@lru_cache(maxsize=4096)
def _events_needed(engine: Engine, margin: float, share: float) -> int:

    def proof(total: int) -> float:
        exposed = total * share
        many = 1e6 * total
        tick = (exposed, total - exposed, many * share, many * (1 - share))
        return safe(engine, curve(engine, [tick]), margin)

    total = 1
    while proof(total) < 1 / engine.beta and total < 100_000:
        total += max(1, total // 50)
    return total


def _poisson(rate: float, events: float, expected: float) -> float:
    return events * math.log(rate) - rate * expected


def _possible(table: Array) -> bool:
    if not np.isfinite(table).all() or (table < 0).any():
        return False
    d1, d0, y1, y0 = table.T
    return bool(((d1 <= y1) & (d0 <= y0)).all())
