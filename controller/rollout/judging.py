"""Decides what follows from the gate's word: roll back, go on, complete, wait, ask a person.

Pure. Soak is time in which enough of the updated members reported; it starts when enough of the
step is decided. A step widens when it is soaked, proven and settled; the last one completes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from controller.manifests.kinds import OfflineAction, OnFailure, OnInconclusive
from controller.rollout import case as casework
from controller.rollout import recall, telling
from controller.rollout.gate import Judgement, Verdict, judge
from controller.rollout.model import (
    ADMITTING,
    Arm,
    MemberState,
    Proven,
    Rollout,
    RolloutState,
)
from controller.rollout.standing import Standing, deaf, standing
from controller.rollout.waves import DOUBLINGS, Pinned, Wave, doublings, grown
from controller.rollout.world import Action, Change, Decision, Look, Prove, Reject, World

if TYPE_CHECKING:
    from controller.rollout.muster import Muster

BY_POLICY = "policy (UNPROVEN, proceed)"  # who passed a step that `proceed` passed
SOAK_GRAIN = 0.25  # seconds: soak is written no finer than this
LOOKS = 48  # kept of the evidence while a step soaks
COARSEST = 10.0  # seconds: nor coarser, however long the step


def judge_step(
    world: World, rollout: Rollout, pinned: Pinned, wave: Wave, muster: Muster, now: float
) -> Iterator[Action]:
    seen = standing(muster.groups, rollout.step)
    rollout, soaked = _soak(world, rollout, pinned, wave, seen, now)
    case = casework.build(world, rollout, pinned, wave, seen, muster.groups)
    judgement = judge(case)
    if deaf(world, now) and rollout.flags.get("promoted") != rollout.step:
        yield from _deaf(world, rollout, now)
        return
    if judgement.verdict is Verdict.ROLL_BACK:
        yield from _reject(world, rollout, pinned, case, judgement, now)
        return
    if rollout.state is RolloutState.PAUSED:
        return
    if _passes(rollout, wave, seen, judgement, pinned):
        yield from _pass(world, rollout, pinned, wave, seen, case, judgement, now)
        return
    if _grows(rollout, pinned, wave, judgement):
        yield from _grow(rollout, wave, case, judgement, now)
        return
    yield from _wait(world, rollout, pinned, wave, seen, case, judgement, soaked, now)


def _grows(rollout: Rollout, pinned: Pinned, wave: Wave, judgement: Judgement) -> bool:
    """Every outcome is known and proves nothing: time adds nothing, and the policy says grow."""
    wanted = pinned.rollout.strategy.on_inconclusive.action == "grow"
    times = doublings(rollout.flags, rollout.step)
    larger, largest = (grown(pinned.waves, wave, n) for n in (times + 1, times))
    room = rollout.step < len(pinned.waves) - 1 and larger.step != largest.step
    stuck = bool(judgement.numbers.get("grow")) and judgement.verdict is Verdict.WAIT
    asked = stuck or judgement.verdict is Verdict.INCONCLUSIVE
    ours = wave.fixes is None and not wave.recall and rollout.state is RolloutState.SOAKING
    return wanted and times < DOUBLINGS and room and asked and ours


def _grow(
    rollout: Rollout, wave: Wave, case: casework.Case, judgement: Judgement, now: float
) -> Iterator[Action]:
    times = doublings(rollout.flags, rollout.step) + 1
    how = "is doubled" if times == 1 else "is doubled again"
    sentence = f"GROWING — {wave.name} {how}: more devices can tell what more time cannot"
    sentence += f"; {judgement.sentence}"
    yield Decision(
        rollout=rollout.id,
        kind="verdict",
        verdict=str(judgement.verdict),
        sentence=sentence,
        inputs=case.to_json(),
        numbers=judgement.numbers,
    )
    flags = {**rollout.flags, "grown": rollout.step, "doublings": times, "drawn": None}
    yield Change(rollout=replace(rollout, flags=flags, sentence=sentence, updated_at=now))


def _deaf(world: World, rollout: Rollout, now: float) -> Iterator[Action]:
    """Nobody can be heard: no soak, no verdict; what was known before stays as it is."""
    if rollout.state not in ADMITTING:
        return
    since = datetime.fromtimestamp(world.heard_at or now, UTC)
    sentence = f"WAITING — nothing was heard since {since:%H:%M:%S} UTC: broker or ingest is away"
    after = replace(rollout, sentence=sentence)
    if after != world.rollouts[rollout.id]:
        yield Change(rollout=replace(after, updated_at=now))


def _soak(
    world: World, rollout: Rollout, pinned: Pinned, wave: Wave, seen: Standing, now: float
) -> tuple[Rollout, bool]:
    """The rollout with its soak advanced to now, and whether the step is soaking at all."""
    share = pinned.rollout.strategy.min_reporting
    near = seen.decided + seen.waiting + seen.untold
    begun = near == 0 or seen.decided >= share * near
    heard = seen.reporting >= share * seen.updated and not deaf(world, now)
    if not (begun and heard) or rollout.state not in ADMITTING:
        return replace(rollout, soak_mark=None), False
    mark = rollout.soak_mark if rollout.soak_mark is not None else now
    until = soaks_on(rollout, wave)
    if until is not None and mark <= now < until:
        return rollout, True
    return replace(rollout, soak=rollout.soak + max(0.0, now - mark), soak_mark=now), True


def soaks_on(rollout: Rollout, wave: Wave) -> float | None:
    """When the soak of a step that soaks is written next; None while it does not soak.

    As fine as the step can tell apart, at once when a limit is reached; a kill loses no more.
    """
    if rollout.soak_mark is None:
        return None
    step = wave.step
    grain = min(max(SOAK_GRAIN, step.soak.total_seconds() / 200), COARSEST)
    limits = [step.soak.total_seconds()]
    if step.max_soak is not None:
        extended = float(rollout.flags.get("extended_at", 0.0))
        limits.append(step.max_soak.total_seconds() + extended)
    left = [limit - rollout.soak for limit in limits if limit > rollout.soak]
    return rollout.soak_mark + min([grain, *left])


def _passes(
    rollout: Rollout, wave: Wave, seen: Standing, judgement: Judgement, pinned: Pinned
) -> bool:
    if rollout.flags.get("promoted") == rollout.step:
        return True
    if rollout.state is RolloutState.INCONCLUSIVE or _waits_for_offline(pinned, seen):
        return False
    last = rollout.step == len(pinned.waves) - 1
    if wave.recall:
        return recall.passes(seen, judgement, _min_share(pinned), last)
    open_ends = seen.waiting + seen.untold
    near = seen.decided + open_ends
    settled = open_ends == 0 if last else seen.decided >= _min_share(pinned) * near
    if not settled or seen.untold:
        return False
    if seen.size == 0 and not last:
        return True  # the percent was reached by earlier steps: there is nobody new to learn from
    if judgement.verdict is Verdict.WIDEN:
        return True
    # The last step has nothing left to widen to: soaked without a word against it, it completes,
    # and its sentence says what stayed unproven.
    return last and rollout.soak >= wave.step.soak.total_seconds() and seen.silent == 0


def _min_share(pinned: Pinned) -> float:
    return pinned.rollout.strategy.min_reporting


def _reject(
    world: World,
    rollout: Rollout,
    pinned: Pinned,
    case: casework.Case,
    judgement: Judgement,
    now: float,
) -> Iterator[Action]:
    strategy = pinned.rollout.strategy
    to = "stay" if strategy.on_failure is OnFailure.HOLD else str(pinned.rollout.rollback.to)
    if not pinned.release.rollback.possible:
        to = "stay"  # ONE-WAY: a bad verdict becomes stop, page and fix-forward
    actor = f"policy {pinned.policy.name}"
    yield Decision(
        rollout=rollout.id,
        kind="verdict",
        verdict=str(judgement.verdict),
        sentence=judgement.sentence,
        inputs=case.to_json(),
        numbers=judgement.numbers,
    )
    yield Reject(rollout=rollout.id, to=to, reason=judgement.sentence, actor=actor)


def _pass(
    world: World,
    rollout: Rollout,
    pinned: Pinned,
    wave: Wave,
    seen: Standing,
    case: casework.Case,
    judgement: Judgement,
    now: float,
) -> Iterator[Action]:
    promoted = rollout.flags.get("promoted") == rollout.step
    last = rollout.step == len(pinned.waves) - 1
    # The policy may pass a step unproven; that a person wants to look first stays as it was.
    by_policy = promoted and rollout.flags.get("promoted_by") == BY_POLICY
    if wave.step.pause is not None and not last and (by_policy or not promoted):
        yield from _pause(rollout, wave, judgement, "UNPROVEN" if by_policy else "proven", now)
        return
    sentence = _passed_sentence(rollout, wave, seen, judgement, promoted)
    yield Decision(
        rollout=rollout.id,
        kind="verdict",
        verdict=str(Verdict.WIDEN) if not last else "complete",
        sentence=sentence,
        inputs=case.to_json(),
        numbers=judgement.numbers,
    )
    if not last:
        yield Change(
            rollout=replace(
                rollout,
                state=RolloutState.PROGRESSING,
                sentence=sentence,
                step=rollout.step + 1,
                revision=rollout.revision + 1,
                updated_at=now,
            )
        )
        return
    yield from _complete(world, rollout, pinned, sentence, now)


def _passed_sentence(
    rollout: Rollout, wave: Wave, seen: Standing, judgement: Judgement, promoted: bool
) -> str:
    if promoted:
        by = rollout.flags.get("promoted_by", "a person")
        return (
            f"WIDENED by {by} after {wave.name} ({seen.words()}); gate said: {judgement.sentence}"
        )
    if wave.recall:
        # The gate's own word is quoted, as where a person overrules it: so the replay agrees.
        reached = f"WIDENED — {wave.name}: {seen.words()}; a recall asks for no proof of safety"
        return f"{reached}; gate said: {judgement.sentence}"
    if judgement.verdict is Verdict.WIDEN:
        return judgement.sentence
    if seen.size == 0:
        reached = f"WIDENED — {wave.name}: reached by earlier steps, nobody new in it"
        return f"{reached}; gate said: {judgement.sentence}"
    return f"COMPLETED — {wave.name}: {seen.words()}; not proven at this size: {judgement.sentence}"


def _pause(
    rollout: Rollout, wave: Wave, judgement: Judgement, how: str, now: float
) -> Iterator[Action]:
    sentence = f"PAUSED — {wave.name} is {how}, the step waits for `promote`; {judgement.sentence}"
    yield Change(
        rollout=replace(
            rollout,
            state=RolloutState.PAUSED,
            sentence=sentence,
            revision=rollout.revision + 1,
            updated_at=now,
        )
    )
    yield Decision(rollout=rollout.id, kind="state", verdict="Paused", sentence=sentence)


def _complete(
    world: World, rollout: Rollout, pinned: Pinned, sentence: str, now: float
) -> Iterator[Action]:
    members = world.members.get(rollout.id, {}).values()
    ours = [m for m in members if m.arm is not Arm.CONTROL and m.state is not MemberState.LEFT]
    away = [m.device for m in ours if m.state in (MemberState.TOLD, MemberState.DRAWN)]
    updated = sum(m.state is MemberState.UPDATED for m in ours)
    tail = f", {len(away)} not reached yet: each gets it at its next contact" if away else ""
    proof = sentence.removeprefix("WIDENED — ").removeprefix("COMPLETED — ")
    sentence = f"COMPLETED — {rollout.release} on {updated} of {len(ours)} devices{tail}; {proof}"
    hardware = {d.hardware for d in world.devices.values() if d.fleet == rollout.fleet}
    for component, digest in sorted(rollout.artifacts.items()):
        for kind in sorted(hardware):
            proven = Proven(release=rollout.release, digest=digest, at=now)
            yield Prove(fleet=rollout.fleet, component=component, hardware=kind, proven=proven)
    yield Change(
        rollout=replace(
            rollout,
            state=RolloutState.COMPLETED,
            sentence=sentence,
            revision=rollout.revision + 1,
            finished_at=now,
            updated_at=now,
        )
    )
    yield Decision(
        rollout=rollout.id,
        kind="state",
        verdict="Completed",
        sentence=sentence,
        inputs={"updated": updated, "unreached": sorted(away)[:1000]},
    )


def _wait(
    world: World,
    rollout: Rollout,
    pinned: Pinned,
    wave: Wave,
    seen: Standing,
    case: casework.Case,
    judgement: Judgement,
    soaking: bool,
    now: float,
) -> Iterator[Action]:
    state, sentence = _under_way(world, rollout, wave, seen, judgement, soaking, now)
    overdue = _overdue(rollout, pinned, now)
    if overdue and state in ADMITTING:
        state, sentence = RolloutState.INCONCLUSIVE, f"INCONCLUSIVE — {overdue}; {sentence}"
    extended = float(rollout.flags.get("extended_at", 0.0))
    if judgement.verdict is Verdict.INCONCLUSIVE and state is RolloutState.SOAKING:
        limit = wave.step.max_soak.total_seconds() if wave.step.max_soak else 0.0
        if rollout.soak - extended >= limit:
            state, more = _inconclusive(rollout, pinned, seen, case, judgement, now)
            if more:
                yield from more
                return
    flags = {
        **rollout.flags,
        "verdict": str(judgement.verdict),
        "standing": asdict(seen),
        "looked": _looked(rollout, wave),
    }
    after = replace(rollout, state=state, sentence=sentence, flags=flags)
    stored = world.rollouts[rollout.id]
    if after == stored:
        return
    if state is RolloutState.SOAKING and flags["looked"] != stored.flags.get("looked"):
        yield Look(rollout=rollout.id, numbers=judgement.numbers)
    changed = state is not stored.state
    yield Change(rollout=replace(after, revision=rollout.revision + changed, updated_at=now))
    if changed or stored.flags.get("verdict") != str(judgement.verdict):
        yield Decision(
            rollout=rollout.id,
            kind="verdict",
            verdict=str(judgement.verdict),
            sentence=sentence,
            inputs=case.to_json(),
            numbers=judgement.numbers,
        )


def _waits_for_offline(pinned: Pinned, seen: Standing) -> bool:
    """`offline: {action: wait | fail}`: the step does not pass without those that are out of reach.

    Nor without those that were told and say nothing yet: they may be on their way out of it. After
    `countAfter` nobody is waited for any more: then it is nobody's fault (wait), or a failure.
    """
    waits = pinned.rollout.strategy.offline.action is not OfflineAction.DEFER
    return waits and seen.offline - seen.overdue + seen.waiting > 0


def _under_way(
    world: World,
    rollout: Rollout,
    wave: Wave,
    seen: Standing,
    judgement: Judgement,
    soaking: bool,
    now: float,
) -> tuple[RolloutState, str]:
    if rollout.state is RolloutState.INCONCLUSIVE:
        # Why it waits for a person stays said until one decides.
        return rollout.state, rollout.sentence
    if soaking and _waits_for_offline(world.pinned[rollout.id], seen):
        away = f"WAITING — {wave.name}: {seen.words()}; all of them are waited for"
        return RolloutState.SOAKING, f"{away}; {judgement.sentence}"
    if soaking:
        return RolloutState.SOAKING, judgement.sentence
    held = telling.held_back(world, rollout, now)
    sentence = f"PROGRESSING — {wave.name}: {seen.words()}" + (f"; {held}" if held else "")
    return RolloutState.PROGRESSING, sentence


def _looked(rollout: Rollout, wave: Wave) -> str:
    """Names the stretch of the soak that we are in: one look at the evidence is kept of each."""
    stretch = max(wave.step.soak.total_seconds() / LOOKS, SOAK_GRAIN)
    return f"{rollout.step}/{int(rollout.soak / stretch)}"


def _overdue(rollout: Rollout, pinned: Pinned, now: float) -> str:
    """Why a person should look: the rollout is older than its progress deadline."""
    if now <= deadline(rollout, pinned):
        return ""
    limit = pinned.rollout.strategy.progress_deadline
    return f"the progress deadline of {limit} has passed: `resume` gives it another"


def deadline(rollout: Rollout, pinned: Pinned) -> float:
    """The moment after which this rollout, still admitting, asks a person."""
    since = float(rollout.flags.get("resumed_at", rollout.opened_at))
    return since + pinned.rollout.strategy.progress_deadline.total_seconds()


def _inconclusive(
    rollout: Rollout,
    pinned: Pinned,
    seen: Standing,
    case: casework.Case,
    judgement: Judgement,
    now: float,
) -> tuple[RolloutState, list[Action]]:
    """What the policy wants after the maximum soak: (state, actions that replace the wait)."""
    rule: OnInconclusive = pinned.rollout.strategy.on_inconclusive
    if rule.action == "rollback":
        decision = Decision(
            rollout=rollout.id,
            kind="verdict",
            verdict=str(judgement.verdict),
            sentence=judgement.sentence,
            inputs=case.to_json(),
            numbers=judgement.numbers,
        )
        reject = Reject(
            rollout=rollout.id,
            to=str(pinned.rollout.rollback.to),
            reason=judgement.sentence,
            actor=f"policy {pinned.policy.name}",
        )
        return rollout.state, [decision, reject]
    if rule.action == "extend":
        return RolloutState.SOAKING, []
    if rule.action == "proceed" and rule.allows(
        healthy=seen.updated, soaked=rollout.soak, devices=seen.size
    ):
        flags = {
            **rollout.flags,
            "promoted": rollout.step,
            "promoted_by": BY_POLICY,
        }
        return rollout.state, [Change(rollout=replace(rollout, flags=flags, updated_at=now))]
    return RolloutState.INCONCLUSIVE, []
