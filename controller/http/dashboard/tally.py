"""Counts against the plan: a bar's segments with their words, nobody left out. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from controller.http.dashboard.signs import Tone, of_member

# Best first, then what is under way, then what is wrong: the order of reading.
ORDER = ("updated", "told", "drawn", "back", "failed", "silent", "left")


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    key: str  # what a filter of the device list calls it
    word: str
    tone: Tone
    n: int
    x: float  # per cent of the bar
    width: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    total: int
    segments: tuple[Segment, ...]

    def n(self, key: str) -> int:
        return sum(segment.n for segment in self.segments if segment.key == key)


def members(counts: Mapping[str, int]) -> Tally:
    """A step's or a rollout's members by state."""
    known = [(key, counts[key]) for key in ORDER if counts.get(key)]
    known += [(key, n) for key, n in sorted(counts.items()) if key not in ORDER and n]
    return tally((key, of_member(key).word, of_member(key).tone, n) for key, n in known)


def standing(now: Mapping[str, int], counts: Mapping[str, int]) -> Tally:
    """The current step as the loop last saw it: who is out of reach and who defers apart.

    `counts` is by state, from the counters; where the two do not add up, the counters are right.
    """
    told = [
        ("updated", "Updated", Tone.GOOD, now.get("updated", 0)),
        ("told", "In progress", Tone.MOVING, now.get("waiting", 0)),
        ("told", "Deferred by the device", Tone.WAIT, now.get("deferred", 0)),
        ("drawn", "Not told yet", Tone.IDLE, now.get("untold", 0)),
        ("told", "Offline", Tone.WAIT, now.get("offline", 0)),
        ("failed", "Failed", Tone.BAD, now.get("failed", 0)),
        ("silent", "Silent", Tone.BAD, now.get("silent", 0)),
    ]
    seen = members(counts)
    away = sum(n for key, n in counts.items() if key in ("left", "back"))
    if sum(n for *_, n in told) != seen.total - away:
        return seen
    gone = [(s.key, s.word, s.tone, s.n) for s in seen.segments if s.key in ("left", "back")]
    return tally([part for part in (*told, *gone) if part[3]])


def tally(parts: Iterable[tuple[str, str, Tone, int]]) -> Tally:
    parts = list(parts)
    total = sum(n for *_, n in parts)
    segments, x = [], 0.0
    for key, word, tone, n in parts:
        width = 100 * n / total if total else 0.0
        segments.append(
            Segment(key=key, word=word, tone=tone, n=n, x=round(x, 3), width=round(width, 3))
        )
        x += width
    return Tally(total=total, segments=tuple(segments))
