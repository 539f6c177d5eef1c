"""Writes what a batch adds to its devices' sums, and reads the sums of whole fleets.

Rules, in order:

1. A device's row of an hour and its running sums get the same additions, in the transaction that
   keeps the messages: whatever is killed when, both are the sum of what was counted.
2. A row is read before it is added to, unless the batch before left it (`telemetry.store.memory`).
3. Readers take rows by the thousand and turn them into columns at once: a million devices are
   never a million Python objects at the same time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import groupby
from operator import itemgetter
from typing import Any

from sqlalchemy import Connection, bindparam, select

from telemetry.report import Totals
from telemetry.store import bulk, layouts, tables
from telemetry.store.fold import Known
from telemetry.store.packed import NOTHING, Packed, added
from telemetry.store.prepared import Prepared
from telemetry.store.rollups import DeviceSums, Hour
from telemetry.sums import Adding, Block, Layout, Sums

_AT_ONCE = 1_000  # rows: what becomes of them stays in the processor's cache
_LAYOUT = itemgetter(1)
_Key = tuple[int, str]  # hour, device


def write(connection: Connection, devices: Mapping[str, DeviceSums], known: Known) -> None:
    """Add to the rows of these devices; `known` has them afterwards."""
    measured = {device: hours for device, adds in devices.items() if (hours := adds.measured())}
    _recall(connection, measured, known)
    hourly: dict[_Key, Packed] = {}
    ever: dict[str, Packed] = {}
    for device, hours in measured.items():
        for hour, sums in hours.items():
            key = hour, device
            hourly[key] = added(known.hours.get(key, NOTHING), (sums,))
        ever[device] = added(known.sums.get(device, NOTHING), hours.values())
    used = {row.layout for row in (*hourly.values(), *ever.values())}
    layouts.save(connection, used, known.layouts)
    # In the order of their keys: so a database finds their places one beside the other.
    rows = [(*key, row.layout.id, row.sums) for key, row in sorted(hourly.items())]
    bulk.upsert(connection, tables.rollups, rows)
    bulk.upsert(
        connection,
        tables.sums,
        [(device, row.layout.id, row.sums) for device, row in sorted(ever.items())],
    )
    known.hours.update(hourly)
    known.sums.update(ever)


def read(connection: Connection) -> Sums:
    """The running sums of all devices."""
    return Sums(list(running(connection)))


def running(connection: Connection) -> Iterator[Block]:
    return _blocks(connection, _EVER.pages(connection, _AT_ONCE))


def add_up(connection: Connection, hours: range, names: Collection[str] | None = None) -> Totals:
    """What was measured in these hours, by the samples' own time."""
    adding = Adding(names)
    pages = _WITHIN.pages(connection, _AT_ONCE, first=hours.start, end=hours.stop)
    for block in _blocks(connection, pages):
        adding.add(block)
    return adding.totals()


def _recall(
    connection: Connection, measured: Mapping[str, Mapping[int, Hour]], known: Known
) -> None:
    """Complete `known` by the rows of these devices and hours."""
    ever = tables.sums.c
    missing = measured.keys() - known.sums.keys()
    for device, key, packed in bulk.of_devices(connection, (ever.layout, ever.sums), missing):
        known.sums[device] = Packed(layouts.find(connection, key, known.layouts), bytes(packed))
    absent: dict[int, set[str]] = {}
    for device, hours in measured.items():
        for hour in hours:
            if (hour, device) not in known.hours:
                absent.setdefault(hour, set()).add(device)
    hourly = tables.rollups.c
    for hour, devices in absent.items():
        for device, key, packed in bulk.of_devices(
            connection, (hourly.layout, hourly.sums), devices, where=f"hour = {hour} AND"
        ):
            layout = layouts.find(connection, key, known.layouts)
            known.hours[hour, device] = Packed(layout, bytes(packed))


def _blocks(connection: Connection, pages: Iterable[list[tuple[Any, ...]]]) -> Iterator[Block]:
    """Rows of (device, layout, sums), those with one layout beside each other."""
    known: dict[int, Layout] = {}
    for rows in pages:
        rows.sort(key=_LAYOUT)  # stable
        for key, some in groupby(rows, _LAYOUT):
            devices, _, packed = zip(*some, strict=True)
            yield Block.of_rows(layouts.find(connection, key, known), devices, packed)


_SUMS, _HOURS = tables.sums.c, tables.rollups.c
_EVER = Prepared(select(_SUMS.device, _SUMS.layout, _SUMS.sums))
_WITHIN = Prepared(
    select(_HOURS.device, _HOURS.layout, _HOURS.sums).where(
        _HOURS.hour >= bindparam("first"), _HOURS.hour < bindparam("end")
    )
)
