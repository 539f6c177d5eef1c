"""Harm curves: the log-likelihood of the data at every harm on a fixed grid, and what it says.

Decides how a curve becomes evidence; not what counts (`ledger`) nor what follows (`gate`).

    rollback evidence  E = Σ_{θ>θ0} π(θ) exp(ℓ(θ) − ℓ(θ0))      H0: no harm
    safe evidence      F = Σ_{θ<M}  π(θ) exp(ℓ(θ) − ℓ(M))       H0: harm ≥ margin M
    95 % band          {θ : log Σ_j π_j exp(ℓ_j) − ℓ(θ) < log 20}

Curves of disjoint data add: over ticks, strata and shards. E and F are e-processes (Ville: under
H0 the chance that they ever reach 1/α is at most α), so they may be looked at after each report.
Sources: Shafer et al. 2011; Grünwald, de Heide, Koolen 2024; ter Schure et al. 2024 (log-rank).
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from telemetry.policy import Engine

Array = npt.NDArray[np.float64]

CAP = 1e12  # evidence is shown and summed; beyond this it says nothing more
_LOG_CAP = math.log(CAP)


def share_grid(engine: Engine) -> Array:
    """Shares of devices, log-spaced; shape (share_points,)."""
    return _log_spaced(engine.share_low, engine.share_high, engine.share_points)


def ratio_grid(engine: Engine) -> Array:
    """Ratios exposed ÷ control, log-spaced; shape (ratio_points,). 1 is the middle by default."""
    return _log_spaced(engine.ratio_low, engine.ratio_high, engine.ratio_points)


@lru_cache(maxsize=64)
def _spacing(low: float, high: float, points: int) -> Array:
    return np.gradient(_log_spaced(low, high, points))


@lru_cache(maxsize=64)
def _log_spaced(low: float, high: float, points: int) -> Array:
    grid = np.exp(np.linspace(math.log(low), math.log(high), points))
    grid.setflags(write=False)
    return grid


def harm(grid: Array, curve: Array, at_null: float, null: float, scale: float) -> float:
    """E against "θ ≤ null": half-normal prior in log(θ/null) on θ > null; 1.0 without data."""
    above = grid > null * (1 + 1e-12)
    if not above.any():
        return 1.0
    prior = np.exp(-0.5 * (np.log(grid[above] / null) / scale) ** 2)
    return _mixture(prior, curve[above] - at_null)


def safe(grid: Array, curve: Array, at_margin: float, margin: float, prior: Array) -> float:
    """F against "θ ≥ margin": `prior` (unnormalised, on the whole grid) on θ < margin."""
    below = grid < margin * (1 - 1e-12)
    if not below.any():
        return 1.0
    return _mixture(prior[below], curve[below] - at_margin)


def flat_in_share(grid: Array) -> Array:
    """The uniform prior in p, as weights of a log-spaced grid."""
    return _spacing(float(grid[0]), float(grid[-1]), grid.size)


def flat_in_log(grid: Array) -> Array:
    return np.ones_like(grid)


def band(
    grid: Array, curve: Array, level: float = 0.05, prior: Array | None = None
) -> tuple[float, float]:
    """Always-valid (1 − level) band: the grid values that the data do not contradict."""
    if not np.isfinite(curve).all():
        return float(grid[0]), float(grid[-1])
    mixed = _log_mean_exp(curve, flat_in_log(grid) if prior is None else prior)
    kept = grid[mixed - curve < math.log(1 / level)]
    if kept.size == 0:  # a curve narrower than the grid's step: its peak
        peak = float(grid[int(np.argmax(curve))])
        return peak, peak
    return float(kept[0]), float(kept[-1])


def peak(grid: Array, curve: Array) -> float:
    """The most plausible harm."""
    return float(grid[int(np.argmax(curve))])


def average(values: list[float]) -> float:
    """The mean of e-values is an e-value under any dependence (Vovk & Wang 2021)."""
    return math.fsum(values) / len(values) if values else 1.0


def bounded(log_evidence: float) -> float:
    """exp, capped; NaN stays NaN and passes no gate."""
    if math.isnan(log_evidence):
        return math.nan
    return math.exp(min(log_evidence, _LOG_CAP))


def _mixture(prior: Array, log_ratio: Array) -> float:
    total = float(prior.sum())
    if not total > 0 or np.isnan(log_ratio).any():
        return math.nan
    top = float(log_ratio.max())
    if not math.isfinite(top):
        return 0.0 if top < 0 else math.nan
    inner = float((prior * np.exp(log_ratio - top)).sum()) / total
    return bounded(math.log(inner) + top) if inner > 0 else 0.0


def _log_mean_exp(curve: Array, prior: Array) -> float:
    top = float(curve.max())
    return top + math.log(float((prior * np.exp(curve - top)).sum() / prior.sum()))
