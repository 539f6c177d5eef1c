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

# Which count of early failures spends how much: most faults of a wave of 100 show by the third.
_QUICK = ((2, 0.2), (3, 0.5), (4, 0.15), (5, 0.1), (6, 0.05))


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


@lru_cache(maxsize=4096)
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


def budget(
    engine: Engine, declared: float | None, history: tuple[tuple[int, int], ...], usual: float
) -> float:
    """p0 of a kind of failure. `history`: (failures, started) of earlier releases, newest last.

    A fleet with enough of a past is judged by it: the upper bound of all its releases together, but
    no less than its worst one, since that was accepted too. Without one: what is declared, else
    `usual`. A declared budget is a promise to people: the past may raise it and never lowers it.
    """
    floor = usual if declared is None else declared
    recent = history[-engine.history_releases :]
    started = sum(n for _, n in recent)
    if started < max(engine.history_started, 1):
        # A bound that is wide for want of data is no reason to accept more failures.
        bound = _pooled_bound(engine, recent) if started >= 1 / floor else 0.0
        return max(floor, bound)
    worst = max((s / n for s, n in recent if n >= engine.history_started / 5), default=0.0)
    own = max(engine.history_floor, worst, _pooled_bound(engine, recent))
    return min(0.5, own if declared is None else max(declared, own))


def _pooled_bound(engine: Engine, recent: tuple[tuple[int, int], ...]) -> float:
    failures, started = sum(s for s, _ in recent), sum(n for _, n in recent)
    return upper_bound(failures, started, engine.history_bound) if started else 0.0


@lru_cache(maxsize=4096)
def quick_limits(budget: float, level: float) -> tuple[tuple[int, int], ...]:
    """(k, n): with the share at `budget`, k failures among the first n devices are so rare.

    The chance that *any* of the pairs is ever met is at most `level`, however often one looks: the
    k-th failure comes among the first n_k devices with P(Bin(n_k, p0) ≥ k) ≤ level · share_k, and
    the shares sum to 1 (union bound). Exact at any n; empty where not even k devices in a row fit.
    """
    found = []
    for k, share in _QUICK:
        low, high = k - 1, k
        while 1 - at_most(k - 1, high, budget) <= level * share and high < 1_000_000:
            low, high = high, high * 2
        while high - low > 1:
            middle = (low + high) // 2
            rare = 1 - at_most(k - 1, middle, budget) <= level * share
            low, high = (middle, high) if rare else (low, middle)
        if low >= k:
            found.append((k, low))
    return tuple(found)


def quick(failures: int, started: int, budget: float, level: float) -> tuple[int, int] | None:
    """The pair of `quick_limits` that is met: its indicator ÷ level is an e-value."""
    if not _counts(failures, started) or failures < 2:
        return None
    for k, n in quick_limits(budget, level):
        if failures >= k and started <= n:
            return k, n
    return None


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
