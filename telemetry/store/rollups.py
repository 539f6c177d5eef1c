"""Hourly sums per device: what the score reads, long after the raw messages are gone. Pure.

Rules, in order:

1. A message belongs to the hours of its own samples, by the device's clock, when that is plausible:
   begun at most `PAST` ago and over at most `FUTURE` ahead of the server.
2. Otherwise it is taken as having ended now: a dead clock battery shall not lose the evidence.
3. Counters and exposure have no time of their own; they stand in the hour in which the interval
   began, together, so that a rate never loses its denominator.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from device_agent.protocol import Health
from telemetry.report import Level

HOUR = 3600
PAST = 45 * 86_400.0
FUTURE = 300.0

Key = tuple[int, str, int, str]  # hour, device, kind, name


class Kind(IntEnum):
    COUNTER = 0
    EXPOSURE = 1
    LEVEL = 2


@dataclass(frozen=True, slots=True)
class Interval:
    """When the samples of a message were taken, by a clock that we believe."""

    start: float
    seconds: float
    shifted: bool  # the device's clock was not plausible


def samples(message: Health) -> int:
    """How many samples a message carries; one without columns describes one interval."""
    return max((len(column) for column in message.columns.values()), default=1)


def interval(message: Health, now: float) -> Interval:
    seconds = message.dt * samples(message)
    start = message.t0
    if now - PAST <= start and start + seconds <= now + FUTURE:
        return Interval(start, seconds, shifted=False)
    return Interval(max(now - seconds, now - PAST), seconds, shifted=True)


def levels(message: Health) -> dict[str, Level]:
    """Sums over each column; a column without one sample is left out."""
    found: dict[str, Level] = {}
    for name, column in message.columns.items():
        level = _level(column)
        if level is not None:
            found[name] = level
    return found


def parts(device: str, message: Health, when: Interval) -> Iterator[tuple[Key, Level]]:
    """The message's share of every hour that it touches."""
    hour = int(when.start // HOUR)
    for name, count in message.counters.items():
        yield (hour, device, Kind.COUNTER, name), Level(n=1, total=float(count), squares=0.0)
    for name, amount in message.exposure.items():
        yield (hour, device, Kind.EXPOSURE, name), Level(n=1, total=amount, squares=0.0)
    if int((when.start + when.seconds) // HOUR) == hour:
        for name, level in levels(message).items():
            yield (hour, device, Kind.LEVEL, name), level
        return
    latest = int((when.start + when.seconds) // HOUR)
    for name, column in message.columns.items():
        by_hour: dict[int, list[float | None]] = {}
        for place, sample in enumerate(column):
            own = int((when.start + place * message.dt) // HOUR)
            by_hour.setdefault(min(own, latest), []).append(sample)
        for own, share in by_hour.items():
            part = _level(share)
            if part is not None:
                yield (own, device, Kind.LEVEL, name), part


def _level(column: tuple[float | None, ...] | list[float | None]) -> Level | None:
    known = [sample for sample in column if sample is not None]
    if not known:
        return None
    return Level(n=len(known), total=sum(known), squares=sum(x * x for x in known))
