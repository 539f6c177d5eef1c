"""A device's sums as one row (`telemetry.sums`), and what a batch adds to it. Pure.

Rules, in order:

1. A row has a number for each name that its device ever measured in it. A new name gives it another
   layout, up to `MOST` names: who invents more of them is not followed any further.
2. What no sum can hold beside ordinary numbers (`HUGE`: a sentinel, a broken sensor) stays out of
   sums. It would swallow all that is added after it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import lru_cache
from typing import NamedTuple

from telemetry.store.rollups import Hour
from telemetry.sums import Kind, Layout

MOST = 256  # names in a row
HUGE = 1e15  # added by one batch: beside it, float64 still holds an eighth


class Packed(NamedTuple):
    layout: Layout
    sums: bytes


# Most devices measure the same: a layout is made once, and shared.
layout_of = lru_cache(4096)(Layout.of)  # of sorted names
parsed = lru_cache(4096)(Layout.parse)
NOTHING = Packed(layout_of((), (), ()), b"")


def added(row: Packed, hours: Iterable[Hour]) -> Packed:
    """The row after these hours; a layout is shared by all rows that are alike."""
    layout = row.layout
    numbers = list(layout.struct.unpack(row.sums))
    for hour in hours:
        before = numbers.copy()
        try:
            _add(layout, numbers, hour)
        except KeyError:  # a new name; asking for all of them beforehand costs as much as adding
            layout, numbers = _grown(layout, before, hour)
            _add(layout, numbers, _within(layout, hour))
    return Packed(layout, layout.struct.pack(*numbers))


def _grown(layout: Layout, numbers: list[float], hour: Hour) -> tuple[Layout, list[float]]:
    """The same numbers in a layout that has the hour's names too, as far as there is room."""
    names = [set(layout.places[kind]) for kind in (Kind.COUNTER, Kind.EXPOSURE, Kind.LEVEL)]
    measured: tuple[Collection[str], ...] = (hour.counters, hour.exposure, hour.levels)
    room = MOST - sum(map(len, names))
    for known, more in zip(names, measured, strict=True):
        new = sorted(set(more) - known)[:room]
        known.update(new)
        room -= len(new)
    wider = layout_of(*(tuple(sorted(known)) for known in names))
    moved = [0.0] * wider.width
    for kind, places in layout.places.items():
        for name, at in places.items():
            moved[wider.places[kind][name]] = numbers[at]
    return wider, moved


def _within(layout: Layout, hour: Hour) -> Hour:
    """What of the hour there is room for."""
    counters, exposure, _, levels = layout.places.values()
    return Hour(
        counters={name: n for name, n in hour.counters.items() if name in counters},
        exposure={name: x for name, x in hour.exposure.items() if name in exposure},
        levels={name: sums for name, sums in hour.levels.items() if name in levels},
    )


def _add(layout: Layout, numbers: list[float], hour: Hour) -> None:
    """Raises KeyError for a name that is not in the layout."""
    counters, exposure, samples, levels = layout.places.values()
    for name, count in hour.counters.items():
        if count <= HUGE:
            numbers[counters[name]] += count
    for name, amount in hour.exposure.items():
        if amount <= HUGE:
            numbers[exposure[name]] += amount
    for name, (n, total, _) in hour.levels.items():
        if -HUGE <= total <= HUGE:
            numbers[samples[name]] += n
            numbers[levels[name]] += total
