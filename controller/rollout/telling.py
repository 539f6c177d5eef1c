"""Decides who is told now: within the step's limits, outside Deny windows, one component at a time.

Pure. A device that was never heard, or is out of reach, waits and blocks nobody; one that waits for
a requirement, a window or another component says so in its reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from controller.rollout import opening, windows
from controller.rollout.cohort import rank
from controller.rollout.desired import satisfied, stopped
from controller.rollout.model import (
    Arm,
    Member,
    MemberState,
    Rollout,
)
from controller.rollout.standing import patience, reachable
from controller.rollout.waves import Pinned, Wave
from controller.rollout.world import World


def told(
    world: World, rollout: Rollout, pinned: Pinned, wave: Wave, now: float
) -> Iterator[Member]:
    """Members that are told now, and those whose reason for waiting has changed."""
    if held_back(world, rollout):
        return
    members = world.members.get(rollout.id, {})
    ours = [m for m in members.values() if m.step == rollout.step and m.arm is Arm.EXPOSED]
    room = _room(world, rollout, wave, ours, now)
    waiting = [m for m in ours if m.state is MemberState.DRAWN]
    waiting.sort(key=lambda m: rank(f"{rollout.seed}/tell", m.device))
    for member in waiting:
        row = world.seen.get(member.device)
        if row is None or not reachable(world, member.device, patience(world, rollout), now):
            continue
        why = _waits(world, rollout, pinned, member, now)
        if why:
            if why != member.reason:
                yield replace(member, reason=why, updated_at=now)
            continue
        if room <= 0:
            continue
        room -= 1
        yield replace(
            member,
            state=MemberState.TOLD,
            reason="",
            attempt=f"{rollout.id}.{rollout.step}",
            told_at=now,
            previous=opening.previous(row, rollout),
            updated_at=now,
        )


def held_back(world: World, rollout: Rollout) -> str:
    head = world.head
    if head is None:
        return ""
    if head.stale:
        return "Git was not heard for too long: nothing widens"
    edited = head.manifests.rollouts.get(rollout.name)
    # A later edit may tighten at once: suspend stops telling; the rest of it waits for a release.
    return "suspended" if edited is not None and edited.suspend else ""


def _room(world: World, rollout: Rollout, wave: Wave, members: Iterable[Member], now: float) -> int:
    room = 1 << 30
    members = list(members)
    limit = patience(world, rollout)
    if wave.step.max_concurrent is not None:
        flying = sum(
            m.state is MemberState.TOLD and not m.reason and reachable(world, m.device, limit, now)
            for m in members
        )
        room = min(room, wave.step.max_concurrent - flying)
    if wave.step.max_per_minute is not None:
        lately = sum(m.told_at is not None and m.told_at > now - 60 for m in members)
        room = min(room, wave.step.max_per_minute - lately)
    return room


def _waits(world: World, rollout: Rollout, pinned: Pinned, member: Member, now: float) -> str:
    device, row = world.devices[member.device], world.seen[member.device]
    if stopped(device, rollout.artifacts.values(), world.stops):
        return "stopped"
    closed = windows.closed(pinned.rollout.windows, device, now)
    if closed:
        return closed
    for other_id, others in world.members.items():
        other = others.get(member.device)
        if other_id != rollout.id and other is not None and _flying(world, other_id, other):
            return "component_busy"
    versions = {c: world.catalog.version(c, r.digest) for c, r in row.components.items()}
    versions |= dict.fromkeys(rollout.artifacts, pinned.release.version)
    met, why = satisfied(pinned.release, versions)
    return "" if met else why


def _flying(world: World, rollout: str, member: Member) -> bool:
    active = world.rollouts[rollout].active if rollout in world.rollouts else False
    return active and member.state is MemberState.TOLD and member.arm is not Arm.CONTROL
