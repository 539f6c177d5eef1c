"""Puts together what the gate judges: members' outcomes, silence, observations, limits.

Pure. A device that was told but has not begun (offline, deferred) is in no denominator: one dead
device blocks nobody. A device that went silent after its commit speaks in the silence guardrail,
against the control's silence; only one that never confirmed is a failed update.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from controller.rollout import revisions
from controller.rollout.follow import AFTER_COMMIT
from controller.rollout.gate import AbortFailed, Case, Outcome, Past, Silence, StepLimits
from controller.rollout.model import Arm, Member, MemberState, Rollout, RolloutState
from controller.rollout.standing import Alike, Standing
from controller.rollout.waves import Pinned, Wave
from controller.rollout.world import World
from device_agent.protocol import State
from telemetry.evidence.observations import Observations
from telemetry.report import DeviceRow

CLEAN_DEVICES = 4.0  # ÷ n: the share that n devices without failure refute at β = 0.10

__all__ = ["Case", "build"]


def build(
    world: World,
    rollout: Rollout,
    pinned: Pinned,
    wave: Wave,
    seen: Standing,
    groups: Mapping[Alike, int],
) -> Case:
    """The case of the current step of this rollout."""
    strategy, step = pinned.rollout.strategy, wave.step
    abort = strategy.abort_failed
    extended = float(rollout.flags.get("extended_at", 0.0))
    return Case(
        policy=pinned.policy.judged,
        step=StepLimits(
            wave=wave.index,
            name=wave.name,
            min_soak=step.soak.total_seconds(),
            max_soak=step.max_soak.total_seconds() + extended if step.max_soak else None,
            soaked=rollout.soak,
            min_reporting=strategy.min_reporting,
            reporting=seen.reporting,
            updated=seen.updated,
            margins=_margins(wave, rollout, groups),
            fix=wave.fixes is not None,
            valid_from=rollout.flags.get("valid_from"),
        ),
        observations=world.observations.get(rollout.id, Observations()),
        outcomes=_outcomes(groups),
        silence=_silence(groups),
        abort_failed=AbortFailed(count=abort.count, share=abort.share) if abort else None,
        max_failed=strategy.max_failed,
        history=_history(world, rollout),
        release=rollout.release,
        commit=rollout.commit[:7],
        weights=rollout.flags.get("strata", {}),
        incomparable=revisions.of_rollout(world, rollout, pinned),
    )


def _margins(wave: Wave, rollout: Rollout, groups: Mapping[Alike, int]) -> dict[str, float]:
    """The step's own margins. A fix's first wave is as large as the fault was: few devices prove
    less, and expose fewer, so that the share to refute is what so many clean devices can refute.
    """
    margins = dict(wave.step.margins)
    if wave.fixes:
        size = sum(n for a, n in groups.items() if a.step == rollout.step and a.arm is Arm.EXPOSED)
        for name in ("failed", "lost"):
            provable = min(0.9, CLEAN_DEVICES / max(size, 1))
            margins[name] = max(margins.get(name, 0.0), provable)
    return margins


def _outcomes(groups: Mapping[Alike, int]) -> tuple[Outcome, ...]:
    counted: dict[tuple[int, str], Counter[str]] = {}
    for alike, n in groups.items():
        if alike.arm is Arm.EXPOSED and alike.word:
            counted.setdefault((alike.step, alike.hardware), Counter())[alike.word] += n
    return tuple(
        Outcome(
            wave=wave,
            hardware=hardware,
            started=sum(words.values()),
            committed=words["committed"],
            failed=words["failed"],
            silent=words["silent"],
            lost=words["lost"],
            activating=words["activating"],
            pending=words["pending"],
        )
        for (wave, hardware), words in sorted(counted.items())
    )


def outcome(member: Member, row: DeviceRow | None) -> str:
    """What became of one member; empty when it has not begun."""
    match member.state:
        case MemberState.UPDATED:
            return "committed"
        case MemberState.FAILED:
            return "failed"
        case MemberState.SILENT if member.reason.endswith(AFTER_COMMIT):
            return "committed"
        case MemberState.SILENT:
            return "lost" if row is not None and row.state is State.ACTIVATING else "silent"
        case MemberState.TOLD if row is not None and row.attempt == member.attempt:
            if row.state is State.ACTIVATING:
                return "activating"
            begun = row.state in (State.INSTALLING, State.INSTALLED)
            return "pending" if begun or member.exposed_at is not None else ""
        case MemberState.TOLD if member.exposed_at is not None:
            return "pending"
    return ""


def _silence(groups: Mapping[Alike, int]) -> tuple[Silence, ...]:
    counted: dict[tuple[int, str], Counter[str]] = {}
    for alike, n in groups.items():
        if alike.state is MemberState.LEFT or not alike.exposed or alike.arm is Arm.RETURNING:
            continue
        words = counted.setdefault((alike.step, alike.hardware), Counter())
        words[alike.arm] += n
        if alike.state is MemberState.SILENT:
            words[f"{alike.arm} silent"] += n
    return tuple(
        Silence(
            wave=wave,
            hardware=hardware,
            exposed=words[Arm.EXPOSED],
            exposed_silent=words["exposed silent"],
            control=words[Arm.CONTROL],
            control_silent=words["control silent"],
        )
        for (wave, hardware), words in sorted(counted.items())
        if words[Arm.EXPOSED]
    )


def _history(world: World, rollout: Rollout) -> tuple[Past, ...]:
    """Failures of the fleet's earlier completed rollouts, newest last."""
    past = []
    for other in sorted(world.rollouts.values(), key=lambda r: (r.opened_at, r.id)):
        if other.fleet != rollout.fleet or other.state is not RolloutState.COMPLETED:
            continue
        failed, lost, updated = ended(world, other)
        if started := failed + lost + updated:
            past.append(Past(failed=failed, lost=lost, started=started))
    return tuple(past[-5:])


def ended(world: World, rollout: Rollout) -> tuple[int, int, int]:
    """(failed, never confirmed, updated) of a rollout that has ended: they stand still then."""
    if (known := world.ended.get(rollout.id)) is not None:
        return known
    members = [m for m in world.members.get(rollout.id, {}).values() if m.arm is Arm.EXPOSED]
    silent = [m for m in members if m.state is MemberState.SILENT]
    lost = sum(not m.reason.endswith(AFTER_COMMIT) for m in silent)
    failed = sum(m.state is MemberState.FAILED for m in members)
    updated = sum(m.state is MemberState.UPDATED for m in members)
    return failed, lost, updated + len(silent) - lost
