"""Counts how the members of a step stand: told, decided, waiting, out of reach.

Pure. A device is within reach while it was heard within the patience, on the hearing clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from controller.manifests.kinds import OfflineAction
from controller.rollout.follow import unheard
from controller.rollout.model import Arm, Member, MemberState, Rollout
from controller.rollout.world import World

HEARTBEATS = 6  # of silence, before a device counts as silent
HEARTBEAT = 60.0  # seconds; the agent's default
HEARD_LATELY = 5.0  # seconds since our own probe came through that are no outage


class Alike(NamedTuple):
    """What members that are counted together have in common."""

    step: int
    arm: Arm
    hardware: str
    state: MemberState
    near: bool  # heard within the patience
    exposed: bool  # its exposure has begun
    word: str  # what became of it, as the gate counts it: committed, failed, …; "": not begun
    note: str  # drawn: why it is not told; told: "deferred" where the device says why it waits
    bound: bool = False  # going back: it has nowhere to go
    lost: bool = False  # going back: it tried to, and did not come back
    overdue: bool = False  # out of reach for longer than `offline.countAfter`


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
    overdue: int  # of them, for longer than `offline.countAfter`: nobody waits for these
    given_up: int  # out of reach for so long that it counts as failed (`offline: {action: fail}`)
    untold: int  # drawn and reachable, held back by our limits
    reporting: int  # updated and heard lately
    why: str = ""  # the most frequent reason of the untold

    @property
    def decided(self) -> int:
        return self.updated + self.failed + self.silent + self.given_up

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
            (self.given_up, "offline for too long"),
        ):
            if n:
                parts.append(f"{n} {word}")
        return ", ".join(parts)


def patience(world: World, rollout: Rollout) -> float:
    """Seconds without contact after which an activated device counts as silent."""
    declared = world.pinned[rollout.id].rollout.strategy.silent_after
    return declared.total_seconds() if declared is not None else HEARTBEATS * HEARTBEAT


def overdue(world: World, rollout: Rollout, member: Member, now: float) -> bool:
    """Is this member, told or not, out of reach for longer than `offline.countAfter`?

    Counted on the hearing clock, and not from before it was drawn.
    """
    if member.arm is not Arm.EXPOSED or member.state not in (MemberState.DRAWN, MemberState.TOLD):
        return False
    limit = count_after(world, rollout)
    row = world.seen.get(member.device)
    if limit is None or now - member.drawn_at <= limit:
        return False
    return row is None or unheard(row, world.hearing, now) > limit


def count_after(world: World, rollout: Rollout) -> float | None:
    """Seconds out of reach after which a member is waited for no more; None: nobody is."""
    offline = world.pinned[rollout.id].rollout.strategy.offline
    if offline.action is OfflineAction.DEFER:
        return None
    return offline.count_after.total_seconds()


def deaf(world: World, now: float) -> bool:
    """Are our own ears shut: broker or ingest away? Then nothing is learnt, and nothing decided."""
    return world.heard_at is not None and now - world.heard_at > HEARD_LATELY


def reachable(world: World, device: str, patience: float, now: float) -> bool:
    row = world.seen.get(device)
    return row is not None and unheard(row, world.hearing, now) <= patience


def standing(groups: Mapping[Alike, int], step: int) -> Standing:
    """Count the members of a step (the returning ones belong to no step)."""
    counted: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for alike, n in groups.items():
        if alike.step != step or alike.arm is not Arm.EXPOSED:
            continue
        counted[_standing(alike)] += n
        if alike.state is MemberState.DRAWN and alike.note:
            reasons[alike.note] += n
        if alike.state not in (MemberState.DRAWN, MemberState.LEFT):
            counted["told"] += n
        if alike.state is MemberState.UPDATED and alike.near:
            counted["reporting"] += n
        if alike.overdue:
            counted["overdue"] += n
    return Standing(
        told=counted["told"],
        updated=counted["updated"],
        failed=counted["failed"],
        silent=counted["silent"],
        waiting=counted["waiting"],
        deferred=counted["deferred"],
        offline=counted["offline"],
        overdue=min(counted["overdue"], counted["offline"]),
        given_up=counted["given_up"],
        untold=counted["untold"],
        reporting=counted["reporting"],
        why=min(reasons, key=lambda reason: (-reasons[reason], reason), default=""),
    )


def _standing(alike: Alike) -> str:
    if alike.overdue and alike.word:
        return "given_up"
    if alike.state is MemberState.DRAWN:
        return "untold" if alike.near else "offline"
    if alike.state is MemberState.TOLD:
        if not alike.near:
            return "offline"
        return "deferred" if alike.note else "waiting"
    return str(alike.state)
