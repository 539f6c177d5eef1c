"""Decides the way back of a rejected rollout: who is back, who has nowhere to go, when it is over.

Pure. Rules, in order:

1. A member is back when its device's newest word is younger than our order back, and names nothing
   that is rejected.
2. One whose order could not lead anywhere else ran nothing before: it waits for the fix-forward.
3. It is over when nobody who can be reached, and has somewhere to go, is still away. The others go
   back at their next contact, whenever that is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from controller.rollout.model import ActiveHold, Arm, Member, MemberState, Rollout, RolloutState
from controller.rollout.world import Action, Change, Decision, Put, World

if TYPE_CHECKING:
    from controller.rollout.muster import Muster

NEVER_TOLD = frozenset({MemberState.DRAWN, MemberState.LEFT})


def going_back(world: World, rollout: Rollout, muster: Muster, now: float) -> Iterator[Action]:
    """The next actions of a rollout that goes back."""
    members = world.members.get(rollout.id, {})
    hold = rejecting(world, rollout)
    if muster.moving:
        changed = (came_back(world, rollout, hold, members[d], now) for d in sorted(muster.moving))
        yield Put(rollout=rollout.id, members=tuple(changed))
        return
    told = away = bound = 0
    for alike, n in muster.groups.items():
        if alike.arm is Arm.CONTROL or alike.state in NEVER_TOLD:
            continue
        told += n
        if alike.state is MemberState.BACK:
            continue
        if alike.bound:
            bound += n
            continue
        if alike.near:
            return
        away += n
    yield from _over(world, rollout, hold, told, away, bound, now)


def _over(
    world: World,
    rollout: Rollout,
    hold: ActiveHold | None,
    told: int,
    away: int,
    bound: int,
    now: float,
) -> Iterator[Action]:
    n = told - away - bound
    sentence = rollout.sentence.replace("ROLLING BACK", "ROLLED BACK")
    sentence = sentence.replace("devices go back to what each ran before", "devices were told it")
    sentence += f"; {n} are back"
    if away:
        sentence += f", {away} not reached yet: each goes back at its next contact"
    if bound:
        sentence += f", {bound} ran nothing before and wait for the fix-forward"
    yield Change(
        rollout=replace(
            rollout,
            state=RolloutState.ROLLED_BACK,
            sentence=sentence,
            revision=rollout.revision + 1,
            finished_at=now,
            updated_at=now,
        )
    )
    out = [
        member
        for member in world.members.get(rollout.id, {}).values()
        if member.arm is not Arm.CONTROL
        and member.state not in NEVER_TOLD
        and member.state is not MemberState.BACK
    ]
    stuck = {m.device for m in out if bound and nowhere_to_go(world, rollout, hold, m.device)}
    yield Decision(
        rollout=rollout.id,
        kind="state",
        verdict=str(RolloutState.ROLLED_BACK),
        sentence=sentence,
        inputs={
            "back": n,
            "unreached": sorted(m.device for m in out if m.device not in stuck)[:1000],
            "nowhere": sorted(stuck)[:1000],
        },
    )


def rejecting(world: World, rollout: Rollout) -> ActiveHold | None:
    """The newest hold in force against this rollout's own digest, of its fleet."""
    found = [
        hold
        for hold in world.holds
        if hold.whole
        and hold.fleet == rollout.fleet
        and (
            hold.digest == rollout.digest
            or (rollout.active and hold.rejects(rollout.digest, rollout.artifacts))
        )
    ]
    if not found:
        return None
    # The stronger word wins: a rollback is not weakened by a later "stay".
    return max(found, key=lambda hold: (hold.to != "stay", hold.created_at))


def nowhere_to_go(world: World, rollout: Rollout, hold: ActiveHold | None, device: str) -> bool:
    """Is there no other set for this device? Not before its order has been composed."""
    if device in world.unordered:
        return False
    rejected = hold.artifacts if hold else frozenset(rollout.artifacts.values())
    order = world.orders.get(device)
    return order is None or any(told.digest in rejected for told in order.components.values())


def came_back(
    world: World, rollout: Rollout, hold: ActiveHold | None, member: Member, now: float
) -> Member:
    """The member after the device's last word; the same object when nothing changed."""
    if member.state in (MemberState.BACK, MemberState.LEFT, MemberState.DRAWN):
        return member
    if member.arm is Arm.CONTROL:
        return member
    device = world.devices.get(member.device)
    if device is None or not device.governed or device.fleet != rollout.fleet:
        return replace(member, state=MemberState.LEFT, left_at=now, updated_at=now)
    row, order = world.seen.get(member.device), world.orders.get(member.device)
    rejected = hold.artifacts if hold else frozenset(rollout.artifacts.values())
    if row is None or any(report.digest in rejected for report in row.components.values()):
        return member
    # Its word must be newer than our order back: before that it may be about to start.
    if order is None or (row.term, row.generation) < (order.term, order.generation):
        return member
    return replace(member, state=MemberState.BACK, reason="", updated_at=now)
