"""Recognises a lost memory: devices that obey words which the database does not know.

Pure. A wiped database, a restored backup and a failover to a lagging replica look alike: a device
reports a (term, generation) above its last order. What it runs is then the best that is known.

Rules, in order:

1. A device without any order that reports one was told it by a memory that is lost; but not one
   that was moved, replaced or let in again since: its orders were cleared on purpose.
2. A device that reports a newer order than its last one was told by a lost memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from controller.rollout.follow import runs_target
from controller.rollout.model import Device, Order, Proven, Rollout, RolloutState
from controller.rollout.waves import Pinned
from controller.rollout.world import Action, Change, Decision, Open, Prove, World
from telemetry.report import DeviceRow

MOST = 2**30  # a term or generation above it was never ours: that device lies, and may
MOVES = frozenset(
    {
        RolloutState.PENDING,
        RolloutState.PROGRESSING,
        RolloutState.SOAKING,
        RolloutState.NO_MEMBERS,
        RolloutState.INCONCLUSIVE,
    }
)


def foreign(
    device: Device, row: DeviceRow | None, last: Order | None, recovered_at: float | None = None
) -> bool:
    """Does this device obey an order that we do not remember? `recovered_at`: since the wipe."""
    if row is None or row.generation == 0 or max(row.term, row.generation) > MOST:
        return False
    if last is None:
        return device.moved_at is None or device.moved_at < (recovered_at or 0.0)
    return (row.term, row.generation) > (last.term, last.generation)


def pause(rollout: Rollout, now: float) -> Iterator[Action]:
    """An unfinished rollout whose database is older than what devices were told."""
    sentence = (
        f"PAUSED — {rollout.release}: the control database is older than what devices were told "
        "(a restored backup?); `resume` when that is right"
    )
    yield Change(
        rollout=replace(
            rollout,
            state=RolloutState.PAUSED,
            sentence=sentence,
            revision=rollout.revision + 1,
            updated_at=now,
            soak_mark=None,
        )
    )
    yield Decision(rollout=rollout.id, kind="state", verdict="Paused", sentence=sentence)


def already_everywhere(world: World, rollout: Rollout) -> int:
    """How many devices run it, when all that were ever heard do; else 0."""
    heard = [
        row
        for device in world.devices.values()
        if device.fleet == rollout.fleet and device.governed
        if (row := world.seen.get(device.id)) is not None
    ]
    return len(heard) if all(runs_target(row, rollout, committed=True) for row in heard) else 0


def completed(
    world: World, opened: Rollout, pinned: Pinned, devices: int, now: float
) -> Iterator[Action]:
    """A rollout that the lost database must have completed: there is nothing left to do."""
    sentence = (
        f"COMPLETED — {opened.release} was found on all {devices} devices that were ever heard, "
        "after the control database was lost"
    )
    done = replace(opened, state=RolloutState.COMPLETED, sentence=sentence, finished_at=now)
    yield Open(rollout=done, pinned=pinned)
    hardware = {d.hardware for d in world.devices.values() if d.fleet == opened.fleet}
    for component, digest in sorted(opened.artifacts.items()):
        for kind in sorted(hardware):
            proven = Proven(release=opened.release, digest=digest, at=now)
            yield Prove(fleet=opened.fleet, component=component, hardware=kind, proven=proven)
