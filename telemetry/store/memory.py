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

from collections.abc import Iterable, Sequence
from typing import Any, cast
from weakref import WeakSet

from sqlalchemy import Column, Connection

from device_agent.protocol import Presence
from telemetry.store import tables
from telemetry.store.fold import Contact, Heard, Known
from telemetry.store.seen import Seen, unpack

MOST = 50_000  # devices, about 600 bytes each
_MANY = 8_192  # keys in one IN list
_MET = "bellwether_memory"  # who used a connection before


class Memory:
    """Of one store; its turns follow each other, therefore it needs no lock."""

    def __init__(self) -> None:
        self._known: Known | None = None
        self._number = 0

    def recall(self, connection: Connection, heard: Sequence[Heard], number: int) -> Known:
        """What is known of these devices, in turn `number`; it is the caller's until `keep`."""
        known, self._known = self._known, None
        met = connection.info.setdefault(_MET, WeakSet())
        if known is None or self._number != number - 1 or self not in met:
            known = Known(contacts={}, boots={}, states={})
        met.add(self)
        _load(connection, heard, known)
        return known

    def keep(self, known: Known, number: int) -> None:
        """Turn `number` is committed, and this is what the store holds now."""
        if len(known.contacts) <= MOST and len(known.boots) <= MOST:
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
    for some in _pieces(strangers):
        _load_devices(connection, some, known)
    for some in _pieces({device for device, _ in wanted}):
        _load_boots(connection, some, wanted, known)


def _pieces(devices: set[str]) -> Iterable[list[str]]:
    """Lists of keys, each as long as a power of two: the last key is repeated.

    Each length of an IN list is a statement of its own to the driver, and SQLite's keeps 128 of
    them: with any length that is 40 MiB, and hardly one is ever found again.
    """
    keys = sorted(devices)
    for first in range(0, len(keys), _MANY):
        some = keys[first : first + _MANY]
        yield some + some[-1:] * ((1 << (len(some) - 1).bit_length()) - len(some))


def _load_devices(connection: Connection, devices: list[str], known: Known) -> None:
    contacts, reports = tables.contacts.c, tables.reports.c
    own = tuple(column for column in contacts if column.name not in ("device", "change"))
    for device, last, clock, online, sleeping, *boot in _of(connection, own, devices):
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
    for device, count, seq in _of(connection, (reports.boot_count, reports.seq), devices):
        known.states[device] = (count, seq)


def _load_boots(
    connection: Connection, devices: list[str], wanted: set[tuple[str, str]], known: Known
) -> None:
    # By device alone: a second list of boots would make SQLite try every pair of the two.
    boots = tables.boots.c
    columns = (boots.boot, boots.boot_count, boots.high, boots.missing)
    for device, boot, count, high, missing in _of(connection, columns, devices):
        if (device, boot) in wanted:
            known.boots[device, boot] = Seen(boot_count=count, high=high, missing=unpack(missing))


def _of(
    connection: Connection, columns: tuple[Column[Any], ...], devices: list[str]
) -> Iterable[Any]:
    """(device, *columns) of these devices, past SQLAlchemy: it costs more than the query."""
    names = ", ".join(column.name for column in columns)
    statement = f"SELECT device, {names} FROM {columns[0].table.name} WHERE device "  # noqa: S608
    cursor = connection.connection.cursor()
    if connection.dialect.name == "postgresql":
        return cast(Iterable[Any], cursor.execute(f"{statement}= ANY(%s)", (devices,)))
    marks = ", ".join("?" * len(devices))
    return cast(Iterable[Any], cursor.execute(f"{statement}IN ({marks})", devices))
