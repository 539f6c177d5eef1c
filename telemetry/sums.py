"""What devices have counted, packed: one row of numbers a device, and whole fleets of such rows.

Pure. A row is float64 numbers, little-endian, in the order that its layout names. Layouts are few,
because most devices measure the same; a layout's id is a hash of what it names, so that nobody has
to hand out numbers.

Running sums are only added to. What was counted since a moment is the difference of two of them,
however long ago that is (`Sums.since`). Sums of hours are added up instead (`Adding`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from hashlib import blake2b
from struct import Struct

import msgspec
import numpy as np
import numpy.typing as npt

from telemetry.report import Totals

NUMBER = np.dtype("<f8")
Floats = npt.NDArray[np.float64]
Columns = dict[str, Floats]  # name → a number a device


class Kind(IntEnum):
    """In the order in which a row has them."""

    COUNTER = 0
    EXPOSURE = 1
    SAMPLES = 2  # of a level: how many
    LEVEL = 3  # their sum


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Which number of a row is what."""

    id: int
    text: str  # JSON: [counters, units of exposure, levels]
    places: Mapping[Kind, Mapping[str, int]]
    struct: Struct

    @classmethod
    def of(cls, counters: Iterable[str], exposure: Iterable[str], levels: Iterable[str]) -> Layout:
        names = (sorted(counters), sorted(exposure), sorted(levels))
        text = msgspec.json.encode(names).decode()
        places: dict[Kind, dict[str, int]] = {}
        width = 0
        for kind, own in zip(Kind, (*names, names[2]), strict=True):
            places[kind] = {name: at for at, name in enumerate(own, width)}
            width += len(own)
        key = blake2b(text.encode(), digest_size=8).digest()
        return cls(
            id=int.from_bytes(key, "little", signed=True),
            text=text,
            places=places,
            struct=Struct(f"<{width}d"),
        )

    @classmethod
    def parse(cls, text: str) -> Layout:
        return cls.of(*msgspec.json.decode(text, type=tuple[list[str], list[str], list[str]]))

    @property
    def width(self) -> int:
        return self.struct.size // NUMBER.itemsize


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Rows of one layout: `columns` has the shape (width, devices)."""

    layout: Layout
    devices: Sequence[str]
    columns: Floats

    @classmethod
    def of_rows(cls, layout: Layout, devices: Sequence[str], rows: Sequence[bytes]) -> Block:
        # Turned while it is in the processor's cache: later, each column would have to be gathered
        # from all of the memory.
        numbers = np.frombuffer(b"".join(rows), NUMBER).reshape(len(devices), layout.width)
        return cls(layout, devices, np.ascontiguousarray(numbers.T))

    @classmethod
    def of_bytes(cls, layout: Layout, devices: Sequence[str], columns: bytes) -> Block:
        """As `columns.tobytes()` was."""
        return cls(layout, devices, np.frombuffer(columns, NUMBER).reshape(layout.width, -1))

    def series(self, kind: Kind, names: Collection[str] | None) -> Iterable[tuple[str, Floats]]:
        for name, at in self.layout.places[kind].items():
            if names is None or name in names:
                yield name, self.columns[at]


class Sums:
    """Running sums of all devices at one moment; a device stands there once."""

    def __init__(self, blocks: Sequence[Block] = ()) -> None:
        self._blocks = blocks
        self.devices: Sequence[str] = [name for block in blocks for name in block.devices]

    def since(self, before: Sums, names: Collection[str] | None = None) -> Totals:
        """What was counted after `before`; of all its series, or of those with these names.

        A series that nobody counted since then is left out.
        """
        at = self._places(before)
        found: dict[Kind, Columns] = {}
        for kind in Kind:
            columns = self._columns(kind, names)
            for name, old in before._columns(kind, names).items():
                columns[name][at] -= old
            found[kind] = {name: column for name, column in columns.items() if column.any()}
        return _totals(self.devices, found)

    def _columns(self, kind: Kind, names: Collection[str] | None) -> Columns:
        columns: Columns = {}
        first, size = 0, len(self.devices)
        for block in self._blocks:
            last = first + len(block.devices)
            for name, numbers in block.series(kind, names):
                column = columns.get(name)
                if column is None:
                    column = columns[name] = np.zeros(size)
                column[first:last] = numbers
            first = last
        return columns

    def _places(self, before: Sums) -> slice | npt.NDArray[np.intp]:
        """Where the devices of `before` stand here: whoever counted once is never forgotten."""
        if self.devices == before.devices:
            return slice(None)
        found = _in_order(before.devices, self.devices)
        if found is None:
            place = {name: at for at, name in enumerate(self.devices)}
            found = [place[name] for name in before.devices]
        return np.array(found, dtype=np.intp)


def _in_order(some: Sequence[str], devices: Sequence[str]) -> list[int] | None:
    """Where they stand, when they stand in the same order: a third of the price of a table."""
    found, rest = [], enumerate(devices)
    for name in some:
        for at, other in rest:
            if other == name:
                found.append(at)
                break
        else:
            return None
    return found


class Adding:
    """Adds up rows, of which a device may have any number."""

    def __init__(self, names: Collection[str] | None = None) -> None:
        self._names = names
        self._places: dict[str, int] = {}
        self._columns: dict[Kind, Columns] = {kind: {} for kind in Kind}

    def add(self, block: Block) -> None:
        places = self._places
        found = [places.setdefault(name, len(places)) for name in block.devices]
        at = np.array(found, dtype=np.intp)
        for kind, columns in self._columns.items():
            for name, numbers in block.series(kind, self._names):
                column = columns.get(name, _NONE)
                if column.size < len(places):  # some room ahead: a fleet comes piece by piece
                    column = columns[name] = _longer(column, 2 * len(places))
                np.add.at(column, at, numbers)

    def totals(self) -> Totals:
        """Of every device that was added, in the order of their names."""
        devices = sorted(self._places)
        at = np.array([self._places[name] for name in devices], dtype=np.intp)
        size = len(devices)
        found = {
            kind: {name: _longer(column, size)[at] for name, column in columns.items()}
            for kind, columns in self._columns.items()
        }
        return _totals(devices, found)


_NONE = np.zeros(0)


def _longer(column: Floats, size: int) -> Floats:
    if column.size >= size:
        return column
    longer = np.zeros(size)
    longer[: column.size] = column
    return longer


def _totals(devices: Sequence[str], found: Mapping[Kind, Columns]) -> Totals:
    levels = {}
    for name, n in found[Kind.SAMPLES].items():
        total = found[Kind.LEVEL].get(name, np.zeros(n.size))  # none where they are all zero
        levels[name] = np.divide(total, n, out=np.full(n.size, np.nan), where=n > 0)
    return Totals(
        devices=devices,
        counters=found[Kind.COUNTER],
        exposure=found[Kind.EXPOSURE],
        levels=levels,
    )
