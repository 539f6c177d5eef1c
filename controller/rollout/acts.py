"""The holds and lifts that a commit brings: which are in force after it, and whom they touch.

Pure.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from controller.manifests.kinds import Hold
from controller.manifests.reader import Manifests
from controller.rollout import scope
from controller.rollout.model import ActiveHold, Device, quoted
from controller.rollout.world import World


@dataclass(frozen=True, slots=True, kw_only=True)
class Act:
    """A Hold or a Lift that the commit adds."""

    kind: str
    id: str
    sentence: str
    devices: int


def in_force(world: World, before: Manifests, after: Manifests) -> list[ActiveHold]:
    """Holds in force once the head is accepted."""
    lifted = {lift.hold for lift in after.lifts.values()}
    known = {hold.id for hold in world.holds}
    found = [hold for hold in world.holds if hold.id not in lifted]
    for hold in after.holds.values():
        new = hold.id not in known and hold.id not in before.holds
        if new and hold.id not in lifted:
            found.append(_active(hold, world, after))
    return found


def _active(hold: Hold, world: World, manifests: Manifests) -> ActiveHold:
    rollout = manifests.rollouts.get(hold.rollout)
    release = manifests.releases.get(hold.rejects_release) or world.catalog.releases.get(
        hold.rejects_release
    )
    artifacts = {a.digest for a in release.components.values()} if release else set()
    fleet = rollout.fleet if rollout else ""
    proven = {p.digest for (f, _, _), p in world.proven.items() if f == fleet}
    return ActiveHold(
        id=hold.id, rollout=hold.rollout, fleet=fleet, release=hold.rejects_release,
        digest=hold.rejects_digest, artifacts=frozenset(artifacts - proven or artifacts),
        to=hold.to, reason=quoted(hold.reason), actor=hold.actor, created_at=world.hearing,
        scope=scope.in_git(hold.scope),
    )  # fmt: skip


def added(world: World, before: Manifests, after: Manifests) -> Iterator[Act]:
    for hold in sorted(after.holds.values(), key=lambda h: h.id):
        if hold.id in before.holds:
            continue
        active = _active(hold, world, after)
        n = sum(_touched(world, active))
        verb = "stay as they are" if hold.to == "stay" else f"go to {hold.to}"
        part = scope.words(active.scope)
        where = (active.fleet or hold.rollout) + (f" for {part}" if part else "")
        yield Act(
            kind="Hold",
            id=hold.id,
            devices=n,
            sentence=f"{hold.rejects_release} is rejected in {where}: "
            f"{n} devices that have it {verb} — {quoted(hold.reason)}",
        )
    for lift in sorted(after.lifts.values(), key=lambda item: item.id):
        if lift.id not in before.lifts:
            yield Act(
                kind="Lift",
                id=lift.id,
                devices=0,
                sentence=f"hold {lift.hold} ends: its digest may be tried again — "
                f"{quoted(lift.reason)}",
            )


def _touched(world: World, hold: ActiveHold) -> Iterator[bool]:
    for device in world.devices.values():
        row = world.seen.get(device.id)
        yield (
            device.fleet == hold.fleet
            and device.governed
            and row is not None
            and any(report.digest in hold.artifacts for report in row.components.values())
            and _covers(world, hold, device)
        )


def _covers(world: World, hold: ActiveHold, device: Device) -> bool:
    """Is it in the hold's scope? Steps and cohorts are those of the hold's rollout."""
    if scope.named(hold.scope):
        return scope.covers(hold.scope, device, None, None)
    ours = (r for r in world.rollouts.values() if r.name == hold.rollout)
    members = {r.id: world.members.get(r.id, {}) for r in ours if r.digest == hold.digest}
    return any(
        scope.covers(hold.scope, device, those.get(device.id), world.pinned.get(name))
        for name, those in members.items()
    )
