"""A safety recall: when it is in force, and when its next ramp (`waves.RAMPS`) may begin.

Pure. It skips soak, proof of safety, holdout and windows. It keeps what stops a release (abort,
tripwires, rollback evidence), the devices' own safety, signatures, and the order of its ramp: 10,
100, 1,000, all. The next ramp waits until the one before has decided, and until one device of it at
least has updated; a first ramp is drawn from whom we can reach, so that it says something.
"""

from __future__ import annotations

from controller.manifests.kinds import Rollout
from controller.rollout.gate import Judgement
from controller.rollout.standing import Standing


def declared(rollout: Rollout, now: float) -> bool:
    """Does this manifest declare a recall that is in force? (Admission has seen two people.)"""
    return rollout.urgency is not None and rollout.urgency.recall and rollout.urgency.until > now


def expired(rollout: Rollout, now: float) -> bool:
    urgency = rollout.urgency
    return urgency is not None and urgency.recall and urgency.until <= now


def ends(rollout: Rollout, now: float) -> float | None:
    """When its urgency runs out; None where there is none, or it has."""
    urgency = rollout.urgency
    return urgency.until if urgency is not None and urgency.until > now else None


def passes(seen: Standing, judgement: Judgement, share: float, last: bool) -> bool:
    """May the next ramp begin?"""
    if seen.untold or judgement.numbers.get("page"):
        return False
    near = seen.decided + seen.waiting
    settled = seen.waiting == 0 if last else seen.decided >= share * near
    nobody_there = near == 0 and seen.deferred == 0
    return settled and (seen.updated > 0 or nobody_there)
