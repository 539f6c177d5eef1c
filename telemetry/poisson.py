"""Poisson regression of a fleet's own events on its factors: how much each multiplies the risk.

Pure numpy. Minimises the penalised deviance by iteratively reweighted least squares (Newton with
halved steps; McCullagh & Nelder 1989, ch. 6), offset ln(exposure):

    ln E[events_i] = ln exposure_i + β₀ + Σ_j β_j z_ij,   penalty ½ λ Σ β_j²

z are the factors brought to mean 0 and deviation 1, cut at 5 deviations. The penalty (λ = 1 event's
worth) keeps a factor that separates the eventful from the others finite. The result is ln m_j per
one unit of x_j. What cannot be fitted says so in words; nothing is raised for bad data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

FEWEST_EVENTS = 10
FEWEST_DEVICES = 20
RIDGE = 1.0
_CUT = 5.0
_LARGEST = 1e100  # of a factor: its square is still a number
_TURNS = 100
_STEEPEST = 30.0  # |ln rate| that is still a rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    log_multipliers: Floats | None  # shape (k,), per unit of x; None: not fitted, see `note`
    devices: int = 0  # that were used
    events: float = 0.0
    note: str = ""


def fit(
    x: Floats, events: Floats, exposure: Floats, names: Sequence[str], ridge: float = RIDGE
) -> Fitted:
    """x: (n, k), NaN unknown; events, exposure: (n,). Devices without exposure are left out."""
    use = np.isfinite(x).all(axis=1) & np.isfinite(events) & np.isfinite(exposure)
    use &= (exposure > 0) & (events >= 0)
    x, y, hours = np.clip(x[use], -_LARGEST, _LARGEST), events[use], exposure[use]
    n, k = x.shape
    many = float(y.sum())
    if k == 0:
        return Fitted(log_multipliers=None, note="no factors are declared: there is nothing to fit")
    if n < max(FEWEST_DEVICES, 3 * k):
        needed = max(FEWEST_DEVICES, 3 * k)
        note = f"{n} devices have exposure and all factors, {needed} are needed to fit {k} factors"
        return Fitted(log_multipliers=None, devices=n, events=many, note=note)
    if many < FEWEST_EVENTS:
        note = f"{many:g} events in {n} devices, {FEWEST_EVENTS} are needed to fit multipliers"
        return Fitted(log_multipliers=None, devices=n, events=many, note=note)
    centre, width = x.mean(axis=0), x.std(axis=0)
    varies = width > 1e-9 * np.maximum(1.0, np.abs(centre))
    scale = np.where(varies, width, 1.0)
    z = np.where(varies, np.clip((x - centre) / scale, -_CUT, _CUT), 0.0)
    beta = _irls(z, y, np.log(hours), ridge)
    if beta is None:
        note = "the regression did not settle: declare multipliers with `preset: pif`"
        return Fitted(log_multipliers=None, devices=n, events=many, note=note)
    still = [name for name, moves in zip(names, varies, strict=True) if not moves]
    return Fitted(
        log_multipliers=np.where(varies, beta[1:] / scale, 0.0),
        devices=n,
        events=many,
        note=f"the same on every device, without weight: {', '.join(still)}" if still else "",
    )


def _irls(z: Floats, y: Floats, offset: Floats, ridge: float) -> Floats | None:
    design = np.column_stack([np.ones(len(y)), z])
    penalty = np.full(design.shape[1], ridge)
    penalty[0] = 0.0
    beta = np.zeros(design.shape[1])
    beta[0] = math.log(float(y.sum()) / float(np.exp(offset).sum()))
    worth = _worth(design, y, offset, penalty, beta)
    for _ in range(_TURNS):
        mean = np.exp(np.clip(design @ beta + offset, -_STEEPEST, _STEEPEST))
        slope = design.T @ (y - mean) - penalty * beta
        bend = (design * mean[:, None]).T @ design + np.diag(penalty)
        try:
            step = np.linalg.solve(bend, slope)
        except np.linalg.LinAlgError:
            return None
        size, better = 1.0, -math.inf
        while size > 1e-6:
            better = _worth(design, y, offset, penalty, beta + size * step)
            if better >= worth - 1e-12 * abs(worth):
                break
            size /= 2
        else:
            return beta
        beta = beta + size * step
        if not np.isfinite(beta).all():
            return None
        if abs(better - worth) <= 1e-10 * (abs(worth) + 1):
            return beta
        worth = better
    return None


def _worth(design: Floats, y: Floats, offset: Floats, penalty: Floats, beta: Floats) -> float:
    """Penalised log-likelihood, up to a constant."""
    eta = np.clip(design @ beta + offset, -_STEEPEST, _STEEPEST)
    return float((y * eta - np.exp(eta)).sum() - 0.5 * (penalty * beta**2).sum())
