"""Decides who is kept out of a rollout for a while, so that its benefit can be measured at all.

Pure. `holdout: {percent: 5, for: 14d}`: a hash of the rollout's seed and the device decides, before
anything is known of either; no step draws such a device, and what the rollout has proven does not
reach it, until `for` has passed since the opening. They serve as controls all that time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from controller.rollout.cohort import rank
from controller.rollout.model import Rollout, RolloutState
from controller.rollout.waves import Pinned


def chosen(seed: str, device: str, share: float) -> bool:
    """Would this device be held out by a rollout of this seed?"""
    return share > 0 and rank(f"{seed}/holdout", device) < share * 2.0**64


def until(rollout: Rollout, pinned: Pinned) -> float:
    """When the holdout of this rollout ends; −inf without one."""
    rule = pinned.rollout.holdout
    return rollout.opened_at + rule.for_.total_seconds() if rule is not None else -math.inf


def keeps_out(rollout: Rollout, pinned: Pinned, device: str, now: float) -> bool:
    rule = pinned.rollout.holdout
    if rule is None or now >= until(rollout, pinned):
        return False
    return chosen(rollout.seed, device, rule.percent)


def withheld(
    rollouts: Iterable[Rollout], pinned: Mapping[str, Pinned], fleet: str, device: str, now: float
) -> frozenset[str]:
    """Releases that this fleet has proven and that this device still has to do without."""
    return frozenset(
        rollout.release
        for rollout in rollouts
        if rollout.fleet == fleet
        and rollout.state is RolloutState.COMPLETED
        and keeps_out(rollout, pinned[rollout.id], device, now)
    )


def ended(
    rollouts: Iterable[Rollout], pinned: Mapping[str, Pinned], since: float, now: float
) -> frozenset[str]:
    """Fleets of which a holdout ended in (since, now]: their devices get what is proven."""
    return frozenset(
        rollout.fleet for rollout in rollouts if since < until(rollout, pinned[rollout.id]) <= now
    )
