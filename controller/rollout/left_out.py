"""Whom no step of a planned rollout reaches, and why; and who waits although a step does.

Pure.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from controller.manifests.kinds import Release
from controller.rollout import drawing, holdout
from controller.rollout.desired import in_range, satisfied
from controller.rollout.model import Device, Rollout
from controller.rollout.waves import Pinned
from controller.rollout.world import World

_MOST_NAMES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """Devices of the fleet that no step reaches, by reason."""

    why: str
    devices: int
    examples: tuple[str, ...] = ()


def left_out(
    world: World,
    rollout: Rollout,
    pinned: Pinned,
    devices: Sequence[Device],
    reached: set[str],
) -> Iterator[LeftOut]:
    reasons: defaultdict[str, list[str]] = defaultdict(list)
    for device in devices:
        why = _why_not(world, rollout, pinned, device, device.id in reached)
        if why:
            reasons[why].append(device.id)
    for why, names in sorted(reasons.items(), key=lambda item: (-len(item[1]), item[0])):
        yield LeftOut(why=why, devices=len(names), examples=tuple(sorted(names)[:_MOST_NAMES]))


def _why_not(world: World, rollout: Rollout, pinned: Pinned, device: Device, reached: bool) -> str:
    """Why no step reaches a device, or what it waits for although one does; empty: neither."""
    if not device.governed:
        return f"{device.status}: nothing is ordered"
    if not pinned.release.fits(device.labels):
        return f"not compatible: {_incompatible(pinned.release, device)}"
    if drawing.runs(world, rollout, device):
        return "runs it already"
    if not drawing.may_take(world, rollout, pinned, device):
        return _stepping_stone(world, pinned.release, device)
    if not reached and holdout.keeps_out(rollout, pinned, device.id, rollout.opened_at):
        return "held out until the benefit is measured"
    if not reached:
        return "in no step: the steps end below 100 % of its cohort"
    row = world.seen.get(device.id)
    if row is None or not pinned.release.requires:
        return ""
    versions = {c: world.catalog.version(c, r.digest) for c, r in row.components.items()}
    versions |= dict.fromkeys(rollout.artifacts, pinned.release.version)
    met, why = satisfied(pinned.release, versions)
    return "" if met else f"drawn, but waits: {why}"


def _incompatible(release: Release, device: Device) -> str:
    for artifact in release.artifacts:
        for label, allowed in artifact.compatible.items():
            value = device.labels.get(label)
            if value not in allowed:
                return f"{label} {value or 'is not set'}, needs {' or '.join(allowed)}"
    return ""


def _stepping_stone(world: World, release: Release, device: Device) -> str:
    """The version that it runs is no allowed source; name a release over which it could go."""
    row = world.seen[device.id]
    running = {
        c: world.catalog.version(c, row.components[c].digest)
        for c in release.components
        if c in row.components
    }
    shown = ", ".join(f"{c} {v or 'of an unknown release'}" for c, v in sorted(running.items()))
    why = f"runs {shown}; upgradesFrom {' or '.join(release.upgrades_from)}"
    for stone in world.catalog.releases.values():
        reaches = any(in_range(stone.version, spec) for spec in release.upgrades_from)
        takes = not stone.upgrades_from or all(
            version is not None and any(in_range(version, spec) for spec in stone.upgrades_from)
            for version in running.values()
        )
        if (
            stone.name != release.name
            and reaches
            and takes
            and set(running) <= set(stone.components)
        ):
            return f"{why}: over the stepping stone {stone.name}"
    return f"{why}: no known release is a stepping stone"
