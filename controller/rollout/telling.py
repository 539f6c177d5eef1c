"""Decides who is told now: within the step's limits, outside Deny windows, one component at a time.

Pure. A device that was never heard, or is out of reach, waits and blocks nobody; one that waits for
a requirement, a window or another component says so in its reason. Who went back for want of a link
while ours was down is told once more, within the same limits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from controller.rollout import opening, recall, windows
from controller.rollout.desired import satisfied, stopped
from controller.rollout.model import Arm, Member, MemberState, Rollout
from controller.rollout.standing import Alike
from controller.rollout.waves import Pinned, Wave
from controller.rollout.world import World

if TYPE_CHECKING:
    from controller.rollout.muster import Muster


def told(
    world: World, rollout: Rollout, wave: Wave, muster: Muster, busy: set[str], now: float
) -> Iterator[Member]:
    """Members that are told now, and those whose reason for waiting has changed.

    `busy`: devices that another rollout tells in this very turn; whom we tell is added.
    """
    if held_back(world, rollout, now):
        return
    members = world.members.get(rollout.id, {})
    for device in sorted(muster.unsaid):
        yield replace(members[device], reason=muster.why(device), updated_at=now)
    room = _room(rollout, wave, muster, now)
    for device in muster.ready if room > 0 else ():
        if device in busy:
            continue
        if room <= 0:
            break
        room -= 1
        busy.add(device)
        yield replace(
            members[device],
            state=MemberState.TOLD,
            reason="",
            attempt=members[device].attempt or f"{rollout.id}.{rollout.step}",
            told_at=now,
            previous=members[device].previous or opening.previous(world.seen[device], rollout),
            updated_at=now,
        )


def next_look(wave: Wave, muster: Muster, now: float) -> float | None:
    """When the minute of `maxPerMinute` lets somebody go who is ready; None: none waits for it."""
    if wave.step.max_per_minute is None or not muster.ready:
        return None
    oldest = muster.told_next(now - 60)
    return None if oldest is None else oldest + 60


def held_back(world: World, rollout: Rollout, now: float) -> str:
    head = world.head
    if head is None:
        return ""
    if not head.asked:
        return "Git is being asked: a newer hold may stand there"
    if head.stale:
        return "Git was not heard for too long: nothing widens"
    pinned = world.pinned.get(rollout.id)
    if pinned is not None and pinned.recall and recall.expired(pinned.rollout, now):
        return "the recall has expired: declare it again"
    edited = head.manifests.rollouts.get(rollout.name)
    # A later edit may tighten at once: suspend stops telling; the rest of it waits for a release.
    return "suspended" if edited is not None and edited.suspend else ""


def _room(rollout: Rollout, wave: Wave, muster: Muster, now: float) -> int:
    room = 1 << 30
    if wave.step.max_concurrent is not None:
        flying = sum(n for alike, n in muster.groups.items() if _in_flight(alike, rollout.step))
        room = min(room, wave.step.max_concurrent - flying)
    if wave.step.max_per_minute is not None:
        room = min(room, wave.step.max_per_minute - muster.told_since(now - 60))
    return room


def _in_flight(alike: Alike, step: int) -> bool:
    ours = alike.step == step and alike.arm is Arm.EXPOSED
    return ours and alike.state is MemberState.TOLD and not alike.note and alike.near


def waits(
    world: World,
    rollout: Rollout,
    pinned: Pinned,
    member: Member,
    others: Sequence[str],
    now: float,
) -> str:
    """Why a drawn member within reach may not be told now; empty when it may.

    `others`: the ids of the other active rollouts.
    """
    device, row = world.devices[member.device], world.seen[member.device]
    # By what is pinned: a stop may be older than this release, and than its fleet's label.
    brings = {rollout.digest, *rollout.artifacts.values()}
    product = pinned.fleet.labels.get("product")
    if stopped(device, brings, world.stops, product):
        return "stopped"
    closed = windows.closed(pinned.rollout.windows, device, now)
    if closed:
        return closed
    for name in others:
        other = world.members.get(name, {}).get(member.device)
        if other is not None and other.state is MemberState.TOLD and other.arm is not Arm.CONTROL:
            return "component_busy"
    versions = {c: world.catalog.version(c, r.digest) for c, r in row.components.items()}
    versions |= dict.fromkeys(rollout.artifacts, pinned.release.version)
    met, why = satisfied(pinned.release, versions)
    return "" if met else why
