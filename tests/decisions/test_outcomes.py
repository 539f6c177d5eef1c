"""What a release changed, judged by the draw; and how a team ships."""

from __future__ import annotations

import math

import numpy as np
import pytest

from controller.manifests.policies import Refused, build
from telemetry.outcomes import Goal, Shipped, Stratum, Verdict, delivery, goal, measure
from telemetry.policy import Direction, Engine, GateType
from telemetry.report import HealthRow, Level, Totals, added

ENGINE = Engine()
KM = Goal(metric="km_alone", type=GateType.MEAN, direction=Direction.INCREASE)
STOPS = Goal(metric="stops", type=GateType.RATE, direction=Direction.DECREASE)
NAMES = [f"d-{i:04d}" for i in range(1000)]


def totals(levels: np.ndarray, events: np.ndarray, hours: float = 100.0) -> Totals:
    return Totals(
        devices=NAMES, counters={"stops": events}, levels={"km_alone": levels},
        exposure={"device_hour": np.full(len(NAMES), hours)},
    )  # fmt: skip


def drawn(
    seed: int, more: float = 0.0, ratio: float = 1.0, best: bool = False, took: float = 1.0
) -> Stratum:
    """700 treated, 300 left out. `best`: the treated were picked by their past."""
    dice = np.random.default_rng(seed)
    own = dice.normal(50, 10, 1000)
    rate = 0.05 * dice.gamma(2, 0.5, 1000)
    before = own + dice.normal(0, 5, 1000)
    order = np.argsort(-before) if best else dice.permutation(1000)
    treated = np.zeros(1000, dtype=bool)
    treated[order[:700]] = True
    installed = treated & (dice.random(1000) < took)
    after = own + dice.normal(0, 5, 1000) + more * installed
    events = dice.poisson(rate * 100 * np.where(installed, ratio, 1.0)).astype(float)
    names = np.array(NAMES)
    return Stratum(
        treated=frozenset(names[treated]),
        control=frozenset(names[~treated]),
        before=totals(before, dice.poisson(rate * 100).astype(float)),
        since=totals(after, events),
    )


def test_a_benefit_is_found_with_its_band() -> None:
    found = measure(KM, [drawn(1, more=2.0)], "the holdout", ENGINE)
    assert found.verdict is Verdict.BETTER
    assert found.estimate == pytest.approx(2.0, abs=1.0)
    assert found.band is not None
    assert found.band[0] < 2.0 < found.band[1]
    assert (found.treated, found.control) == (700, 300)
    assert found.sentence.startswith("km alone: better, +")
    assert "against the holdout; 700 devices by the draw, 300 compared" in found.sentence


def test_fewer_events_are_better_where_the_goal_says_so() -> None:
    found = measure(STOPS, [drawn(2, ratio=0.6)], "the holdout", ENGINE)
    assert found.verdict is Verdict.BETTER
    assert found.estimate == pytest.approx(0.6, abs=0.1)
    worse = measure(STOPS, [drawn(3, ratio=1.6)], "the holdout", ENGINE)
    assert worse.verdict is Verdict.WORSE


def test_no_change_is_seldom_called_one_and_the_band_covers() -> None:
    for aim, truth in ((KM, 0.0), (STOPS, 1.0)):
        found = [measure(aim, [drawn(seed)], "the holdout", ENGINE) for seed in range(60)]
        assert sum(f.verdict is not Verdict.NO_DIFFERENCE for f in found) <= 3
        assert sum(f.band is not None and f.band[0] <= truth <= f.band[1] for f in found) >= 57


def test_a_cohort_picked_by_its_past_is_not_taken_for_a_benefit() -> None:
    """Before against after it would have lost: its own luck runs out (regression to the mean)."""
    one = drawn(4, best=True)
    place = {name: i for i, name in enumerate(NAMES)}
    treated = [place[d] for d in one.treated]
    change = one.since.levels["km_alone"][treated] - one.before.levels["km_alone"][treated]
    assert change.mean() < -0.5
    assert measure(KM, [one], "the holdout", ENGINE).verdict is Verdict.NO_DIFFERENCE


def test_who_was_drawn_counts_not_who_installed() -> None:
    found = measure(KM, [drawn(5, more=8.0, took=0.5)], "the holdout", ENGINE)
    assert found.treated == 700
    assert found.estimate == pytest.approx(4.0, abs=1.2)


def test_strata_add() -> None:
    one = measure(KM, [drawn(6, more=1.0)], "x", ENGINE)
    two = measure(KM, [drawn(6, more=1.0), drawn(7, more=1.0)], "x", ENGINE)
    assert one.band is not None
    assert two.band is not None
    assert two.band[1] - two.band[0] < one.band[1] - one.band[0]


@pytest.mark.parametrize(
    ("strata", "words"),
    [
        ([], "no holdout"),
        ([Stratum(treated=frozenset("a"), control=frozenset(),
                  before=totals(np.zeros(1000), np.zeros(1000)),
                  since=totals(np.zeros(1000), np.zeros(1000)))], "no holdout"),
        ([Stratum(treated=frozenset(NAMES[:3]), control=frozenset(NAMES[3:9]),
                  before=totals(np.zeros(1000), np.zeros(1000)),
                  since=totals(np.zeros(1000), np.zeros(1000)))], "5 are needed"),
        ([Stratum(treated=frozenset(NAMES[:500]), control=frozenset(NAMES[500:]),
                  before=totals(np.zeros(1000), np.zeros(1000)),
                  since=totals(np.full(1000, math.nan), np.zeros(1000)))], "0 drawn and 0 other"),
        ([Stratum(treated=frozenset(NAMES[:500]), control=frozenset(NAMES[500:]),
                  before=totals(np.ones(1000), np.zeros(1000)),
                  since=totals(np.ones(1000), np.zeros(1000)))], "nothing to compare"),
    ],
)  # fmt: skip
def test_not_measurable_says_why(strata: list[Stratum], words: str) -> None:
    found = measure(KM, strata, "the holdout", ENGINE)
    assert found.verdict is Verdict.NOT_MEASURABLE
    assert found.estimate is None
    assert found.band is None
    assert words in found.sentence
    assert "not measurable — " in found.sentence


def test_a_rate_nobody_reported_is_not_measurable() -> None:
    other = Goal(metric="unheard", type=GateType.RATE, direction=Direction.DECREASE)
    assert measure(other, [drawn(8)], "x", ENGINE).verdict is Verdict.NOT_MEASURABLE


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({}, "needs a metric"),
        ({"metric": "a", "type": "event"}, "mean or a rate"),
        ({"metric": "a", "direction": "up"}, "increase or decrease"),
        ({"metric": "a", "wat": 1}, "unknown field"),
        ({"metric": "a", "per": "∞ km"}, "no unit"),
    ],
)
def test_hostile_goals_are_refused_with_their_place(data: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        goal(data)
    with pytest.raises(Refused) as refused:
        build({"name": "p"}, {"goals": [data]})
    assert refused.value.faults[0][0] == ("goals", 0)


def test_messages_add_up_to_the_same_totals() -> None:
    def row(device: str, seq: int, km: float) -> HealthRow:
        return HealthRow(
            batch=1, device=device, received_at=9.0, boot="b", seq=seq, attempt=None,
            components={}, t0=1.0, seconds=1800.0, counters={"stops": 3}, exposure={"km": 5.0},
            levels={"km_alone": Level(n=2, total=2 * km, squares=2 * km**2)},
        )  # fmt: skip

    found = added([row("a", 1, 10.0), row("a", 2, 20.0), row("b", 1, 7.0)])
    assert list(found.devices) == ["a", "b"]
    assert list(found.levels["km_alone"]) == [15.0, 7.0]
    assert list(found.counters["stops"]) == [6.0, 3.0]
    assert list(found.exposure["device_hour"]) == [1.0, 0.5]


# -- delivery -------------------------------------------------------------------------------------


def shipped(state: str, **more: object) -> Shipped:
    values = {
        "rollout": "r", "product": "autopilot", "team": "driving", "state": state,
        "committed_at": 0.0, "finished_at": None, "rejected_at": None, "fixes": False, **more,
    }  # fmt: skip
    return Shipped(**values)  # type: ignore[arg-type]


def test_the_five_measures_of_delivery() -> None:
    found = delivery(
        [
            shipped("Completed", finished_at=3600.0),
            shipped("Completed", finished_at=7200.0, fixes=True),
            shipped("RolledBack", rejected_at=100.0, finished_at=160.0),
            shipped("Soaking"),
            shipped("Completed", team="maps", finished_at=1.0),
        ],
        days=14,
    )
    assert [(d.product, d.team) for d in found] == [("autopilot", "driving"), ("autopilot", "maps")]
    by_name = {m.name: m for m in found[0].measures}
    assert by_name["deployment_frequency"].value == 1.0
    assert by_name["lead_time"].value == 5400.0
    assert by_name["change_failure_rate"].value == pytest.approx(1 / 3)
    assert (by_name["change_failure_rate"].n, by_name["change_failure_rate"].of) == (1, 3)
    assert by_name["recovery_time"].value == 60.0
    assert by_name["rework_rate"].value == 0.25
    assert all(m.definition for m in found[0].measures)


def test_nothing_shipped_measures_nothing() -> None:
    assert delivery([], 30) == ()
    by_name = {m.name: m.value for m in delivery([shipped("Soaking")], 30)[0].measures}
    assert by_name["lead_time"] is None
    assert by_name["change_failure_rate"] is None
