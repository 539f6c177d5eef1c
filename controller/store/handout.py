"""The order that a device is handed by HTTP: as it was published, if it still holds.

The loop brings orders up to every new hold and stop, but it may be away, for hours even, while the
API takes holds and answers devices. So what the loop would not send any more is not handed out.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Row
from sqlalchemy.exc import SQLAlchemyError

from controller.rollout import scope, withholding
from controller.rollout.model import ActiveHold, Device
from controller.rollout.waves import Pinned
from controller.store import rollouts as store
from controller.store import stops as stop_rows
from device_agent.protocol import Kind
from telemetry.report import DeviceRow, TelemetryReader


def order(conn: Connection, device: Row[Any], reader: TelemetryReader) -> bytes | None:
    """`device`: its row in the registry. None: there is nothing that it should do."""
    found = store.load_order(conn, device.id) if device.status == "active" else None
    if found is None:
        return None
    last, body = found
    if device.moved_at is not None and device.moved_at > last.at:
        return None  # it was made for another fleet
    if last.kind == Kind.INSTALL and store.get_meta(conn, "doubted"):
        return None  # by a backup: a hold that it does not know may stand in Git
    known = Device(id=device.id, fleet=device.fleet, labels=device.labels, status=device.status)
    holds = [h for h in store.load_holds(conn)[0] if _bears_on(conn, h, known, last.digests)]
    stops = stop_rows.load(conn)
    if not holds and not stops:
        return body
    row = _last_word(reader, known.id)
    overtaken = withholding.rejected(last, row, holds)
    return None if overtaken or withholding.stays(last, row, known, stops) else body


def _last_word(reader: TelemetryReader, device: str) -> DeviceRow | None:
    try:
        return reader.device(device)
    except SQLAlchemyError:  # then nothing is known to run: what leads forward is withheld
        return None


def _bears_on(conn: Connection, hold: ActiveHold, device: Device, told: frozenset[str]) -> bool:
    """Does it reject what this device was told, and is the device in its scope?"""
    if hold.fleet != device.fleet or hold.artifacts.isdisjoint(told):
        return False
    if scope.named(hold.scope):
        return scope.covers(hold.scope, device, None, None)
    return any(
        scope.covers(hold.scope, device, member, Pinned.from_json(pinned))
        for member, pinned in store.load_memberships(
            conn, device.id, rollout=hold.rollout, digest=hold.digest
        )
    )
