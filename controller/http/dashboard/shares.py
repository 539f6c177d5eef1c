"""Who ran what, day by day: each device's own history, counted. Pure.

A device's moves are the days on which it changed: from its history, by its own clock, never later
than its last word by ours. Counts of moves are kept with the census and added up here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from telemetry.report import DeviceRow

DAY = 86_400
DAYS = 14  # shown
_MOST = 5  # releases of one chart; the others are added up
OTHERS = "other releases"

Move = tuple[str, int, str, int]  # component, day since 1970, release, +1 or −1
Moves = Mapping[tuple[int, str], int]  # (day, release) → devices that came less those that went


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """One component of one fleet. `days`: (RFC 3339 date, devices of each release)."""

    fleet: str
    component: str
    releases: tuple[str, ...]
    days: tuple[tuple[str, tuple[int, ...]], ...]


def moves(seen: DeviceRow) -> Iterator[Move]:
    """When this device came to each release and left it."""
    latest = int((seen.reported_at or seen.last_contact) // DAY)
    for component, part in sorted(seen.components.items()):
        day, runs = 0, ""
        for entry in seen.history:
            if entry.component == component and entry.release != runs:
                day = min(max(int(entry.at // DAY), day), latest)
                yield from _moved(component, day, runs, entry.release)
                runs = entry.release
        if part.release != runs:  # its history does not say since when
            yield from _moved(component, latest, runs, part.release)


def _moved(component: str, day: int, before: str, after: str) -> Iterator[Move]:
    if before:
        yield component, day, before, -1
    yield component, day, after, 1


def over_time(fleet: str, component: str, counted: Moves, now: float) -> Share:
    """The last days, the oldest first; the releases that most devices ran in them."""
    today = int(now // DAY)
    first = today - DAYS + 1
    runs: Counter[str] = Counter()
    by_day: list[Counter[str]] = []
    pending = sorted(counted.items())
    for day in range(first, today + 1):
        while pending and (pending[0][0][0] <= day or day == today):
            (_, release), n = pending.pop(0)
            runs[release] += n
        by_day.append(Counter({name: n for name, n in runs.items() if n > 0}))
    most: Counter[str] = Counter()
    for counts in by_day:
        most |= counts
    shown = [name for name, _ in sorted(most.items(), key=lambda item: (-item[1], item[0]))]
    names = tuple(shown[:_MOST])
    rest = shown[_MOST:]
    return Share(
        fleet=fleet,
        component=component,
        releases=(*names, *([OTHERS] if rest else ())),
        days=tuple(
            (
                datetime.fromtimestamp(day * DAY, UTC).date().isoformat(),
                (*(counts[name] for name in names),
                 *([sum(counts[name] for name in rest)] if rest else ())),
            )
            for day, counts in zip(range(first, today + 1), by_day, strict=True)
        ),
    )  # fmt: skip
