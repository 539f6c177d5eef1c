"""K1: shares of devices that failed, against a budget; no control is needed.

ℓ(p) = s log p + (n − s) log(1 − p) for s failures of n started devices: exact at any n.
Pending devices are the caller's rule: successes for rollback, failures for promotion.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from telemetry.evidence import curves
from telemetry.evidence.curves import Array
from telemetry.policy import Engine


def curve(engine: Engine, failures: float, started: float) -> Array:
    """ℓ on `share_grid`; shape (share_points,)."""
    grid = curves.share_grid(engine)
    if not _counts(failures, started):
        return np.full_like(grid, math.nan)
    return failures * np.log(grid) + (started - failures) * np.log1p(-grid)


def harm(engine: Engine, failures: float, started: float, budget: float) -> float:
    """E against "the share is at most `budget`"; 1.0 before the first device, NaN for nonsense."""
    if not _counts(failures, started) or not 0 < budget < 1:
        return math.nan
    if started == 0:
        return 1.0
    return curves.harm(
        curves.share_grid(engine),
        curve(engine, failures, started),
        _at(budget, failures, started),
        budget,
        engine.share_prior,
    )


def safe(engine: Engine, failures: float, started: float, margin: float) -> float:
    """F against "the share is at least `margin`"."""
    if not _counts(failures, started) or not 0 < margin < 1:
        return math.nan
    if started == 0:
        return 1.0
    grid = curves.share_grid(engine)
    return curves.safe(
        grid,
        curve(engine, failures, started),
        _at(margin, failures, started),
        margin,
        curves.flat_in_share(grid),
    )


def band(engine: Engine, failures: float, started: float) -> tuple[float, float]:
    """Always-valid 95 % band of the share; (0, 1) before the first device."""
    if not _counts(failures, started) or started == 0:
        return 0.0, 1.0
    low, high = curves.band(curves.share_grid(engine), curve(engine, failures, started))
    return (0.0 if failures == 0 else low), high


def upper_bound(failures: int, started: int, level: float) -> float:
    """One-sided exact (Clopper–Pearson) upper bound of a share, by bisection."""
    if started <= 0 or failures >= started:
        return 1.0
    low, high = failures / started, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if at_most(failures, started, middle) > 1 - level:
            low = middle
        else:
            high = middle
    return high


def budget(engine: Engine, declared: float | None, history: tuple[tuple[int, int], ...]) -> float:
    """p0: the declared budget, else the floor, raised to what the last releases really failed."""
    floor = engine.failed_budget if declared is None else declared
    recent = history[-engine.history_releases :]
    started = sum(n for _, n in recent)
    if started == 0:
        return floor
    bound = upper_bound(sum(s for s, _ in recent), started, engine.history_bound)
    # A bound that is wide for want of data is no reason to accept more failures.
    return max(floor, bound) if started >= 1 / floor else floor


@lru_cache(maxsize=4096)
def needed(engine: Engine, margin: float, failures: int = 0) -> int:
    """The smallest number of devices with `failures` failures that refutes the margin."""
    low, high = 1, 1
    while safe(engine, failures, max(high, failures), margin) < 1 / engine.beta:
        low, high = high, high * 2
        if high > 1_000_000:
            return high
    while low < high:
        middle = (low + high) // 2
        if safe(engine, failures, max(middle, failures), margin) >= 1 / engine.beta:
            high = middle
        else:
            low = middle + 1
    return high


def _at(p: float, failures: float, started: float) -> float:
    return failures * math.log(p) + (started - failures) * math.log1p(-p)


def at_most(failures: int, started: int, p: float) -> float:
    """P(X ≤ failures), X ~ Binomial(started, p)."""
    log_choose = [
        math.lgamma(started + 1) - math.lgamma(k + 1) - math.lgamma(started - k + 1)
        for k in range(failures + 1)
    ]
    return math.fsum(
        math.exp(c + k * math.log(p) + (started - k) * math.log1p(-p))
        for k, c in enumerate(log_choose)
    )


def _counts(failures: float, started: float) -> bool:
    return math.isfinite(started) and math.isfinite(failures) and 0 <= failures <= started
