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
   One that waits for a second person's approval goes on when it has it; a stop never waits.
5. An active rollout draws the members of its step, tells them within its limits, lets the step
   soak, and asks the gate. Loss of telemetry pauses; it never widens and never rolls back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from controller.rollout import approval, opening, recovery, retreat, step
from controller.rollout import muster as musters
from controller.rollout.model import ACTIVE, ActiveHold, Arm, Rollout, RolloutState
from controller.rollout.retreat import NEVER_TOLD, rejecting
from controller.rollout.world import Action, Change, Command, Decision, Finish, World

_ENDED_BACK = frozenset({RolloutState.ROLLED_BACK, RolloutState.ROLLING_BACK})


@dataclass(frozen=True, slots=True, kw_only=True)
class Awake:
    """What may have something to say: what was touched since it was asked last, or is due now.

    Whatever is left out would answer nothing; `controller.rollout.rollcall` knows that.
    """

    rollouts: frozenset[str]
    opening: bool  # the manifests, holds or rollouts changed: may a commit open something?


def decide(world: World, now: float, awake: Awake | None = None) -> list[Action]:
    """The next actions; an empty list means that the world is as it should be.

    `awake` only leaves out what has nothing to say; without it everything is asked, and the members
    of every rollout are counted from the beginning. The answer is the same.
    """
    actions: list[Action] = []
    told: set[str] = set()  # devices told in this turn: one component in flight per device
    for name in sorted(world.rollouts if awake is None else awake.rollouts):
        actions += _one(world, world.rollouts[name], told, now)
    # Whoever was moved in this round is asked by others in the next one: they see it as it was.
    moved = {action.rollout.id for action in actions if isinstance(action, Change)}
    actions += _commands(world, moved, now)
    moved |= {action.rollout.id for action in actions if isinstance(action, Change)}
    if (awake is None or awake.opening) and not world.blind:
        actions += opening.decide(world, now, moved)
    return actions


def next_look(world: World, rollout: Rollout, now: float) -> float:
    """When time alone may change the answer of a rollout that has nothing to say at `now`."""
    return step.next_look(world, rollout, now) if rollout.state in ACTIVE else math.inf


def _one(world: World, rollout: Rollout, told: set[str], now: float) -> Iterator[Action]:
    hold = rejecting(world, rollout)
    if hold is not None and _ends(rollout, hold):
        yield from _end(world, rollout, hold, now)
    elif world.blind:
        return  # who came back, who failed, who soaked: nobody knows
    elif rollout.state is RolloutState.ROLLING_BACK:
        yield from retreat.going_back(world, rollout, musters.of(world, rollout, now), now)
    elif "awaits" in rollout.flags:
        after = approval.granted(world, rollout, now) if rollout.state in ACTIVE else None
        if after is not None:
            yield Change(rollout=after)
            yield Decision(
                rollout=rollout.id, kind="command", verdict="approve", sentence=after.sentence
            )
    elif world.restored and rollout.state in recovery.MOVES:
        yield from recovery.pause(rollout, now)
    elif rollout.state in ACTIVE:
        yield from step.advance(world, rollout, musters.of(world, rollout, now), told, now)


def _ends(rollout: Rollout, hold: ActiveHold) -> bool:
    if rollout.state in _ENDED_BACK:
        return False
    if rollout.state is RolloutState.SUPERSEDED and rollout.name != hold.rollout:
        return False
    return hold.to != "stay" or rollout.state is not RolloutState.HELD


def _end(world: World, rollout: Rollout, hold: ActiveHold, now: float) -> Iterator[Action]:
    members = world.members.get(rollout.id, {})
    told = sum(m.arm is not Arm.CONTROL and m.state not in NEVER_TOLD for m in members.values())
    if hold.to == "stay":
        state, verb = RolloutState.HELD, "HELD"
        after = f"{told} devices stay as they are, none is told any more"
    else:
        state, verb = RolloutState.ROLLING_BACK, "ROLLING BACK"
        after = f"{told} devices go back to what each ran before"
    cause = rollout.flags.get("cause") if hold.id == rollout.flags.get("hold") else None
    why = (cause or hold.reason).removeprefix("ROLLED BACK — ")  # the state is said once
    sentence = f"{verb} — {why}; {after}"
    if f"by {hold.actor}" not in why.replace("`", ""):  # a gate's sentence names its policy
        sentence += f"; by {hold.actor}"
    if cause is None:
        sentence += f", commit {rollout.commit[:7]}"
    step = retreat.first_step(world.pinned[rollout.id], members)
    back = {} if state is RolloutState.HELD or step is None else {"back_step": step}
    yield Change(
        rollout=replace(
            rollout,
            state=state,
            sentence=sentence,
            revision=rollout.revision + 1,
            finished_at=now if state is RolloutState.HELD else None,
            updated_at=now,
            flags={**rollout.flags, **back, "hold": hold.id, "ended_at": now},
        )
    )
    yield Decision(
        rollout=rollout.id,
        kind="state",
        verdict=str(state),
        sentence=sentence,
        inputs={"hold": hold.id, "to": hold.to, "actor": hold.actor, "told": told},
    )


def _commands(world: World, moved: Iterable[str], now: float) -> Iterator[Action]:
    taken = set(moved)
    for command in world.commands:
        rollout = world.rollouts.get(command.rollout or "")
        if rollout is not None and rollout.id in taken:
            continue  # one a rollout and round: the next one sees what this one did
        if rollout is not None:
            taken.add(rollout.id)
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
    if command.kind == "resume" and retreat.frozen(rollout):
        return retreat.thawed(rollout, command.actor, because, now)
    if command.kind == "resume" and rollout.state in (
        RolloutState.PAUSED,
        RolloutState.INCONCLUSIVE,
    ):
        flags = {k: v for k, v in rollout.flags.items() if k != "paused_by"}
        return replace(
            rollout,
            state=RolloutState.PENDING if "awaits" in rollout.flags else RolloutState.PROGRESSING,
            sentence=f"RESUMED by {command.actor}{because}",
            revision=rollout.revision + 1,
            updated_at=now,
            flags={**flags, "extended_at": rollout.soak, "resumed_at": now},
        )
    if command.kind == "promote" and rollout.active and "awaits" not in rollout.flags:
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
