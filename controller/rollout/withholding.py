"""Which orders leave no more: a hold or a stop has come since they were made.

Pure. Only what leads forward is withheld. Rules, in order:

1. A hold withholds what it rejects; where it lets devices stay, it rejects not what runs.
2. A stop withholds what a rollout brings and the device does not run yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from controller.rollout.desired import stopped
from controller.rollout.model import ActiveHold, ActiveStop, Device, Order
from device_agent.protocol import ComponentReport, Kind

Running = Mapping[str, ComponentReport]


def rejected(order: Order, running: Running, holds: Iterable[ActiveHold]) -> bool:
    """`holds`: those in force that cover the device."""
    if order.kind != Kind.INSTALL:
        return False
    return any(
        told.digest in hold.artifacts
        and (hold.to != "stay" or not _runs(running, component, told.digest))
        for hold in holds
        for component, told in order.components.items()
    )


def stays(order: Order, running: Running, device: Device, stops: Sequence[ActiveStop]) -> bool:
    """Does a stop keep the device where it is?"""
    new = [
        told.digest
        for component, told in order.components.items()
        if told.rollout is not None and not _runs(running, component, told.digest)
    ]
    return order.kind == Kind.INSTALL and bool(new) and stopped(device, new, stops)


def _runs(running: Running, component: str, digest: str) -> bool:
    report = running.get(component)
    return report is not None and report.digest == digest
