"""What a decision sees and what it may answer: the loop's snapshot, and the actions.

Data only: the loop fills a `World` from Git, registry, telemetry and its own tables; `reconcile`
answers `Action`s; the loop records them in one transaction and then acts.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from controller.manifests.reader import Manifests
from controller.rollout.desired import Catalog
from controller.rollout.model import (
    ActiveHold,
    ActiveStop,
    Device,
    Member,
    Order,
    Proven,
    Rollout,
)
from controller.rollout.waves import Pinned
from telemetry.evidence.ledger import Observations
from telemetry.report import DeviceRow

if TYPE_CHECKING:
    from controller.rollout.muster import Muster


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The accepted commit, and what it says. `blocked`: rollout name → why it may not move."""

    commit: str
    author: str
    manifests: Manifests
    blocked: Mapping[str, str] = field(default_factory=dict)
    stale: bool = False  # Git was not heard for longer than gitStaleAfter: stops widening
    asked: bool = True  # this process has asked Git: before, a newer hold may stand there
    heard: bool = True  # and Git has answered


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    id: str
    kind: str
    rollout: str | None
    body: Mapping[str, Any]
    actor: str
    reason: str
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """Scores of a fleet as last computed: device → (score or None, band)."""

    at: float
    values: Mapping[str, tuple[float | None, int]]
    unscored: int
    min_exposure: float


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    head: Head | None
    devices: Mapping[str, Device]
    seen: Mapping[str, DeviceRow]
    hearing: float  # the hearing clock, seconds
    deaf: Sequence[tuple[float, float]]  # recent outages of our own ears: [from, to]
    rollouts: Mapping[str, Rollout]  # all unfinished ones, and the newest of each name
    members: Mapping[str, Mapping[str, Member]]
    pinned: Mapping[str, Pinned]
    orders: Mapping[str, Order]
    holds: Sequence[ActiveHold]
    rejected: frozenset[str]  # release digests that any hold, lifted or not, ever named
    stops: Sequence[ActiveStop]
    commands: Sequence[Command]
    proven: Mapping[tuple[str, str, str], Proven]  # (fleet, component, hardware)
    catalog: Catalog
    scores: Mapping[str, Scored]  # by fleet
    observations: Mapping[str, Observations]  # by rollout id
    watermark: int
    heard_at: float | None = None  # server time of our last own probe; None: nobody asked
    rules: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # fleet → approvals rule
    granted: Mapping[str, str] = field(default_factory=dict)  # rollout id → who approved its start
    recovered: bool = False  # the database was wiped: unfinished work opens Paused
    restored: bool = False  # it is older than what devices were told: what moves is paused
    blind: bool = False  # telemetry cannot be read: holds and stops alone are acted upon
    unordered: Container[str] = ()  # devices whose order is still to be composed
    # Rollout id → its members as counted so far; where one is missing they are counted anew.
    musters: Mapping[str, Muster] = field(default_factory=dict)
    # Rollout id → (failed, never confirmed, updated), so far.
    ended: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """A row of `decisions`: what was decided, from what, and the sentence for people."""

    rollout: str
    kind: str  # open | draw | verdict | command | state
    verdict: str
    sentence: str
    inputs: Mapping[str, Any] = field(default_factory=dict)
    numbers: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Open:
    rollout: Rollout
    pinned: Pinned


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    rollout: Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class Put:
    rollout: str
    members: tuple[Member, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reject:
    """The policy rejects this rollout's digest: becomes a hold."""

    rollout: str
    to: str
    reason: str
    actor: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Prove:
    fleet: str
    component: str
    hardware: str
    proven: Proven


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """A command is done or refused."""

    command: str
    state: str  # done | refused
    result: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """Something a person should see that changes nothing: a commit that names a held digest."""

    name: str
    sentence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What the evidence says at a moment of a soak in which nothing is decided: for the chart."""

    rollout: str
    numbers: Mapping[str, Any]


Action = Decision | Open | Change | Put | Reject | Prove | Finish | Notice | Look
