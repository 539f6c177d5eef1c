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
from typing import Protocol

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
        self._hours: dict[tuple[int, str], _Hour] = {}

    def add(
        self, device: str, message: Measured, levels: Mapping[str, Sums], now: float
    ) -> tuple[float, bool]:
        """(seconds of the interval, was its clock not plausible); `levels` are the message's."""
        seconds = message.dt * samples(message.columns)
        start, shifted = message.t0, False
        if not (now - PAST <= start and start + seconds <= now + FUTURE):
            start, shifted = max(now - seconds, now - PAST), True
        first, last = int(start // HOUR), int((start + seconds) // HOUR)
        hour = self._hour(first, device)
        counters, exposure = hour.counters, hour.exposure
        for name, count in message.counters.items():
            n, whole = counters.get(name, (0, 0))
            counters[name] = (n + 1, whole + count)
        for name, amount in message.exposure.items():
            n, total = exposure.get(name, (0, 0.0))
            exposure[name] = (n + 1, total + amount)
        if first == last:
            _merge(hour.levels, levels)
        else:
            self._spread(device, message, start, last)
        return seconds, shifted

    def rows(self) -> Iterator[Row]:
        for (number, device), hour in sorted(self._hours.items()):
            for name, (n, whole) in hour.counters.items():
                yield number, device, Kind.COUNTER.value, name, n, float(whole), 0.0
            for name, (n, total) in hour.exposure.items():
                yield number, device, Kind.EXPOSURE.value, name, n, total, 0.0
            for name, (n, total, squares) in hour.levels.items():
                yield number, device, Kind.LEVEL.value, name, n, total, squares

    def _hour(self, number: int, device: str) -> _Hour:
        hour = self._hours.get((number, device))
        if hour is None:
            hour = self._hours[number, device] = _Hour()
        return hour

    def _spread(self, device: str, message: Measured, start: float, last: int) -> None:
        """Samples of an interval that crosses an hour, each to its own."""
        for name, column in message.columns.items():
            by_hour: dict[int, list[float | None]] = {}
            for place, sample in enumerate(column):
                own = int((start + place * message.dt) // HOUR)
                by_hour.setdefault(min(own, last), []).append(sample)
            for own, share in by_hour.items():
                _merge(self._hour(own, device).levels, levels({name: tuple(share)}))


def samples(columns: Mapping[str, Column]) -> int:
    """How many samples a message carries; one without columns describes one interval."""
    for column in columns.values():
        return len(column)
    return 1


def levels(columns: Mapping[str, Column]) -> dict[str, Sums]:
    """Sums over each column; a column without one sample is left out."""
    found: dict[str, Sums] = {}
    for name, column in columns.items():
        if len(column) == 1:
            sample = column[0]
            if sample is not None:
                found[name] = (1, sample, sample * sample)
            continue
        known = [sample for sample in column if sample is not None]
        if known:
            found[name] = (len(known), sum(known), sum(map(mul, known, known)))
    return found


def _merge(into: dict[str, Sums], more: Mapping[str, Sums]) -> None:
    for name, (n, total, squares) in more.items():
        before = into.get(name)
        if before is None:
            into[name] = (n, total, squares)
        else:
            into[name] = (before[0] + n, before[1] + total, before[2] + squares)
