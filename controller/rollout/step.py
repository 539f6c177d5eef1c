"""Decides the life of one step: draw, tell within limits, soak, ask the gate, go on.

Pure. Rules, in order:

1. Every member is followed by its device's last word (`follow`).
2. The members of a step are drawn when it opens and never again. An empty cohort stops the rollout
   (NoMembers) with the reason; it never passes.
3. Members are told within maxConcurrent and maxPerMinute, outside Deny windows, one component in
   flight per device, and only where the release's requirements are met. A device that was never
   heard, or is offline, waits and blocks nobody.
4. Soak is time in which enough of the updated members reported; it starts when enough are decided.
5. The gate judges: roll back at once; widen when soaked, proven and settled; else wait.
6. The last step completes the rollout: every reachable device is decided, the others are listed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from controller.rollout import drawing, holdout, judging, recall, scope, telling
from controller.rollout.follow import follow
from controller.rollout.model import ADMITTING, ActiveHold, Member, Rollout, RolloutState
from controller.rollout.standing import patience
from controller.rollout.world import Action, Put, World

if TYPE_CHECKING:
    from controller.rollout.muster import Muster


def advance(
    world: World, rollout: Rollout, muster: Muster, busy: set[str], now: float
) -> Iterator[Action]:
    """The next actions of an active rollout."""
    pinned = world.pinned[rollout.id]
    if muster.moving:
        yield Put(rollout=rollout.id, members=tuple(_followed(world, rollout, muster, now)))
        return
    wave = pinned.waves[rollout.step]
    if rollout.flags.get("drawn") != rollout.step:
        if rollout.state is not RolloutState.PAUSED:
            yield from drawing.draw_step(world, rollout, pinned, wave, now)
        return
    if rollout.state in ADMITTING:
        told = tuple(telling.told(world, rollout, wave, muster, busy, now))
        if told:
            yield Put(rollout=rollout.id, members=told)
            return
    yield from judging.judge_step(world, rollout, pinned, wave, muster, now)


def next_look(world: World, rollout: Rollout, now: float) -> float:
    """When time alone may change the answer, of a rollout that has nothing to say at `now`."""
    pinned = world.pinned[rollout.id]
    if rollout.flags.get("drawn") != rollout.step:
        free = holdout.until(rollout, pinned)  # whom it keeps out may be the members
        return free if free > now else math.inf
    if rollout.state not in ADMITTING:
        return math.inf
    wave = pinned.waves[rollout.step]
    muster = world.musters[rollout.id]
    moments = [
        judging.soaks_on(rollout, wave),
        judging.deadline(rollout, pinned),
        telling.next_look(wave, muster, now),
        recall.ends(pinned.rollout, now),
    ]
    return min((at for at in moments if at is not None), default=math.inf)


def followed(
    world: World,
    rollout: Rollout,
    member: Member,
    limit: float,
    partial: Sequence[ActiveHold],
    now: float,
) -> Member:
    """The member after its device's last word, or out by a partial hold; the same if unchanged."""
    hold = scope.excluding(world, rollout, member) if partial else None
    if hold is not None:
        return scope.leave(member, hold, now)
    return follow(
        member,
        rollout,
        world.devices.get(member.device),
        world.seen.get(member.device),
        hearing=world.hearing,
        patience=limit,
        deaf=world.deaf,
        now=now,
        order=world.orders.get(member.device),
    )


def _followed(world: World, rollout: Rollout, muster: Muster, now: float) -> Iterator[Member]:
    limit, members = patience(world, rollout), world.members[rollout.id]
    partial = scope.partial(world, rollout)
    for device in sorted(muster.moving):
        yield followed(world, rollout, members[device], limit, partial, now)
