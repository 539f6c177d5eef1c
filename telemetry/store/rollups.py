"""Hourly sums per device: what the score reads, long after the raw messages are gone. Pure.

Rules, in order:

1. A message belongs to the hours of its own samples, by the device's clock, when that is plausible:
   begun at most `PAST` ago and over at most `FUTURE` ahead of the server.
2. Otherwise it is taken as having ended now: a dead clock battery shall not lose the evidence.
3. Counters and exposure have no time of their own; they stand in the hour in which the interval
   began, together, so that a rate never loses its denominator.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from operator import mul
from typing import Protocol, cast

HOUR = 3600
PAST = 45 * 86_400.0
FUTURE = 300.0

Column = tuple[float | None, ...]
Sums = tuple[int, float, float]  # n, total, sum of squares of the samples that are there
Row = tuple[int, str, int, str, int, float, float]  # hour, device, kind, name, n, total, squares


class Kind(IntEnum):
    COUNTER = 0
    EXPOSURE = 1
    LEVEL = 2


class Measured(Protocol):
    """What a health message measured; `protocol.Health` and `decode.Sample` are such."""

    @property
    def t0(self) -> float: ...
    @property
    def dt(self) -> float: ...
    @property
    def columns(self) -> Mapping[str, Column]: ...
    @property
    def counters(self) -> Mapping[str, int]: ...
    @property
    def exposure(self) -> Mapping[str, float]: ...


@dataclass(slots=True)
class _Hour:
    """Sums of one device and hour, by name."""

    counters: dict[str, tuple[int, int]] = field(default_factory=dict)
    exposure: dict[str, tuple[int, float]] = field(default_factory=dict)
    levels: dict[str, Sums] = field(default_factory=dict)


class Rollups:
    """The sums of one batch: add messages, then read rows with unique keys."""

    def __init__(self) -> None:
        self._devices: dict[str, DeviceSums] = {}

    @property
    def shifted(self) -> int:
        """Messages whose clock was not plausible."""
        return sum(sums.shifted for sums in self._devices.values())

    def of(self, device: str) -> DeviceSums:
        found = self._devices.get(device)
        if found is None:
            found = self._devices[device] = DeviceSums()
        return found

    def rows(self) -> list[Row]:
        """In the order of their keys: so a database finds their places one beside the other."""
        found: list[Row] = []
        for device, sums in self._devices.items():
            for number, hour in sums.hours.items():
                found += _rows(number, device, hour)
        return sorted(found)


class DeviceSums:
    """What one device adds in a batch. It does not know its batch: a cycle would outlive it."""

    def __init__(self) -> None:
        self.shifted = 0
        self.hours: dict[int, _Hour] = {}

    def add(self, message: Measured, now: float) -> tuple[float, dict[str, Sums]]:
        """(seconds of the message's interval, sums of its columns)."""
        columns = message.columns
        seconds = message.dt * samples(columns)
        start = message.t0
        if not (now - PAST <= start and start + seconds <= now + FUTURE):
            start = max(now - seconds, now - PAST)
            self.shifted += 1
        first, last = int(start // HOUR), int((start + seconds) // HOUR)
        hour = self.hours.get(first) or self._hour(first)
        counters, exposure = hour.counters, hour.exposure
        for name, count in message.counters.items():
            n, whole = counters.get(name, _NOTHING)
            counters[name] = (n + 1, whole + count)
        for name, amount in message.exposure.items():
            n, total = exposure.get(name, _NOTHING)
            exposure[name] = (n + 1, total + amount)
        if first != last:
            self._spread(message, start, last)
            return seconds, levels(columns)
        sums: dict[str, Sums] = {}
        into = hour.levels
        for name, column in columns.items():
            part = _sums(column)
            if part is not None:
                sums[name] = part
                before = into.get(name)
                into[name] = part if before is None else _added(before, part)
        return seconds, sums

    def _hour(self, number: int) -> _Hour:
        hour = self.hours.get(number)
        if hour is None:
            hour = self.hours[number] = _Hour()
        return hour

    def _spread(self, message: Measured, start: float, last: int) -> None:
        """Samples of an interval that crosses an hour, each to its own."""
        for name, column in message.columns.items():
            by_hour: dict[int, list[float | None]] = {}
            for place, sample in enumerate(column):
                own = int((start + place * message.dt) // HOUR)
                by_hour.setdefault(min(own, last), []).append(sample)
            for own, share in by_hour.items():
                _merge(self._hour(own).levels, levels({name: tuple(share)}))


def samples(columns: Mapping[str, Column]) -> int:
    """How many samples a message carries; one without columns describes one interval."""
    for column in columns.values():
        return len(column)
    return 1


def levels(columns: Mapping[str, Column]) -> dict[str, Sums]:
    """Sums over each column; a column without one sample is left out."""
    found = {name: _sums(column) for name, column in columns.items()}
    return {name: sums for name, sums in found.items() if sums is not None}


def _sums(column: Column) -> Sums | None:
    if len(column) == 1:
        sample = column[0]
        return None if sample is None else (1, sample, sample * sample)
    try:
        whole = cast(tuple[float, ...], column)
        return len(whole), sum(whole), sum(map(mul, whole, whole))
    except TypeError:  # some are not there
        known = [sample for sample in column if sample is not None]
        return (len(known), sum(known), sum(map(mul, known, known))) if known else None


def _added(one: Sums, other: Sums) -> Sums:
    return one[0] + other[0], one[1] + other[1], one[2] + other[2]


_NOTHING = (0, 0)


def _merge(into: dict[str, Sums], more: Mapping[str, Sums]) -> None:
    for name, sums in more.items():
        before = into.get(name)
        into[name] = sums if before is None else _added(before, sums)


def _rows(number: int, device: str, hour: _Hour) -> Iterator[Row]:
    for name, (n, whole) in hour.counters.items():
        yield number, device, Kind.COUNTER.value, name, n, float(whole), 0.0
    for name, (n, total) in hour.exposure.items():
        yield number, device, Kind.EXPOSURE.value, name, n, total, 0.0
    for name, (n, total, squares) in hour.levels.items():
        yield number, device, Kind.LEVEL.value, name, n, total, squares
