"""Counts how the members of a step stand: told, decided, waiting, out of reach.

Pure. A device is within reach while it was heard within the patience, on the hearing clock.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from controller.rollout.follow import unheard
from controller.rollout.model import (
    Arm,
    Member,
    MemberState,
    Rollout,
)
from controller.rollout.world import World

HEARTBEATS = 6  # of silence, before a device counts as silent
HEARTBEAT = 60.0  # seconds; the agent's default
HEARD_LATELY = 5.0  # seconds since our own probe came through that are no outage


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


def patience(world: World, rollout: Rollout) -> float:
    """Seconds without contact after which an activated device counts as silent."""
    declared = world.pinned[rollout.id].rollout.strategy.silent_after
    return declared.total_seconds() if declared is not None else HEARTBEATS * HEARTBEAT


def deaf(world: World, now: float) -> bool:
    """Are our own ears shut: broker or ingest away? Then nothing is learnt, and nothing decided."""
    return world.heard_at is not None and now - world.heard_at > HEARD_LATELY


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
