"""Decides the way back of a rejected rollout: who is back, who has nowhere to go, when it is over.

Pure. Rules, in order:

1. A member is back when its device's newest word is younger than our order back, and names nothing
   that is rejected.
2. One whose order could not lead anywhere else ran nothing before: it waits for the fix-forward.
3. It is over when nobody who can be reached, and has somewhere to go, is still away. The others go
   back at their next contact, whenever that is. It is over too when its hold is lifted: who is not
   back yet has nothing to leave any more.
4. `pace: steps`: the members of a step that run it go back when nobody of the steps before, who can
   be reached, is still away. Who does not run it yet never waits: it must not start.
5. A way back can fail as well. Where `abortFailed` devices did not come back, those that run it and
   have not begun to leave stay as they are, and a person is asked: `resume` goes on. So does the
   return of those that were missed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from controller.rollout import withholding
from controller.rollout.follow import unheard
from controller.rollout.model import (
    ActiveHold,
    Arm,
    Member,
    MemberState,
    Order,
    Rollout,
    RolloutState,
)
from controller.rollout.waves import Pinned
from controller.rollout.world import Action, Change, Decision, Put, World
from device_agent.protocol import Kind, Reason, State
from telemetry.report import DeviceRow

if TYPE_CHECKING:
    from controller.rollout.muster import Muster

NEVER_TOLD = frozenset({MemberState.DRAWN, MemberState.LEFT})
FROZEN = "; FROZEN — "  # what a sentence says from there on ends with the freeze
_FAILED = frozenset({State.FAILED, State.STUCK, State.ROLLED_BACK})
_OVER = frozenset({State.FAILED, State.ROLLED_BACK, State.REJECTED})
_LEAVING = frozenset({State.INSTALLING, State.INSTALLED, State.ACTIVATING, State.ROLLING_BACK})
# These say something about a network or an order, nothing about the way back.
_NOT_THE_WAY = frozenset(
    {
        Reason.ORDERED,
        Reason.DOWNLOAD_FAILED,
        Reason.LOWER_GENERATION,
        Reason.CONFLICTING_GENERATION,
        Reason.EXPIRED,
        Reason.LINK_LOST,
    }
)


def going_back(world: World, rollout: Rollout, muster: Muster, now: float) -> Iterator[Action]:
    """The next actions of a rollout that goes back."""
    members = world.members.get(rollout.id, {})
    hold = rejecting(world, rollout)
    if muster.moving:
        changed = (came_back(world, rollout, hold, members[d], now) for d in sorted(muster.moving))
        yield Put(rollout=rollout.id, members=tuple(changed))
        return
    way = _count(muster)
    if hold is None:
        yield from _over(world, rollout, hold, way, now)
        return
    if frozen(rollout):
        if way.lost < rollout.flags["frozen"]:
            yield from _thaw(rollout, now)
        return
    limit = world.pinned[rollout.id].rollout.rollback.abort_failed
    if limit and way.lost >= limit + _forgiven(rollout) and way.left:
        yield from _freeze(rollout, hold, way, limit, now)
        return
    step = rollout.flags.get("back_step")
    if step is not None and way.near and min(way.near) > step:
        yield from _next_step(rollout, min(way.near), now)
    elif not way.near:
        yield from _over(world, rollout, hold, way, now)


class _Way(NamedTuple):
    """How far the devices are on their way back."""

    told: int
    away: int  # not back, and with somewhere to go
    bound: int  # without
    lost: int  # of those that are away: tried, and did not come back
    near: frozenset[int]  # steps with somebody within reach who is away

    @property
    def left(self) -> int:
        return self.away - self.lost


def _count(muster: Muster) -> _Way:
    counted: Counter[str] = Counter()
    near: set[int] = set()
    for alike, n in muster.groups.items():
        if alike.arm is Arm.CONTROL or alike.state in NEVER_TOLD:
            continue
        counted["told"] += n
        if alike.state is MemberState.BACK:
            continue
        counted["bound" if alike.bound else "away"] += n
        if alike.lost and not alike.bound:
            counted["lost"] += n
        if alike.near and not alike.bound:
            near.add(alike.step)
    return _Way(
        told=counted["told"],
        away=counted["away"],
        bound=counted["bound"],
        lost=counted["lost"],
        near=frozenset(near),
    )


def first_step(pinned: Pinned, members: Mapping[str, Member]) -> int | None:
    """The step that goes back first, where the way back goes by steps."""
    if pinned.rollout.rollback.pace != "steps":
        return None
    steps = [
        member.step
        for member in members.values()
        if member.arm is not Arm.CONTROL and member.state not in NEVER_TOLD
    ]
    return min(steps, default=None)


def frozen(rollout: Rollout) -> bool:
    return rollout.state is RolloutState.ROLLING_BACK and bool(rollout.flags.get("frozen"))


def stays(rollout: Rollout, member: Member) -> bool:
    """Does this member, if it runs what is rejected, keep it for now?"""
    if rollout.state is not RolloutState.ROLLING_BACK or member.state is MemberState.BACK:
        return False
    step = rollout.flags.get("back_step")
    return frozen(rollout) or (step is not None and member.step > step)


def begun(row: DeviceRow | None, order: Order | None) -> bool:
    """Has the device begun to carry out this order back?"""
    if row is None or order is None or order.kind != Kind.ROLLBACK:
        return False
    # By the attempt: what was tried once stays tried when the order is issued again.
    return row.attempt == order.attempt and (row.state in _LEAVING or row.state in _FAILED)


def failed_forward(row: DeviceRow | None, order: Order | None) -> bool:
    """Is this order over for the device, without success? It runs what it fell back to."""
    if row is None or order is None or order.kind != Kind.INSTALL:
        return False
    if (row.term, row.generation) != (order.term, order.generation):
        return False
    return row.state in _OVER and row.reason != Reason.ORDERED


def failed_back(
    row: DeviceRow | None, order: Order | None, *, hearing: float, patience: float, now: float
) -> bool:
    """Did it try to go back, and did not come back?"""
    if row is None or not begun(row, order):
        return False
    if row.state in _FAILED:
        return row.reason not in _NOT_THE_WAY
    return unheard(row, hearing, now) > patience


def _freeze(
    rollout: Rollout, hold: ActiveHold | None, way: _Way, limit: int, now: float
) -> Iterator[Action]:
    sentence = (
        f"{rollout.sentence}{FROZEN}{way.lost} devices failed to come back, abortFailed of the way "
        f"back is {limit}: {way.left} others stay as they are until `resume`"
    )
    flags = {**rollout.flags, "frozen": limit + _forgiven(rollout), "lost": way.lost}
    yield Change(
        rollout=replace(
            rollout,
            sentence=sentence,
            revision=rollout.revision + 1,
            updated_at=now,
            flags=flags,
        )
    )
    yield Decision(
        rollout=rollout.id,
        kind="state",
        verdict="Frozen",
        sentence=sentence,
        inputs={
            "failed": way.lost,
            "limit": limit,
            "staying": way.left,
            "hold": hold.id if hold else None,
        },
    )


def thawed(rollout: Rollout, actor: str, because: str, now: float) -> Rollout:
    """A person lets the way back go on; who failed until now is forgiven."""
    before = rollout.sentence.partition(FROZEN)[0]
    return replace(
        rollout,
        sentence=f"{before}; RESUMED by {actor}{because}",
        revision=rollout.revision + 1,
        updated_at=now,
        flags={**rollout.flags, "frozen": 0, "forgiven": int(rollout.flags.get("lost", 0))},
    )


def _forgiven(rollout: Rollout) -> int:
    """Failures of the way back that a person knew of when it was resumed."""
    return int(rollout.flags.get("forgiven", 0))


def _thaw(rollout: Rollout, now: float) -> Iterator[Action]:
    sentence = f"{rollout.sentence.partition(FROZEN)[0]}; those that were missed are back"
    yield Change(
        rollout=replace(
            rollout,
            sentence=sentence,
            revision=rollout.revision + 1,
            updated_at=now,
            flags={**rollout.flags, "frozen": 0},
        )
    )
    yield Decision(rollout=rollout.id, kind="state", verdict="RollingBack", sentence=sentence)


def _next_step(rollout: Rollout, step: int, now: float) -> Iterator[Action]:
    flags = {**rollout.flags, "back_step": step}
    yield Change(rollout=replace(rollout, flags=flags, updated_at=now))
    yield Decision(
        rollout=rollout.id,
        kind="state",
        verdict="RollingBack",
        sentence=f"{rollout.sentence}; now the devices of step {step + 1}",
        inputs={"step": step},
    )


def _over(
    world: World, rollout: Rollout, hold: ActiveHold | None, way: _Way, now: float
) -> Iterator[Action]:
    away, bound = way.away, way.bound
    n = way.told - away - bound
    sentence = rollout.sentence.replace("ROLLING BACK", "ROLLED BACK")
    sentence = sentence.replace("devices go back to what each ran before", "devices were told it")
    sentence += f"; {n} are back"
    if away:
        where = "not reached yet: each goes back at its next contact"
        sentence += f", {away} {where if hold else 'not: the hold is lifted'}"
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
    if order is None or any(told.digest in rejected for told in order.components.values()):
        return True
    # What it was told last is rejected by another hold, and nothing came in its place.
    others = (one for one in world.holds if one.whole and one.fleet == rollout.fleet)
    return withholding.rejected(order, world.seen.get(device), others)


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
