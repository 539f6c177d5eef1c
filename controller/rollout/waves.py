"""What a rollout pinned when it opened, and the waves that its steps make.

A release that `fixes` another one gets a wave of its own before the first step: devices that ran
the faulty release, split at random into wave and control, so that the fix is judged first where
the fault was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from controller.manifests.kinds import Fleet, HealthPolicy, Release, Rollout, Step


@dataclass(frozen=True, slots=True, kw_only=True)
class Wave:
    """One step as it will be carried out. `fixes`: drawn from who ran that release."""

    index: int
    step: Step
    fixes: str | None = None

    @property
    def name(self) -> str:
        share = f"{self.step.percent:.0%}" if self.step.percent < 1 else "all"
        return f"{self.fixes}'s devices" if self.fixes else f"{self.step.cohort} {share}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pinned:
    """Policy, release, cohorts and steps as they were when the rollout opened."""

    rollout: Rollout
    fleet: Fleet
    policy: HealthPolicy
    release: Release
    waves: tuple[Wave, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "rollout": self.rollout.model_dump(mode="json"),
            "fleet": self.fleet.model_dump(mode="json"),
            "policy": self.policy.model_dump(mode="json"),
            "release": self.release.model_dump(mode="json"),
            "fixes": next((wave.fixes for wave in self.waves if wave.fixes), None),
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Pinned:
        return pin(
            Rollout.model_validate(data["rollout"]),
            Fleet.model_validate(data["fleet"]),
            HealthPolicy.model_validate(data["policy"]),
            Release.model_validate(data["release"]),
            fixes=data.get("fixes"),
        )


def pin(
    rollout: Rollout,
    fleet: Fleet,
    policy: HealthPolicy,
    release: Release,
    *,
    fixes: str | None = None,
) -> Pinned:
    """Pin what a rollout is judged by; `fixes` only when there are devices that ran that one."""
    steps = rollout.strategy.steps
    first = (Wave(index=0, step=steps[0], fixes=fixes),) if fixes else ()
    rest = tuple(Wave(index=len(first) + i, step=step) for i, step in enumerate(steps))
    return Pinned(rollout=rollout, fleet=fleet, policy=policy, release=release, waves=first + rest)
