"""What a score reads of the store: its window or its days, each thing once."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from datetime import timedelta

import numpy as np

from telemetry.policy import Factor, Preset, ScoreSpec
from telemetry.report import Totals
from telemetry.score_days import DAY, ScoreDays
from telemetry.sums import Block, Layout, Sums

NOON = 1000 * DAY + DAY / 2
PIF = ScoreSpec(preset=Preset.PIF, factors=(Factor(metric="braking", multiplier=1.5),))


class Reader:
    """One device that brakes once a day; checkpoints of the days in `known`."""

    def __init__(self, known: Sequence[int], today: int = 1000) -> None:
        self.known, self.today = known, today
        self.asked: list[object] = []

    def checkpoints(self, since: float) -> Sequence[int]:
        older = [day for day in self.known if day * DAY <= since]
        return [day for day in self.known if not older or day >= older[-1]]

    def checkpoint(self, day: int) -> Sums:
        self.asked.append(day)
        counted = np.array([[float(day)], [24.0 * day]])
        return Sums([Block(Layout.of(["braking"], ["device_hour"], ()), ["car-1"], counted)])

    def sums(self) -> Sums:
        found = self.checkpoint(self.today + 1)
        self.asked[-1] = "now"
        return found

    def totals(self, *, since: float, until: float, names: Collection[str] | None = None) -> Totals:
        self.asked.append((since, until))
        return Totals(devices=[], counters={}, exposure={}, levels={})


def read(reader: Reader, spec: ScoreSpec, now: float) -> list[Totals]:
    return ScoreDays(reader).read(spec, now)  # type: ignore[arg-type]


def test_days_that_are_over_are_read_once() -> None:
    reader = Reader(range(900, 1001))
    days = ScoreDays(reader)  # type: ignore[arg-type]
    found = days.read(PIF, NOON)
    assert len(found) == 31
    assert [totals.counters["braking"].tolist() for totals in found] == [[1.0]] * 31
    assert sorted(map(str, reader.asked)) == [*map(str, sorted(range(970, 1001), key=str)), "now"]
    reader.asked.clear()
    assert len(days.read(PIF, NOON + 60)) == 31
    assert reader.asked == ["now"]
    reader.known, reader.today = range(900, 1002), 1001
    reader.asked.clear()
    assert len(days.read(PIF, NOON + DAY)) == 31
    assert reader.asked == [1001, "now"]


def test_a_window_is_what_was_counted_since_its_checkpoint() -> None:
    reader = Reader(range(900, 1001))
    (found,) = read(reader, ScoreSpec(), NOON)
    assert reader.asked == ["now", 970]
    assert found.exposure == {"device_hour": [24.0 * 31]}


def test_a_window_without_a_checkpoint_so_old_holds_everything() -> None:
    for known in ([], [980, 1000]):
        (found,) = read(Reader(known), ScoreSpec(), NOON)
        assert found.exposure == {"device_hour": [24.0 * 1001]}


def test_a_day_without_a_checkpoint_joins_the_next_one() -> None:
    """Nobody swept on the days before 980, and on 990 to 994."""
    found = read(Reader([*range(980, 990), *range(995, 1001)]), PIF, NOON)
    hours = [float(totals.exposure["device_hour"][0]) / 24 for totals in found]
    assert hours == [980.0, *[1.0] * 9, 6.0, *[1.0] * 6]


def test_a_short_window_is_added_up_from_its_hours() -> None:
    reader = Reader(range(900, 1001))
    read(reader, ScoreSpec(window=timedelta(hours=6)), NOON)
    assert reader.asked == [(NOON - 6 * 3600, NOON)]


def test_fleets_that_are_scored_at_once_share_a_reading() -> None:
    reader = Reader(range(900, 1001))
    days = ScoreDays(reader)  # type: ignore[arg-type]
    days.read(ScoreSpec(), NOON)
    days.read(replace(ScoreSpec(), min_exposure=1.0), NOON)
    days.read(PIF, NOON)
    assert reader.asked.count("now") == 1
