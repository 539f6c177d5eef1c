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

from collections.abc import Iterable, Iterator

from controller.rollout import drawing, judging, telling
from controller.rollout.follow import follow
from controller.rollout.model import (
    ADMITTING,
    Member,
    Rollout,
    RolloutState,
)
from controller.rollout.standing import patience
from controller.rollout.world import Action, Put, World


def advance(world: World, rollout: Rollout, now: float) -> Iterator[Action]:
    """The next actions of an active rollout."""
    pinned = world.pinned[rollout.id]
    members = world.members.get(rollout.id, {})
    followed = list(_followed(world, rollout, members.values(), now))
    if followed:
        yield Put(rollout=rollout.id, members=tuple(followed))
        return
    wave = pinned.waves[rollout.step]
    if rollout.flags.get("drawn") != rollout.step:
        if rollout.state is not RolloutState.PAUSED:
            yield from drawing.draw_step(world, rollout, pinned, wave, now)
        return
    if rollout.state in ADMITTING:
        told = list(telling.told(world, rollout, pinned, wave, now))
        if told:
            yield Put(rollout=rollout.id, members=tuple(told))
            return
    yield from judging.judge_step(world, rollout, pinned, wave, now)


def _followed(
    world: World, rollout: Rollout, members: Iterable[Member], now: float
) -> Iterator[Member]:
    limit = patience(world, rollout)
    for member in members:
        after = follow(
            member,
            rollout,
            world.devices.get(member.device),
            world.seen.get(member.device),
            hearing=world.hearing,
            patience=limit,
            deaf=world.deaf,
            now=now,
        )
        if after is not member:
            yield after
