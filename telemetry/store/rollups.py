"""What a batch adds to the sums of each device, hour by hour. Pure.

Rules, in order:

1. A message belongs to the hours of its own samples, by the device's clock, when that is plausible:
   begun at most `PAST` ago and over at most `FUTURE` ahead of the server.
2. Otherwise it is taken as having ended now: a dead clock battery shall not lose the evidence.
3. Counters and exposure have no time of their own; they stand in the hour in which the interval
   began, together, so that a rate never loses its denominator.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import mul
from typing import Protocol, cast

HOUR = 3600
PAST = 45 * 86_400.0
FUTURE = 300.0

Column = tuple[float | None, ...]
Sums = tuple[int, float, float]  # n, total, sum of squares of the samples that are there


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
class Hour:
    """Sums of one device and hour, by name."""

    counters: dict[str, int] = field(default_factory=dict)
    exposure: dict[str, float] = field(default_factory=dict)
    levels: dict[str, Sums] = field(default_factory=dict)


class Rollups:
    """The sums of one batch: add messages, then read what each device adds."""

    def __init__(self) -> None:
        self.devices: dict[str, DeviceSums] = {}

    @property
    def shifted(self) -> int:
        """Messages whose clock was not plausible."""
        return sum(sums.shifted for sums in self.devices.values())

    def of(self, device: str) -> DeviceSums:
        found = self.devices.get(device)
        if found is None:
            found = self.devices[device] = DeviceSums()
        return found


class DeviceSums:
    """What one device adds in a batch. It does not know its batch: a cycle would outlive it."""

    def __init__(self) -> None:
        self.shifted = 0
        self.hours: dict[int, Hour] = {}

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
            counters[name] = counters.get(name, 0) + count
        for name, amount in message.exposure.items():
            exposure[name] = exposure.get(name, 0.0) + amount
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

    def measured(self) -> dict[int, Hour]:
        """The hours in which there is anything."""
        return {
            number: hour
            for number, hour in self.hours.items()
            if hour.counters or hour.exposure or hour.levels
        }

    def _hour(self, number: int) -> Hour:
        hour = self.hours.get(number)
        if hour is None:
            hour = self.hours[number] = Hour()
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


def _merge(into: dict[str, Sums], more: Mapping[str, Sums]) -> None:
    for name, sums in more.items():
        before = into.get(name)
        into[name] = sums if before is None else _added(before, sums)
