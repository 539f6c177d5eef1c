"""Which metrics a release reports in another revision than what its devices are compared with.

Pure. A metric whose meaning changed (a new sensor, another threshold) gets a new revision in the
release's manifest. Samples of different revisions are never compared: such a gate has no data, and
the step waits for a person or for `onInconclusive`.
"""

from __future__ import annotations

from collections.abc import Iterable

from controller.rollout.desired import Catalog
from controller.rollout.model import Rollout
from controller.rollout.waves import Pinned
from controller.rollout.world import World
from telemetry.policy import GateType
from telemetry.report import DeviceRow

Ran = tuple[str, str, str]  # component, digest, release
_COMPARED = (GateType.RATE, GateType.MEAN)  # the others are counted against a budget


def of_rollout(world: World, rollout: Rollout, pinned: Pinned) -> dict[str, str]:
    """metric → why it cannot be compared with what this rollout's devices reported before it.

    All of them were controls of others, or might have been: what they said then stays evidence when
    they are updated themselves. Who was not heard since it opened has said nothing to compare: one
    device that lies in a drawer does not take the gate's word away.
    """
    if not _declared(world.catalog):
        return {}
    ran: set[Ran] = set()
    for member in world.members.get(rollout.id, {}).values():
        row = world.seen.get(member.device)
        if row is None or row.last_contact < rollout.opened_at:
            continue
        if member.previous is None:
            ran |= _runs(row, rollout)
        for component, told in (member.previous or {}).items():
            ran.add((component, str(told["digest"]), str(told["release"])))
    return _incomparable(world.catalog, rollout, pinned, ran)


def of_plan(world: World, rollout: Rollout, pinned: Pinned) -> dict[str, str]:
    """The same for a rollout that has no controls yet: with what runs in its fleet."""
    if not _declared(world.catalog) and not pinned.release.metrics:
        return {}
    ran: set[Ran] = set()
    for device in world.devices.values():
        row = world.seen.get(device.id)
        if device.fleet == rollout.fleet and row is not None:
            ran |= _runs(row, rollout)
    return _incomparable(world.catalog, rollout, pinned, ran)


def _declared(catalog: Catalog) -> bool:
    return any(number != 1 for r in catalog.releases.values() for number in r.metrics.values())


def _runs(row: DeviceRow, rollout: Rollout) -> set[Ran]:
    return {
        (component, report.digest, report.release)
        for component in rollout.artifacts
        if (report := row.components.get(component)) is not None
    }


def _incomparable(
    catalog: Catalog, rollout: Rollout, pinned: Pinned, ran: Iterable[Ran]
) -> dict[str, str]:
    others = [
        owner
        for component, digest, release in sorted(ran)
        if digest != rollout.artifacts.get(component, digest)
        and (owner := catalog.owner(component, digest, release)) is not None
    ]
    found: dict[str, str] = {}
    for gate in pinned.policy.judged.gates:
        ours = pinned.release.metrics.get(gate.metric, 1)
        differ = [r for r in others if r.metrics.get(gate.metric, 1) != ours]
        if gate.type in _COMPARED and differ:
            theirs = differ[0].metrics.get(gate.metric, 1)
            found[gate.metric] = (
                f"{pinned.release.name} reports revision {ours} of it, {differ[0].name} revision "
                f"{theirs}: they are never compared"
            )
    return found
