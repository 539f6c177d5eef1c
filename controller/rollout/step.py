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

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from controller.manifests.kinds import OnFailure, OnInconclusive
from controller.rollout import case as casework
from controller.rollout import opening, windows
from controller.rollout.cohort import Candidate, assign, draw, halves, rank, scored
from controller.rollout.desired import in_range, satisfied, stopped
from controller.rollout.follow import follow, runs_target, unheard
from controller.rollout.gate import Judgement, Verdict, judge
from controller.rollout.model import (
    ADMITTING,
    Arm,
    Device,
    Member,
    MemberState,
    Proven,
    Rollout,
    RolloutState,
)
from controller.rollout.waves import Pinned, Wave
from controller.rollout.world import Action, Change, Decision, Notice, Prove, Put, Reject, World

HEARTBEATS = 6  # of silence, before a device counts as silent
HEARTBEAT = 60.0  # seconds; the agent's default
SOAK_GRAIN = 0.25  # seconds: soak is written no finer than this


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """How the members of the current step stand. Controls are not in it."""

    told: int
    updated: int
    failed: int
    silent: int
    waiting: int  # told, reachable, not decided
    deferred: int  # told, and its own preconditions are not met
    offline: int  # told or drawn, but not reachable
    untold: int  # drawn and reachable, held back by our limits
    reporting: int  # updated and heard lately
    why: str = ""  # the most frequent reason of the untold

    @property
    def decided(self) -> int:
        return self.updated + self.failed + self.silent

    @property
    def size(self) -> int:
        return self.told + self.untold + self.offline

    def words(self) -> str:
        parts = [f"{self.updated} updated"]
        for n, word in (
            (self.failed, "failed"),
            (self.silent, "silent"),
            (self.waiting, "in progress"),
            (self.deferred, "deferred by the device"),
            (self.untold, f"not told yet ({self.why})" if self.why else "not told yet"),
            (self.offline, "offline"),
        ):
            if n:
                parts.append(f"{n} {word}")
        return ", ".join(parts)


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
            yield from _draw(world, rollout, pinned, wave, now)
        return
    if rollout.state in ADMITTING:
        told = list(_told(world, rollout, pinned, wave, now))
        if told:
            yield Put(rollout=rollout.id, members=tuple(told))
            return
    yield from _judge(world, rollout, pinned, wave, now)


def patience(world: World, rollout: Rollout) -> float:
    """Seconds without contact after which an activated device counts as silent."""
    declared = world.pinned[rollout.id].rollout.strategy.silent_after
    return declared.total_seconds() if declared is not None else HEARTBEATS * HEARTBEAT


def reachable(world: World, device: str, patience: float, now: float) -> bool:
    row = world.seen.get(device)
    return row is not None and unheard(row, world.hearing, now) <= patience


def standing(world: World, rollout: Rollout, now: float) -> Standing:
    """Count the current step's members (the returning ones belong to no step)."""
    limit = patience(world, rollout)
    counted: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for member in world.members.get(rollout.id, {}).values():
        if member.step != rollout.step or member.arm is not Arm.EXPOSED:
            continue
        near = reachable(world, member.device, limit, now)
        counted[_standing(member, near)] += 1
        if near and member.state is MemberState.DRAWN and member.reason:
            reasons[member.reason] += 1
        counted["told"] += member.state not in (MemberState.DRAWN, MemberState.LEFT)
        counted["reporting"] += member.state is MemberState.UPDATED and near
    return Standing(
        told=counted["told"],
        updated=counted["updated"],
        failed=counted["failed"],
        silent=counted["silent"],
        waiting=counted["waiting"],
        deferred=counted["deferred"],
        offline=counted["offline"],
        untold=counted["untold"],
        reporting=counted["reporting"],
        why=min(reasons, key=lambda reason: (-reasons[reason], reason), default=""),
    )


def _standing(member: Member, near: bool) -> str:
    if member.state is MemberState.DRAWN:
        return "untold" if near else "offline"
    if member.state is MemberState.TOLD:
        if not near:
            return "offline"
        return "deferred" if member.reason else "waiting"
    return str(member.state)


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


# -- drawing --------------------------------------------------------------------------------------


def _draw(
    world: World, rollout: Rollout, pinned: Pinned, wave: Wave, now: float
) -> Iterator[Action]:
    members = world.members.get(rollout.id, {})
    if rollout.step == 0 and not members:
        put = opening.returning(world, rollout, now)
        if put is not None:
            yield put
            members = {m.device: m for m in put.members}
    everybody = _candidates(world, rollout, pinned)
    already = frozenset(m.device for m in members.values() if m.arm is not Arm.CONTROL)
    seed = f"{rollout.seed}/{rollout.step}"
    if wave.fixes:
        exposed, control, size, warnings = _draw_fix(world, rollout, wave, everybody, seed)
    else:
        cohort = next(c for c in pinned.fleet.cohorts if c.name == wave.step.cohort)
        cohorts = assign(pinned.fleet.cohorts, everybody, rollout.seed)
        inside = cohorts[cohort.name]
        if wave.index == len(pinned.waves) - 1 and wave.step.percent == 1:
            inside = inside + _passed_by(pinned, cohorts, cohort.name, already)
        runs = frozenset(c.device.id for c in inside if _runs(world, rollout, c.device))
        drawn = draw(
            cohort,
            inside=[c for c in inside if _may_take(world, rollout, pinned, c.device)],
            everybody=[c for c in everybody if not _runs(world, rollout, c.device)],
            already=already | runs,
            percent=wave.step.percent,
            seed=seed,
            whole=len(inside),
        )
        exposed, control = list(drawn.exposed), list(drawn.control)
        size, warnings = drawn.size, list(drawn.warnings)
        if not inside:
            yield from _no_members(world, rollout, pinned, wave, now)
            return
    new = [_member(c, rollout, Arm.EXPOSED, now) for c in exposed]
    new += [_member(c, rollout, Arm.CONTROL, now) for c in control if c.device.id not in already]
    if new:
        yield Put(rollout=rollout.id, members=tuple(new))
    sentence = (
        f"step {rollout.step + 1} of {len(pinned.waves)} ({wave.name}): {len(exposed)} of {size} "
        f"devices drawn, {len(control)} as control"
    )
    yield Change(
        rollout=replace(
            rollout,
            state=RolloutState.PROGRESSING,
            sentence=f"PROGRESSING — {sentence}",
            step_at=now,
            soak=0.0,
            soak_mark=None,
            updated_at=now,
            revision=rollout.revision + 1,
            flags={**rollout.flags, "drawn": rollout.step, "verdict": "", "extended_at": 0.0},
        )
    )
    yield Decision(
        rollout=rollout.id,
        kind="draw",
        verdict="drawn",
        sentence="; ".join([sentence, *warnings]),
        inputs={
            "seed": seed,
            "cohort": wave.step.cohort,
            "percent": wave.step.percent,
            "exposed": [c.device.id for c in exposed],
            "control": [c.device.id for c in control],
        },
    )


def _passed_by(
    pinned: Pinned, cohorts: dict[str, list[Candidate]], last: str, already: frozenset[str]
) -> list[Candidate]:
    """Devices that their score moved into a cohort whose steps were over: theirs is the last."""
    whole = {wave.step.cohort for wave in pinned.waves if wave.step.percent == 1} - {last}
    return [c for name in sorted(whole) for c in cohorts[name] if c.device.id not in already]


def _draw_fix(
    world: World, rollout: Rollout, wave: Wave, everybody: list[Candidate], seed: str
) -> tuple[list[Candidate], list[Candidate], int, list[str]]:
    ran = set(opening.who_ran(world, rollout.fleet, wave.fixes or ""))
    those = [c for c in everybody if c.device.id in ran]
    first, control = halves(those, seed)
    return first, control, len(those), []


def _no_members(
    world: World, rollout: Rollout, pinned: Pinned, wave: Wave, now: float
) -> Iterator[Action]:
    cohort = next(c for c in pinned.fleet.cohorts if c.name == wave.step.cohort)
    score = world.scores.get(rollout.fleet)
    devices = sum(d.fleet == rollout.fleet and d.governed for d in world.devices.values())
    if not devices:
        why = f"fleet {rollout.fleet} has no active devices: enrol some"
    elif cohort.select and cohort.select.score and score and score.unscored == devices:
        why = (
            f"0 of {devices} devices have {score.min_exposure:g} h of history: wait, or select "
            "with `mode: stratified` and no score"
        )
    else:
        why = f"none of {devices} devices is in it now"
    sentence = f"NO MEMBERS — cohort {cohort.name} is empty: {why}"
    if rollout.state is RolloutState.NO_MEMBERS and rollout.sentence == sentence:
        return
    yield Change(
        rollout=replace(
            rollout,
            state=RolloutState.NO_MEMBERS,
            sentence=sentence,
            revision=rollout.revision + 1,
            updated_at=now,
        )
    )
    yield Decision(rollout=rollout.id, kind="state", verdict="NoMembers", sentence=sentence)


def _candidates(world: World, rollout: Rollout, pinned: Pinned) -> list[Candidate]:
    """The fleet's devices that this release is compatible with, with their scores."""
    score = world.scores.get(rollout.fleet)
    fits = [
        device
        for device in world.devices.values()
        if device.fleet == rollout.fleet and device.governed and _compatible(pinned, device)
    ]
    return scored(fits, score.values if score else {})


def _compatible(pinned: Pinned, device: Device) -> bool:
    for artifact in pinned.release.artifacts:
        for label, allowed in artifact.compatible.items():
            if device.labels.get(label) not in allowed:
                return False
    return True


def _may_take(world: World, rollout: Rollout, pinned: Pinned, device: Device) -> bool:
    """Is what the device runs an allowed source of this release?"""
    row, release = world.seen.get(device.id), pinned.release
    if row is None or not release.upgrades_from:
        return True
    fixed = world.catalog.releases.get(release.fixes or "")
    for component in rollout.artifacts:
        report = row.components.get(component)
        if report is None:
            continue
        faulty = fixed.components.get(component) if fixed is not None else None
        if faulty is not None and faulty.digest == report.digest:
            continue  # the faulty release is always a valid source of its fix
        version = world.catalog.version(component, report.digest)
        if version is None or not any(in_range(version, s) for s in release.upgrades_from):
            return False
    return True


def _runs(world: World, rollout: Rollout, device: Device) -> bool:
    row = world.seen.get(device.id)
    return row is not None and runs_target(row, rollout, committed=True)


def _member(candidate: Candidate, rollout: Rollout, arm: Arm, now: float) -> Member:
    return Member(
        device=candidate.device.id,
        step=rollout.step,
        arm=arm,
        drawn_at=now,
        hardware=candidate.device.hardware,
        band=candidate.band,
        score=candidate.score,
        exposed_at=now if arm is Arm.CONTROL else None,
        updated_at=now,
    )


# -- telling --------------------------------------------------------------------------------------


def _told(
    world: World, rollout: Rollout, pinned: Pinned, wave: Wave, now: float
) -> Iterator[Member]:
    """Members that are told now, and those whose reason for waiting has changed."""
    if _held_back(world, rollout):
        return
    members = world.members.get(rollout.id, {})
    ours = [m for m in members.values() if m.step == rollout.step and m.arm is Arm.EXPOSED]
    room = _room(world, rollout, wave, ours, now)
    waiting = [m for m in ours if m.state is MemberState.DRAWN]
    waiting.sort(key=lambda m: rank(f"{rollout.seed}/tell", m.device))
    for member in waiting:
        row = world.seen.get(member.device)
        if row is None or not reachable(world, member.device, patience(world, rollout), now):
            continue
        why = _waits(world, rollout, pinned, member, now)
        if why:
            if why != member.reason:
                yield replace(member, reason=why, updated_at=now)
            continue
        if room <= 0:
            continue
        room -= 1
        yield replace(
            member,
            state=MemberState.TOLD,
            reason="",
            attempt=f"{rollout.id}.{rollout.step}",
            told_at=now,
            previous=opening.previous(row, rollout),
            updated_at=now,
        )


def _held_back(world: World, rollout: Rollout) -> str:
    head = world.head
    if head is None:
        return ""
    if head.stale:
        return "Git was not heard for too long: nothing widens"
    edited = head.manifests.rollouts.get(rollout.name)
    # A later edit may tighten at once: suspend stops telling; the rest of it waits for a release.
    return "suspended" if edited is not None and edited.suspend else ""


def _room(world: World, rollout: Rollout, wave: Wave, members: Iterable[Member], now: float) -> int:
    room = 1 << 30
    members = list(members)
    limit = patience(world, rollout)
    if wave.step.max_concurrent is not None:
        flying = sum(
            m.state is MemberState.TOLD and not m.reason and reachable(world, m.device, limit, now)
            for m in members
        )
        room = min(room, wave.step.max_concurrent - flying)
    if wave.step.max_per_minute is not None:
        lately = sum(m.told_at is not None and m.told_at > now - 60 for m in members)
        room = min(room, wave.step.max_per_minute - lately)
    return room


def _waits(world: World, rollout: Rollout, pinned: Pinned, member: Member, now: float) -> str:
    device, row = world.devices[member.device], world.seen[member.device]
    if stopped(device, rollout.artifacts.values(), world.stops):
        return "stopped"
    closed = windows.closed(pinned.rollout.windows, device, now)
    if closed:
        return closed
    for other_id, others in world.members.items():
        other = others.get(member.device)
        if other_id != rollout.id and other is not None and _flying(world, other_id, other):
            return "component_busy"
    versions = {c: world.catalog.version(c, r.digest) for c, r in row.components.items()}
    versions |= dict.fromkeys(rollout.artifacts, pinned.release.version)
    met, why = satisfied(pinned.release, versions)
    return "" if met else why


def _flying(world: World, rollout: str, member: Member) -> bool:
    active = world.rollouts[rollout].active if rollout in world.rollouts else False
    return active and member.state is MemberState.TOLD and member.arm is not Arm.CONTROL


# -- judging --------------------------------------------------------------------------------------


def _judge(
    world: World, rollout: Rollout, pinned: Pinned, wave: Wave, now: float
) -> Iterator[Action]:
    seen = standing(world, rollout, now)
    rollout, soaked = _soak(world, rollout, pinned, seen, now)
    case = casework.build(world, rollout, pinned, wave, seen, now)
    judgement = judge(case)
    if judgement.verdict is Verdict.ROLL_BACK:
        yield from _reject(world, rollout, pinned, case, judgement, now)
        return
    if rollout.state is RolloutState.PAUSED:
        return
    if _passes(rollout, wave, seen, judgement, pinned):
        yield from _pass(world, rollout, pinned, wave, seen, case, judgement, now)
        return
    yield from _wait(world, rollout, pinned, wave, seen, case, judgement, soaked, now)


def _soak(
    world: World, rollout: Rollout, pinned: Pinned, seen: Standing, now: float
) -> tuple[Rollout, bool]:
    """The rollout with its soak advanced to now, and whether the step is soaking at all."""
    share = pinned.rollout.strategy.min_reporting
    near = seen.decided + seen.waiting + seen.untold
    begun = near == 0 or seen.decided >= share * near
    heard = seen.reporting >= share * seen.updated
    if not (begun and heard) or rollout.state not in ADMITTING:
        return replace(rollout, soak_mark=None), False
    mark = rollout.soak_mark if rollout.soak_mark is not None else now
    if now - mark < SOAK_GRAIN and rollout.soak_mark is not None:
        return rollout, True
    return replace(rollout, soak=rollout.soak + (now - mark), soak_mark=now), True


def _passes(
    rollout: Rollout, wave: Wave, seen: Standing, judgement: Judgement, pinned: Pinned
) -> bool:
    if rollout.flags.get("promoted") == rollout.step:
        return True
    if rollout.state is RolloutState.INCONCLUSIVE:
        return False
    last = rollout.step == len(pinned.waves) - 1
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
    binding = str(judgement.numbers.get("binding", ""))
    yield Change(rollout=replace(rollout, flags={**rollout.flags, "stopped_by": binding}))
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
    if wave.step.pause is not None and not promoted and not last:
        yield from _pause(rollout, wave, judgement, now)
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
    if judgement.verdict is Verdict.WIDEN:
        return judgement.sentence
    if seen.size == 0:
        return f"WIDENED — {wave.name}: reached by earlier steps, nobody new in it"
    return f"COMPLETED — {wave.name}: {seen.words()}; not proven at this size: {judgement.sentence}"


def _pause(rollout: Rollout, wave: Wave, judgement: Judgement, now: float) -> Iterator[Action]:
    sentence = f"PAUSED — {wave.name} is proven, the step waits for `promote`; {judgement.sentence}"
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
    state, sentence = rollout.state, judgement.sentence
    if state is RolloutState.INCONCLUSIVE:
        sentence = rollout.sentence  # why it waits for a person stays said until one decides
    if state is not RolloutState.INCONCLUSIVE:
        state = RolloutState.SOAKING if soaking else RolloutState.PROGRESSING
        if not soaking:
            held = _held_back(world, rollout)
            sentence = f"PROGRESSING — {wave.name}: {seen.words()}"
            sentence += f"; {held}" if held else ""
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
    flags = {**rollout.flags, "verdict": str(judgement.verdict)}
    after = replace(rollout, state=state, sentence=sentence, flags=flags)
    stored = world.rollouts[rollout.id]
    if after == stored:
        return
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


def _overdue(rollout: Rollout, pinned: Pinned, now: float) -> str:
    """Why a person should look: the rollout is older than its progress deadline."""
    deadline = pinned.rollout.strategy.progress_deadline
    since = float(rollout.flags.get("resumed_at", rollout.opened_at))
    if now - since <= deadline.total_seconds():
        return ""
    return f"the progress deadline of {deadline} has passed: `resume` gives it another"


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
    if rule.action in ("extend", "grow"):
        return RolloutState.SOAKING, []
    if rule.action == "proceed" and rule.allows(
        healthy=seen.updated, soaked=rollout.soak, devices=seen.size
    ):
        flags = {
            **rollout.flags,
            "promoted": rollout.step,
            "promoted_by": "policy (UNPROVEN, proceed)",
        }
        return rollout.state, [Change(rollout=replace(rollout, flags=flags, updated_at=now))]
    return RolloutState.INCONCLUSIVE, []


def notices(world: World) -> list[Notice]:
    """Why active rollouts stand still although nobody paused them."""
    found = []
    for rollout in world.rollouts.values():
        if rollout.active and (why := _held_back(world, rollout)):
            found.append(Notice(name=rollout.name, sentence=why))
    return found
