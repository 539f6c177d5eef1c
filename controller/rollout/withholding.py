"""Which orders leave no more: a hold or a stop has come since they were made.

Pure. Only what leads forward is withheld. Rules, in order:

1. A hold withholds what it rejects; where it lets devices stay, it rejects not what runs. What
   a device ran before it was sent that order it may have left since, by an order before it.
2. A stop withholds what a rollout brings and the device does not run yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from controller.rollout.desired import stopped
from controller.rollout.model import ActiveHold, ActiveStop, Device, Order
from device_agent.protocol import ComponentReport, Kind
from telemetry.report import DeviceRow

HEED = 30.0  # seconds after which a report of an older order means that ours was not received


def rejected(order: Order, row: DeviceRow | None, holds: Iterable[ActiveHold]) -> bool:
    """`row`: the device's last word; `holds`: those in force that cover the device."""
    if order.kind != Kind.INSTALL:
        return False
    return any(
        told.digest in hold.artifacts and not _keeps(row, component, order, hold)
        for hold in holds
        for component, told in order.components.items()
    )


def _keeps(row: DeviceRow | None, component: str, order: Order, hold: ActiveHold) -> bool:
    """Does the hold leave the device what it runs, and is that what the order names?"""
    if row is None or hold.to != "stay":
        return False
    if not _runs(row.components, component, order.components[component].digest):
        return False
    if order.at > hold.created_at:
        return True  # it was composed with the hold in mind
    obeyed = (row.term, row.generation) >= (order.term, order.generation)
    return obeyed or (row.reported_at or 0.0) > order.at + HEED


def stays(order: Order, row: DeviceRow | None, device: Device, stops: Sequence[ActiveStop]) -> bool:
    """Does a stop keep the device where it is?"""
    running = row.components if row is not None else {}
    new = [
        told.digest
        for component, told in order.components.items()
        if told.rollout is not None and not _runs(running, component, told.digest)
    ]
    return order.kind == Kind.INSTALL and bool(new) and stopped(device, new, stops)


def _runs(running: Mapping[str, ComponentReport], component: str, digest: str) -> bool:
    report = running.get(component)
    return report is not None and report.digest == digest
