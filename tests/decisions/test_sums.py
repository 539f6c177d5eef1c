"""Packed sums: what is added is what is read, whatever the layouts; differences of whole fleets."""

from __future__ import annotations

import random

import numpy as np
import pytest

from telemetry.store.packed import HUGE, MOST, NOTHING, Packed, added
from telemetry.store.rollups import Hour
from telemetry.sums import Adding, Block, Layout, Sums


def sums(**rows: Packed) -> Sums:
    return Sums([Block.of_rows(row.layout, [name], [row.sums]) for name, row in rows.items()])


def row(*hours: Hour) -> Packed:
    return added(NOTHING, hours)


def driven(braking: int, hours: float = 1.0) -> Hour:
    return Hour(counters={"braking": braking}, exposure={"device_hour": hours})


def test_a_layout_comes_back_from_its_text() -> None:
    layout = Layout.of(["b", "a"], ["km"], ["heat"])
    again = Layout.parse(layout.text)
    assert (again.id, again.places) == (layout.id, layout.places)
    assert layout.width == 5
    assert layout.id != Layout.of(["a"], ["b", "km"], ["heat"]).id


def test_a_layout_keeps_its_id() -> None:
    """Rows of older versions are found by it."""
    assert Layout.of(["braking"], ["device_hour"], ["heat"]).id == 184564166571829422


def test_a_new_name_keeps_what_was_counted() -> None:
    before = row(driven(3, 0.5))
    later = added(before, [Hour(counters={"alarm": 1}, levels={"heat": (2, 90.0, 4050.0)})])
    found = sums(car=added(later, [driven(4, 1.5)])).since(Sums())
    assert {k: v.tolist() for k, v in found.counters.items()} == {"braking": [7], "alarm": [1]}
    assert found.exposure["device_hour"].tolist() == [2.0]
    assert found.levels["heat"].tolist() == [45.0]


def test_any_history_is_its_sum() -> None:
    """Against plain dictionaries, with names that come and go, hour by hour and ever."""
    dice = random.Random(5)
    names = [f"n{i}" for i in range(9)]
    for _ in range(50):
        packed, hours = NOTHING, []
        for _ in range(dice.randint(1, 6)):
            hour = Hour(
                counters={name: dice.randint(0, 9) for name in dice.sample(names, 3)},
                exposure={name: dice.randint(0, 40) / 4 for name in dice.sample(names, 2)},
                levels={name: (2, dice.randint(-9, 9) / 2, 0.0) for name in dice.sample(names, 2)},
            )
            hours.append(hour)
            packed = added(packed, [hour])
        adding = Adding()
        for hour in hours:
            one = row(hour)
            adding.add(Block.of_rows(one.layout, ["car"], [one.sums]))
        for found in (sums(car=packed).since(Sums()), adding.totals()):
            for name in names:
                for table, kind in ((found.counters, "counters"), (found.exposure, "exposure")):
                    total = sum(getattr(hour, kind).get(name, 0) for hour in hours)
                    assert table.get(name, np.zeros(1)).tolist() == [total]
                samples = [hour.levels[name] for hour in hours if name in hour.levels]
                if samples:
                    mean = sum(total for _, total, _ in samples) / (2 * len(samples))
                    assert found.levels[name].tolist() == [mean]
                else:
                    assert name not in found.levels


def test_who_invents_names_is_not_followed_beyond_the_bound() -> None:
    packed = row(driven(1))
    for n in range(MOST):
        packed = added(packed, [Hour(counters={f"invented_{n}": 1}), driven(1)])
    found = sums(car=packed).since(Sums())
    assert len(found.counters) == MOST - 1
    assert found.counters["braking"].tolist() == [MOST + 1]


@pytest.mark.parametrize("number", [HUGE * 2, 3.4e38, 1e100])
def test_a_number_that_would_swallow_all_others_stays_out(number: float) -> None:
    broken = Hour(exposure={"km": number}, levels={"heat": (1, -number, 0.0)})
    good = Hour(exposure={"km": 0.25}, levels={"heat": (1, 20.5, 0.0)})
    found = sums(car=row(good, broken, good)).since(Sums())
    assert found.exposure["km"].tolist() == [0.5]
    assert found.levels["heat"].tolist() == [20.5]


def test_a_difference_is_what_was_counted_between() -> None:
    then = sums(a=row(driven(1)), c=row(driven(5)))
    now = sums(a=row(driven(1), driven(2)), b=row(driven(7)), c=row(driven(5)))
    found = now.since(then)
    assert list(found.devices) == ["a", "b", "c"]
    assert found.counters["braking"].tolist() == [2, 7, 0]
    assert found.exposure["device_hour"].tolist() == [1, 1, 0]


def test_the_order_of_devices_may_change_between_two_readings() -> None:
    then = sums(c=row(driven(5)), a=row(driven(1)))
    now = sums(a=row(driven(3)), b=row(driven(7)), c=row(driven(9)))
    assert now.since(then).counters["braking"].tolist() == [2, 7, 4]


def test_a_level_is_the_mean_of_its_window() -> None:
    def heat(n: int, total: float) -> Hour:
        return Hour(levels={"heat": (n, total, 0.0)})

    then = sums(a=row(heat(100, 9_000.0)), b=row(heat(1, 50.0)))
    now = sums(a=row(heat(100, 9_000.0), heat(2, 80.0)), b=row(heat(1, 50.0)))
    np.testing.assert_array_equal(now.since(then).levels["heat"], [40.0, np.nan])


def test_what_nobody_counted_since_is_left_out() -> None:
    """A device that named a counter once shall not decide what a metric is for ever."""
    once = Hour(counters={"heat": 1})
    then = sums(a=row(once))
    now = sums(a=row(once, Hour(levels={"heat": (1, 30.0, 0.0)})))
    found = now.since(then)
    assert not found.counters
    assert found.levels["heat"].tolist() == [30.0]


def test_only_the_wanted_names_are_read() -> None:
    found = sums(a=row(driven(1))).since(Sums(), {"braking"})
    assert (list(found.counters), list(found.exposure)) == (["braking"], [])
