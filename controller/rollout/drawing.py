"""Decides whom a step exposes, and who is its control: once, when it opens.

Pure. An empty cohort stops the rollout (NoMembers) with the reason; it never passes. A fix's first
wave is drawn from the devices that ran the faulty release. Who may be drawn: active devices of the
fleet that the release is compatible with, from a source version that it allows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from controller.rollout import opening
from controller.rollout.cohort import Candidate, assign, draw, halves, scored
from controller.rollout.desired import in_range
from controller.rollout.follow import runs_target
from controller.rollout.model import (
    Arm,
    Device,
    Member,
    Rollout,
    RolloutState,
)
from controller.rollout.waves import Pinned, Wave
from controller.rollout.world import Action, Change, Decision, Put, World


def draw_step(
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
        there = frozenset(c.device.id for c in inside if runs(world, rollout, c.device))
        drawn = draw(
            cohort,
            inside=[c for c in inside if may_take(world, rollout, pinned, c.device)],
            everybody=[c for c in everybody if not runs(world, rollout, c.device)],
            already=already | there,
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
        if device.fleet == rollout.fleet and device.governed and compatible(pinned, device)
    ]
    return scored(fits, score.values if score else {})


def compatible(pinned: Pinned, device: Device) -> bool:
    for artifact in pinned.release.artifacts:
        for label, allowed in artifact.compatible.items():
            if device.labels.get(label) not in allowed:
                return False
    return True


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
