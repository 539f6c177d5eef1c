"""The states of a rollout and of its members, and the frozen rows that decisions are made of.

Only data and the few predicates that every rule shares. Times are Unix seconds; `None` means
"not yet". What changes a rollout is `controller.rollout.reconcile`, nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

# What turns the direction of writing around, to the end of its paragraph.
_TURNS = re.compile("[\u202a-\u202e\u2066-\u2069]")


def quoted(text: str) -> str:
    """A person's words within a sentence of ours: one line, after which ours goes on as before.

    A reason may have paragraphs; a second line of it must not read as our next one.
    """
    return " ".join(_TURNS.sub("", text).split())


class RolloutState(StrEnum):
    PENDING = "Pending"  # accepted, waits: queue, window, suspend, a hold
    PROGRESSING = "Progressing"  # members of the step are being told
    SOAKING = "Soaking"  # enough of them are decided; evidence gathers
    PAUSED = "Paused"  # by a person, or by a step's `pause: {}`
    HELD = "Held"  # rejected, devices stay
    ROLLING_BACK = "RollingBack"
    ROLLED_BACK = "RolledBack"
    COMPLETED = "Completed"  # every reachable device decided, the unreached listed
    SUPERSEDED = "Superseded"
    NO_MEMBERS = "NoMembers"
    INCONCLUSIVE = "Inconclusive"  # maximum soak without proof: a person decides


ACTIVE = frozenset(
    {
        RolloutState.PENDING,
        RolloutState.PROGRESSING,
        RolloutState.SOAKING,
        RolloutState.PAUSED,
        RolloutState.NO_MEMBERS,
        RolloutState.INCONCLUSIVE,
    }
)
ADMITTING = frozenset({RolloutState.PROGRESSING, RolloutState.SOAKING})


class Arm(StrEnum):
    EXPOSED = "exposed"
    CONTROL = "control"
    RETURNING = "returning"  # `git revert`: has run this digest in health, goes at rollback pace


class MemberState(StrEnum):
    DRAWN = "drawn"  # not told yet
    TOLD = "told"  # the order is out; not decided
    UPDATED = "updated"  # committed the target under this attempt
    FAILED = "failed"
    SILENT = "silent"  # activated, then no contact
    BACK = "back"  # returned to what it should run after a rollback
    LEFT = "left"  # moved, retired, replaced, quarantined: out of every denominator


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    device: str
    step: int
    arm: Arm
    drawn_at: float
    hardware: str
    band: int
    score: float | None
    previous: Mapping[str, Mapping[str, Any]] | None = None  # component → {release, digest}
    state: MemberState = MemberState.DRAWN
    reason: str = ""
    attempt: str | None = None
    told_at: float | None = None
    exposed_at: float | None = None
    left_at: float | None = None
    updated_at: float = 0.0

    @property
    def harmed(self) -> bool:
        return self.state in (MemberState.FAILED, MemberState.SILENT)

    def leads_back(self, rejected: Collection[str]) -> bool:
        """Does it know what the device ran before, and is none of that among these digests?"""
        before = self.previous or {}
        return bool(before) and not any(told["digest"] in rejected for told in before.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """Whom a step drew as its control: a member's row tells only what it became since."""

    step: int
    at: float
    control: Sequence[str]
    bands: Mapping[str, int] = field(default_factory=dict)  # of the controls, as they were drawn

    @classmethod
    def recorded(cls, inputs: Mapping[str, Any], at: float) -> Draw:
        """From the inputs of its decision."""
        control = list(inputs.get("control", ()))
        bands = dict(zip(control, inputs.get("control_bands", ()), strict=False))
        step = int(str(inputs["seed"]).rpartition("/")[2])
        return cls(step=step, at=at, control=control, bands=bands)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    id: str
    name: str
    fleet: str
    release: str
    digest: str
    artifacts: Mapping[str, str]  # component → artifact digest
    commit: str
    author: str
    state: RolloutState
    sentence: str
    revision: int
    step: int
    opened_at: float
    step_at: float
    soak: float = 0.0
    soak_mark: float | None = None
    finished_at: float | None = None
    updated_at: float = 0.0
    seed: str
    pinned: Mapping[str, Any]  # {rollout, fleet, policy, release, waves}: as at opening
    flags: Mapping[str, Any] = field(default_factory=dict)

    @property
    def active(self) -> bool:
        return self.state in ACTIVE


@dataclass(frozen=True, slots=True, kw_only=True)
class ActiveHold:
    """A hold in force: one digest, and the artifacts in it, excluded in one fleet."""

    id: str
    rollout: str
    fleet: str
    release: str
    digest: str
    artifacts: frozenset[str]
    to: str  # stay | previous | <release>
    reason: str
    actor: str
    created_at: float
    scope: Mapping[str, Any] = field(default_factory=lambda: {"all": True})

    @property
    def whole(self) -> bool:
        """Is it against everybody? Then it ends the rollout; else `controller.rollout.scope`."""
        return "all" in self.scope

    def rejects(self, digest: str, artifacts: Mapping[str, str]) -> bool:
        return digest == self.digest or not self.artifacts.isdisjoint(artifacts.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class ActiveStop:
    id: str
    scope: str  # all | product | hardware | digest
    value: str
    reason: str
    actor: str
    artifacts: frozenset[str] = frozenset()  # of the release that has this digest
    fleets: frozenset[str] = frozenset()  # that are labelled as this product

    def covers(self, device: Device, digests: Collection[str], product: str | None = None) -> bool:
        """Is a new activation of these on this device in its scope? `product`: its fleet's label.

        A product is meant by its label, on the device or on its fleet, or by the fleet's name:
        what is stopped too widely is set free by a word, what went on is not called back.
        """
        match self.scope:
            case "all":
                return True
            case "hardware":
                return device.hardware == self.value
            case "digest":
                return self.value in digests or not self.artifacts.isdisjoint(digests)
        named = self.value in (device.labels.get("product"), device.fleet, product)
        return named or device.fleet in self.fleets


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A device as the registry knows it."""

    id: str
    fleet: str
    labels: Mapping[str, str]
    status: str
    moved_at: float | None = None
    term: int = 0

    @property
    def hardware(self) -> str:
        return self.labels.get("hardware", "")

    @property
    def governed(self) -> bool:
        return self.status == "active"


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What one component of a device was last told to be."""

    release: str
    digest: str
    at: float
    rollout: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """The last order of a device: what stands in the desired table."""

    device: str
    term: int
    generation: int
    attempt: str
    kind: str
    components: Mapping[str, Told]
    at: float
    not_after: float | None = None

    @property
    def digests(self) -> frozenset[str]:
        return frozenset(told.digest for told in self.components.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Proven:
    release: str
    digest: str
    at: float
