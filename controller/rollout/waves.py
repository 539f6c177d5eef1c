"""What a rollout pinned when it opened, and the waves that its steps make.

A step that keeps devices back is two waves: one without them, watched for so long, and one of them.

A release that `fixes` another one gets a wave of its own before the first step: devices that ran
the faulty release, split at random into wave and control, so that the fix is judged first where
the fault was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

from controller.manifests.kinds import Fleet, HealthPolicy, Release, Rollout, Step

RAMPS: tuple[int | None, ...] = (10, 100, 1000, None)  # of a recall: devices in all; None: all


@dataclass(frozen=True, slots=True, kw_only=True)
class Wave:
    """One step as it will be carried out. `fixes`: drawn from who ran that release."""

    index: int
    step: Step
    fixes: str | None = None
    recall: bool = False
    ramp: int | None = None  # of a recall: devices told in all by its end; None: all

    @property
    def name(self) -> str:
        if self.recall:
            return "recall, all" if self.ramp is None else f"recall, first {self.ramp:,}"
        share = f"{self.step.percent:.0%}" if self.step.percent < 1 else "all"
        return f"{self.fixes}'s devices" if self.fixes else f"{self.step.cohort} {share}"


DOUBLINGS = 2  # of a wave, at most


def doublings(flags: Mapping[str, Any], step: int) -> int:
    """How often this step has grown."""
    return int(flags.get("doublings", 1)) if flags.get("grown") == step else 0


def grown(waves: tuple[Wave, ...], wave: Wave, times: int = 1) -> Wave:
    """The wave at twice its size, so many times: what it was planned to add is doubled."""
    cohort = [w for w in waves if w.step.cohort == wave.step.cohort]
    before = max((w.step.percent for w in cohort if w.index < wave.index), default=0.0)
    # Who is kept back waits until the others were watched, however many those are.
    kept = (w.step.percent for w in cohort if w.index >= wave.index and w.step.keep_back)
    most = min(kept, default=1.0)
    percent = min(most, before + 2**times * (wave.step.percent - before))
    step = wave.step.model_copy(update={"percent": max(wave.step.percent, percent)})
    return replace(wave, step=step)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pinned:
    """Policy, release, cohorts and steps as they were when the rollout opened."""

    rollout: Rollout
    fleet: Fleet
    policy: HealthPolicy
    release: Release
    waves: tuple[Wave, ...]

    @property
    def recall(self) -> bool:
        return any(wave.recall for wave in self.waves)

    def to_json(self) -> dict[str, Any]:
        return {
            "rollout": self.rollout.model_dump(mode="json"),
            "fleet": self.fleet.model_dump(mode="json"),
            "policy": self.policy.model_dump(mode="json"),
            "release": self.release.model_dump(mode="json"),
            "fixes": next((wave.fixes for wave in self.waves if wave.fixes), None),
            **({"recall": True} if self.recall else {}),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Pinned:
        return pin(
            Rollout.model_validate(data["rollout"]),
            Fleet.model_validate(data["fleet"]),
            HealthPolicy.model_validate(data["policy"]),
            Release.model_validate(data["release"]),
            fixes=data.get("fixes"),
            urgent=bool(data.get("recall")),
        )


def recalled(rollout: Rollout, fleet: Fleet) -> Rollout:
    """The rollout as a recall carries it out: its ramps, no soak, no window, no holdout."""
    step = Step(cohort=fleet.cohorts[-1].name, percent=1.0, soak=timedelta(0))
    strategy = rollout.strategy.model_copy(update={"steps": (step,) * len(RAMPS)})
    return rollout.model_copy(update={"strategy": strategy, "windows": (), "holdout": None})


def plain_steps(pinned: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The steps of the waves, by what `Pinned.to_json` wrote; without the first one of a fix."""
    steps = pinned.get("rollout", {}).get("strategy", {}).get("steps", ())
    found: list[dict[str, Any]] = []
    for step in steps:
        parts = _parts(Step.model_validate(step)) if step.get("keep_back") else ()
        found += [part.model_dump(mode="json") for part in parts] or [step]
    return found


def _parts(step: Step) -> tuple[Step, ...]:
    """The devices kept back are controls of the others meanwhile; then they follow at once.

    Only the first part has `keep_back`: it grows into nobody who is kept back from it.
    """
    if step.keep_back is None:
        return (step,)
    kept, seconds = step.keep_back, max(step.soak, step.keep_back.for_)
    watched = step.model_copy(
        update={
            "percent": step.percent - kept.percent,
            "soak": seconds,
            "max_soak": step.max_soak and max(step.max_soak, seconds),
        }
    )
    rest = step.model_copy(
        update={"soak": timedelta(0), "max_soak": None, "pause": None, "keep_back": None}
    )
    return watched, rest


def pin(
    rollout: Rollout,
    fleet: Fleet,
    policy: HealthPolicy,
    release: Release,
    *,
    fixes: str | None = None,
    urgent: bool = False,
) -> Pinned:
    """Pin what a rollout is judged by; `fixes` only when there are devices that ran that one.

    `urgent`: as a recall, see `controller.rollout.recall`.
    """
    if urgent:
        rollout = recalled(rollout, fleet)
        waves = tuple(
            Wave(index=i, step=step, recall=True, ramp=RAMPS[i])
            for i, step in enumerate(rollout.strategy.steps)
        )
        return Pinned(rollout=rollout, fleet=fleet, policy=policy, release=release, waves=waves)
    steps = [part for step in rollout.strategy.steps for part in _parts(step)]
    first = (Wave(index=0, step=steps[0], fixes=fixes),) if fixes else ()
    rest = tuple(Wave(index=len(first) + i, step=step) for i, step in enumerate(steps))
    return Pinned(rollout=rollout, fleet=fleet, policy=policy, release=release, waves=first + rest)
