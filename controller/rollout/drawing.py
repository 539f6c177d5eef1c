"""Decides whom a step exposes, and who is its control: once, when it opens.

Pure. An empty cohort stops the rollout (NoMembers) with the reason; it never passes. A fix's first
wave is drawn from the devices that ran the faulty release. Who may be drawn: active devices of the
fleet that the release is compatible with, from a source version that it allows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from controller.manifests.kinds import Cohort, Mode
from controller.rollout import controls, holdout, opening
from controller.rollout.cohort import Candidate, assign, draw, halves, rank, scored
from controller.rollout.desired import in_range
from controller.rollout.follow import runs_target
from controller.rollout.model import (
    Arm,
    Device,
    Member,
    Rollout,
    RolloutState,
)
from controller.rollout.standing import patience, reachable
from controller.rollout.waves import Pinned, Wave, doublings, grown
from controller.rollout.world import Action, Change, Decision, Put, World


def draw_step(
    world: World, rollout: Rollout, pinned: Pinned, wave: Wave, now: float
) -> Iterator[Action]:
    members = world.members.get(rollout.id, {})
    soaked = 0.0
    if times := doublings(rollout.flags, rollout.step):
        wave = grown(pinned.waves, wave, times)
        # More devices are asked for, not more time; until the maximum there is as much as before.
        soaked = min(rollout.soak, wave.step.soak.total_seconds())
    if rollout.step == 0 and not members:
        put = opening.returning(world, rollout, now)
        if put is not None:
            yield put
            members = {m.device: m for m in put.members}
    everybody = _candidates(world, rollout, pinned)
    seed = f"{rollout.seed}/{rollout.step}"
    if wave.recall and everybody:
        drawn = _draw_recall(world, rollout, pinned, wave, everybody, members, seed, now)
    elif wave.fixes:
        drawn = _draw_fix(world, rollout, wave, everybody, seed)
    else:
        cohort = next(c for c in pinned.fleet.cohorts if c.name == wave.step.cohort)
        inside = _inside(rollout, pinned, wave, cohort, everybody, members)
        if not inside:
            yield from _no_members(world, rollout, pinned, wave, now)
            return
        drawn = _draw(world, rollout, pinned, wave, cohort, inside, everybody, members, seed, now)
    new = [_member(c, rollout, Arm.EXPOSED, now) for c in drawn.exposed]
    new += [_member(c, rollout, Arm.CONTROL, now) for c in drawn.control]
    if new:
        yield Put(rollout=rollout.id, members=tuple(new))
    sentence = (
        f"step {rollout.step + 1} of {len(pinned.waves)} ({wave.name}): {len(drawn.exposed)} of "
        f"{drawn.size} devices drawn, {len(drawn.control)} as control"
    )
    if drawn.held_out:
        sentence += f", {drawn.held_out} held out until the benefit is measured"
    if drawn.valid_from is not None:
        sentence += f"; best first: what it shows is valid for scores ≥ {drawn.valid_from:g}"
    yield Change(
        rollout=replace(
            rollout,
            state=RolloutState.PROGRESSING,
            sentence=f"PROGRESSING — {sentence}",
            step_at=now,
            soak=soaked,
            soak_mark=None,
            updated_at=now,
            revision=rollout.revision + 1,
            flags={
                **rollout.flags,
                "drawn": rollout.step,
                "verdict": "",
                "extended_at": 0.0,
                "strata": controls.weights(everybody),
                "valid_from": drawn.valid_from,
            },
        )
    )
    yield Decision(
        rollout=rollout.id,
        kind="draw",
        verdict="drawn",
        sentence="; ".join([sentence, *drawn.warnings]),
        inputs={
            "seed": seed,
            "cohort": wave.step.cohort,
            "percent": wave.step.percent,
            "size": drawn.size,
            "exposed": [c.device.id for c in drawn.exposed],
            "control": [c.device.id for c in drawn.control],
            "bands": dict(sorted(Counter(str(c.band) for c in drawn.exposed).items())),
            "control_bands": [c.band for c in drawn.control],
            "floor": drawn.floor,
            "valid_from": drawn.valid_from,
            "held_out": drawn.held_out,
            "warnings": list(drawn.warnings),
            **({"ranked": "columns"} if drawn.columns else {}),
        },
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Drawn:
    exposed: Sequence[Candidate]
    control: Sequence[Candidate]
    size: int
    floor: float | None = None
    valid_from: float | None = None
    held_out: int = 0  # of the cohort, for the holdout
    warnings: tuple[str, ...] = ()
    columns: bool = False


def _draw(
    world: World,
    rollout: Rollout,
    pinned: Pinned,
    wave: Wave,
    cohort: Cohort,
    inside: list[Candidate],
    everybody: list[Candidate],
    members: Mapping[str, Member],
    seed: str,
    now: float,
) -> _Drawn:
    already = frozenset(m.device for m in members.values() if m.arm is not Arm.CONTROL)
    there = frozenset(c.device.id for c in everybody if runs(world, rollout, c.device))
    first, after_best = _place(pinned, wave)
    kept_out = frozenset(
        c.device.id for c in inside if holdout.keeps_out(rollout, pinned, c.device.id, now)
    )
    drawn = draw(
        cohort,
        inside=[
            c
            for c in inside
            if c.device.id not in kept_out and may_take(world, rollout, pinned, c.device)
        ],
        already=already | there,
        percent=wave.step.percent,
        seed=seed,
        whole=len(inside),
        first=first,
        every_band=after_best,
    )
    taken = already | there | {c.device.id for c in drawn.exposed}
    matched = controls.match(
        cohort,
        drawn.exposed,
        [c for c in everybody if c.device.id not in taken],
        seed,
        engine=pinned.policy.judged.engine,
        inside=frozenset(c.device.id for c in inside),
        serving=frozenset(m.device for m in members.values() if m.arm is Arm.CONTROL),
        best_first=drawn.valid_from is not None,
    )
    return _Drawn(
        exposed=drawn.exposed,
        control=matched.chosen,
        size=drawn.size,
        floor=matched.floor,
        valid_from=drawn.valid_from,
        held_out=len(kept_out),
        warnings=(*drawn.warnings, *matched.warnings),
        columns=drawn.columns,
    )


def _place(pinned: Pinned, wave: Wave) -> tuple[bool, bool]:
    """(is this the first wave, does it follow a first one that was best_first)."""
    normal = [w for w in pinned.waves if not w.fixes]
    place = [w.index for w in normal].index(wave.index)  # it may have grown
    cohorts = {cohort.name: cohort for cohort in pinned.fleet.cohorts}
    opener = cohorts[normal[0].step.cohort].select
    best = opener is not None and opener.mode is Mode.BEST_FIRST
    return place == 0, place == 1 and best


def _inside(
    rollout: Rollout,
    pinned: Pinned,
    wave: Wave,
    cohort: Cohort,
    everybody: list[Candidate],
    members: Mapping[str, Member],
) -> list[Candidate]:
    """The cohort's devices now; who was drawn from a cohort is still in it."""
    names = {w.index: w.step.cohort for w in pinned.waves if not w.fixes}
    drawn = {
        m.device: names[m.step]
        for m in members.values()
        if m.arm is Arm.EXPOSED and m.step in names
    }
    cohorts = assign(pinned.fleet.cohorts, everybody, rollout.seed, drawn)
    inside = cohorts[cohort.name]
    if wave.index == len(pinned.waves) - 1 and wave.step.percent == 1:
        already = frozenset(m.device for m in members.values() if m.arm is not Arm.CONTROL)
        inside = inside + _passed_by(pinned, cohorts, cohort.name, already)
    return inside


def _passed_by(
    pinned: Pinned, cohorts: dict[str, list[Candidate]], last: str, already: frozenset[str]
) -> list[Candidate]:
    """Devices that their score moved into a cohort whose steps were over: theirs is the last."""
    whole = {wave.step.cohort for wave in pinned.waves if wave.step.percent == 1} - {last}
    return [c for name in sorted(whole) for c in cohorts[name] if c.device.id not in already]


def _draw_fix(
    world: World, rollout: Rollout, wave: Wave, everybody: list[Candidate], seed: str
) -> _Drawn:
    ran = set(opening.who_ran(world, rollout.fleet, wave.fixes or ""))
    those = [c for c in everybody if c.device.id in ran]
    first, control = halves(those, seed)
    free = [c for c in control if c.device.id not in world.members.get(rollout.id, {})]
    return _Drawn(exposed=first, control=free, size=len(those))


def _draw_recall(
    world: World,
    rollout: Rollout,
    pinned: Pinned,
    wave: Wave,
    everybody: list[Candidate],
    members: Mapping[str, Member],
    seed: str,
    now: float,
) -> _Drawn:
    """The next of a recall's ramp, from the whole fleet; first whom we can reach."""
    already = frozenset(m.device for m in members.values() if m.arm is not Arm.CONTROL)
    limit = patience(world, rollout)
    free = [
        c
        for c in everybody
        if c.device.id not in already
        and not runs(world, rollout, c.device)
        and may_take(world, rollout, pinned, c.device)
    ]
    free.sort(
        key=lambda c: (
            not reachable(world, c.device.id, limit, now),
            rank(f"{seed}/recall", c.device.id),
        )
    )
    exposed = sum(m.arm is Arm.EXPOSED for m in members.values())
    room = len(free) if wave.ramp is None else max(0, wave.ramp - exposed)
    return _Drawn(exposed=free[:room], control=(), size=len(free))


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
        if device.fleet == rollout.fleet and device.governed and pinned.release.fits(device.labels)
    ]
    return scored(fits, score.values if score else {})


def may_take(world: World, rollout: Rollout, pinned: Pinned, device: Device) -> bool:
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


def runs(world: World, rollout: Rollout, device: Device) -> bool:
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
