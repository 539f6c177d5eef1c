"""What the store holds of a batch's devices: remembered from the batch before, or loaded.

Rules, in order:

1. What is remembered counts only in the turn that follows the one that left it: another process,
   `forget` and retention take turns too, and whoever took one may have changed the rows.
2. While a batch is written nothing is remembered, so a batch that fails leaves nothing, however it
   failed. What was committed is kept afterwards.
3. A connection that is new to us may lead to another history (a restored backup, a promoted
   replica): whoever comes on one loads.
4. Beyond `MOST` devices or boots everything is forgotten: memory has an end, a fleet need not.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakSet

from sqlalchemy import Connection

from device_agent.protocol import Presence
from telemetry.store import bulk, tables
from telemetry.store.fold import Contact, Heard, Known
from telemetry.store.seen import Seen, unpack

MOST = 50_000  # devices, about 600 bytes each
_MET = "bellwether_memory"  # who used a connection before


class Memory:
    """Of one store; its turns follow each other, therefore it needs no lock."""

    def __init__(self) -> None:
        self._known: Known | None = None
        self._number = 0

    def recall(self, connection: Connection, heard: Sequence[Heard], first: int) -> Known:
        """What is known of these devices, in the turn of that first number; it is the caller's
        until `keep`."""
        known, self._known = self._known, None
        met = connection.info.setdefault(_MET, WeakSet())
        if known is None or self._number != first - 1 or self not in met:
            known = Known()
        met.add(self)
        _load(connection, heard, known)
        return known

    def keep(self, known: Known, number: int) -> None:
        """The turn that ends with `number` is committed, and this is what the store holds now."""
        if len(known.contacts) <= MOST and len(known.boots) <= MOST:
            if len(known.hours) > MOST:
                known.hours.clear()  # most are over
            self._known, self._number = known, number


def _load(connection: Connection, heard: Sequence[Heard], known: Known) -> None:
    """Complete `known` by what it lacks of these devices."""
    strangers: set[str] = set()
    wanted: set[tuple[str, str]] = set()  # (device, boot)
    for device, messages in heard:
        boots = {(device, m.boot) for m in messages if not isinstance(m, Presence)}
        if device not in known.contacts:
            strangers.add(device)
        if not boots <= known.boots.keys():
            wanted |= boots
    _load_devices(connection, strangers, known)
    _load_boots(connection, wanted, known)


def _load_devices(connection: Connection, devices: set[str], known: Known) -> None:
    contacts, reports = tables.contacts.c, tables.reports.c
    own = tuple(column for column in contacts if column.name not in ("device", "change"))
    for device, last, clock, online, sleeping, *boot in bulk.of_devices(connection, own, devices):
        name, count, floor = boot
        known.contacts[device] = Contact(
            last_contact=last,
            heard_clock=clock,
            online=bool(online),
            sleeping_until=sleeping,
            boot=name,
            boot_count=count,
            boot_floor=floor,
        )
    version = (reports.boot_count, reports.seq)
    for device, count, seq in bulk.of_devices(connection, version, devices):
        known.states[device] = (count, seq)


def _load_boots(connection: Connection, wanted: set[tuple[str, str]], known: Known) -> None:
    # By device alone: a second list of boots would make SQLite try every pair of the two.
    boots = tables.boots.c
    columns = (boots.boot, boots.boot_count, boots.high, boots.missing)
    devices = {device for device, _ in wanted}
    for device, boot, count, high, missing in bulk.of_devices(connection, columns, devices):
        if (device, boot) in wanted:
            known.boots[device, boot] = Seen(boot_count=count, high=high, missing=unpack(missing))
