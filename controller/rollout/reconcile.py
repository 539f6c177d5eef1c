"""Decides what happens next to every rollout: the heart.

`decide(world, now)` looks at one snapshot and answers the next actions. It is level-triggered: it
asks what *is*, not what happened, so that it may be killed, restarted and asked again. The loop
applies the answer and asks again until nothing is left to say.

Rules, in order of urgency:

1. A hold that rejects a rollout's digest ends it: `stay` → Held, anything else → RollingBack.
   (A person's rollback is a hold; so is one that stands in Git; so is the policy's own.)
2. A rollout that goes back is followed until every reachable device is back.
3. What people asked for: pause > resume > promote; the hold was rule 1.
4. A commit that names another digest opens a rollout; one that names a rejected digest, or the
   same digest again, changes nothing.
5. An active rollout draws the members of its step, tells them within its limits, lets the step
   soak, and asks the gate. Loss of telemetry pauses; it never widens and never rolls back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from controller.rollout import opening, standing, step
from controller.rollout.model import (
    ACTIVE,
    ActiveHold,
    Arm,
    Member,
    MemberState,
    Rollout,
    RolloutState,
)
from controller.rollout.world import Action, Change, Command, Decision, Finish, Put, World

_ENDED_BACK = frozenset({RolloutState.ROLLED_BACK, RolloutState.ROLLING_BACK})
_NEVER_TOLD = frozenset({MemberState.DRAWN, MemberState.LEFT})


def decide(world: World, now: float) -> list[Action]:
    """The next actions; an empty list means that the world is as it should be."""
    actions: list[Action] = []
    for rollout in sorted(world.rollouts.values(), key=lambda r: r.id):
        actions += _one(world, rollout, now)
    actions += _commands(world, now)
    actions += opening.decide(world, now)
    return actions


def _one(world: World, rollout: Rollout, now: float) -> Iterator[Action]:
    hold = rejecting(world, rollout)
    if hold is not None and _ends(rollout, hold):
        yield from _end(world, rollout, hold, now)
    elif rollout.state is RolloutState.ROLLING_BACK:
        yield from _going_back(world, rollout, hold, now)
    elif rollout.state in ACTIVE:
        yield from step.advance(world, rollout, now)


def rejecting(world: World, rollout: Rollout) -> ActiveHold | None:
    """The newest hold in force against this rollout's own digest, of its fleet."""
    found = [
        hold
        for hold in world.holds
        if hold.fleet == rollout.fleet
        and (
            hold.digest == rollout.digest
            or (rollout.active and hold.rejects(rollout.digest, rollout.artifacts))
        )
    ]
    if not found:
        return None
    # The stronger word wins: a rollback is not weakened by a later "stay".
    return max(found, key=lambda hold: (hold.to != "stay", hold.created_at))


def _ends(rollout: Rollout, hold: ActiveHold) -> bool:
    if rollout.state in _ENDED_BACK:
        return False
    if rollout.state is RolloutState.SUPERSEDED and rollout.name != hold.rollout:
        return False
    return hold.to != "stay" or rollout.state is not RolloutState.HELD


def _end(world: World, rollout: Rollout, hold: ActiveHold, now: float) -> Iterator[Action]:
    members = world.members.get(rollout.id, {})
    told = sum(m.arm is not Arm.CONTROL and m.state not in _NEVER_TOLD for m in members.values())
    if hold.to == "stay":
        state, verb = RolloutState.HELD, "HELD"
        after = f"{told} devices stay as they are, none is told any more"
    else:
        state, verb = RolloutState.ROLLING_BACK, "ROLLING BACK"
        after = f"{told} devices go back to what each ran before"
    cause = rollout.flags.get("cause") if hold.id == rollout.flags.get("hold") else None
    sentence = f"{verb} — {cause or hold.reason}; {after}; by {hold.actor}"
    if cause is None:
        sentence += f", commit {rollout.commit[:7]}"
    yield Change(
        rollout=replace(
            rollout,
            state=state,
            sentence=sentence,
            revision=rollout.revision + 1,
            finished_at=now if state is RolloutState.HELD else None,
            updated_at=now,
            flags={**rollout.flags, "hold": hold.id, "ended_at": now},
        )
    )
    yield Decision(
        rollout=rollout.id,
        kind="state",
        verdict=str(state),
        sentence=sentence,
        inputs={"hold": hold.id, "to": hold.to, "actor": hold.actor, "told": told},
    )


def _going_back(
    world: World, rollout: Rollout, hold: ActiveHold | None, now: float
) -> Iterator[Action]:
    members = world.members.get(rollout.id, {})
    changed = [
        back
        for member in members.values()
        if (back := _came_back(world, rollout, hold, member, now)) is not member
    ]
    if changed:
        yield Put(rollout=rollout.id, members=tuple(changed))
        return
    told = [m for m in members.values() if m.arm is not Arm.CONTROL and m.state not in _NEVER_TOLD]
    away = [m for m in told if m.state is not MemberState.BACK]
    patience = standing.patience(world, rollout)
    bound = [m for m in away if _has_nowhere_to_go(world, rollout, hold, m, now)]
    away = [m for m in away if m not in bound]
    if any(standing.reachable(world, m.device, patience, now) for m in away):
        return
    n = len(told) - len(away) - len(bound)
    sentence = rollout.sentence.replace("ROLLING BACK", "ROLLED BACK")
    sentence = sentence.replace("devices go back to what each ran before", "devices were told it")
    sentence += f"; {n} are back"
    if away:
        sentence += f", {len(away)} not reached yet: each goes back at its next contact"
    if bound:
        sentence += f", {len(bound)} ran nothing before and wait for the fix-forward"
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
    yield Decision(
        rollout=rollout.id,
        kind="state",
        verdict=str(RolloutState.ROLLED_BACK),
        sentence=sentence,
        inputs={
            "back": n,
            "unreached": sorted(m.device for m in away)[:1000],
            "nowhere": sorted(m.device for m in bound)[:1000],
        },
    )


def _has_nowhere_to_go(
    world: World, rollout: Rollout, hold: ActiveHold | None, member: Member, now: float
) -> bool:
    """Is there no other set for this device? Known once its order could have been composed."""
    if now <= float(rollout.flags.get("ended_at", now)):
        return False
    rejected = hold.artifacts if hold else frozenset(rollout.artifacts.values())
    order = world.orders.get(member.device)
    return order is None or any(told.digest in rejected for told in order.components.values())


def _came_back(
    world: World, rollout: Rollout, hold: ActiveHold | None, member: Member, now: float
) -> Member:
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


def _commands(world: World, now: float) -> Iterator[Action]:
    taken: set[str] = set()
    for command in world.commands:
        rollout = world.rollouts.get(command.rollout or "")
        if rollout is not None and rollout.id in taken:
            continue  # one a rollout and round: the next one sees what this one did
        taken.add(command.rollout or "")
        yield from _command(command, rollout, now)


def _command(command: Command, rollout: Rollout | None, now: float) -> Iterator[Action]:
    if command.kind in ("rollback", "hold", "lift", "stop"):
        # Their rows are in force since they were recorded; rule 1 does the rest.
        yield Finish(command=command.id, state="done", result="in force")
        return
    if rollout is None:
        yield Finish(command=command.id, state="refused", result="the rollout is gone")
        return
    after = _obey(command, rollout, now)
    if after is None:
        result = f"{command.kind} is not possible while it is {rollout.state}"
        yield Finish(command=command.id, state="refused", result=result)
        return
    yield Change(rollout=after)
    yield Finish(command=command.id, state="done", result=after.sentence)
    yield Decision(
        rollout=rollout.id,
        kind="command",
        verdict=command.kind,
        sentence=after.sentence,
        inputs={"command": command.id, "actor": command.actor, "reason": command.reason},
    )


def _obey(command: Command, rollout: Rollout, now: float) -> Rollout | None:
    because = f" — {command.reason}" if command.reason else ""
    if command.kind == "pause" and rollout.active and rollout.state is not RolloutState.PAUSED:
        return replace(
            rollout,
            state=RolloutState.PAUSED,
            sentence=f"PAUSED by {command.actor}{because}; nobody else is told until `resume`",
            revision=rollout.revision + 1,
            updated_at=now,
            soak_mark=None,
            flags={**rollout.flags, "paused_by": command.actor},
        )
    if command.kind == "resume" and rollout.state in (
        RolloutState.PAUSED,
        RolloutState.INCONCLUSIVE,
    ):
        flags = {k: v for k, v in rollout.flags.items() if k != "paused_by"}
        return replace(
            rollout,
            state=RolloutState.PROGRESSING,
            sentence=f"RESUMED by {command.actor}{because}",
            revision=rollout.revision + 1,
            updated_at=now,
            flags={**flags, "extended_at": rollout.soak, "resumed_at": now},
        )
    if command.kind == "promote" and rollout.active:
        flags = {k: v for k, v in rollout.flags.items() if k != "paused_by"}
        return replace(
            rollout,
            state=RolloutState.PROGRESSING,
            sentence=f"PROMOTED by {command.actor}{because}: step {rollout.step + 1} is passed",
            revision=rollout.revision + 1,
            updated_at=now,
            flags={**flags, "promoted": rollout.step, "promoted_by": command.actor},
        )
    return None
