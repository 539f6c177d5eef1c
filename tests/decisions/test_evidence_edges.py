"""Small, young, quiet, absent and sleeping fleets: a verdict, or a wait that says what helps."""

from __future__ import annotations

import math

import numpy as np
import pytest

from controller.rollout.gate import Case, Judgement, Outcome, StepLimits, Verdict, judge
from telemetry.evidence.ledger import Enrolment, Ledger
from telemetry.policy import Gate, GateType, Margin, Policy
from telemetry.report import HealthRow, Level

HOUR = 3_600.0
POLICY = Policy(
    name="edges",
    gates=(
        Gate(metric="update_ok", type=GateType.PROPORTION),
        Gate(metric="crash", type=GateType.RATE, budget={"per_1000h": 40}),
        Gate(metric="heat", type=GateType.MEAN, margin=Margin(absolute=3.0)),
    ),
)


def judged(
    exposed: int,
    control: int,
    *,
    rate: float = 0.01,
    rise: float = 1.0,
    past: int = 48,
    hours: int = 48,
    away: float = 0.0,
    asleep: float = 0.0,
    seed: int = 1,
) -> Judgement:
    """`hours` of a wave, hourly messages; `away` never report, `asleep` not at night."""
    chance = np.random.default_rng(seed)
    ledger, names = Ledger(POLICY, tick=HOUR), [f"d{i}" for i in range(exposed + control)]
    own = chance.normal(50, 4, len(names))
    gone = chance.random(len(names)) < away
    sleeps = chance.random(len(names)) < asleep

    def message(i: int, hour: int) -> HealthRow:
        updated = i < exposed and hour >= 0
        crashes = int(chance.poisson(rate * (rise if updated else 1.0)))
        heat = own[i] + float(chance.normal(0, 1)) + 3 * math.sin(hour / 24 * 2 * math.pi)
        return HealthRow(
            batch=1,
            device=names[i],
            received_at=1e6 + hour * HOUR,
            boot="b",
            seq=hour + 1_000,
            attempt="a" if updated else None,
            components={"app": "new" if updated else "old"},
            t0=1e6 + (hour - 1) * HOUR,
            seconds=HOUR,
            levels={"heat": Level(n=1, total=heat, squares=heat * heat)},
            counters={"crash": crashes} if crashes else {},
            exposure={"device_hour": 1.0},
        )

    def reports(i: int, hour: int) -> bool:
        return not (gone[i] or (sleeps[i] and hour % 24 < 8))

    people = range(len(names))
    ledger.add([message(i, h) for h in range(-past, 0) for i in people if reports(i, h)])
    for i, name in enumerate(names):
        ledger.enrol(
            Enrolment(
                device=name,
                arm="exposed" if i < exposed else "control",
                wave=0,
                hardware="a",
                band=0,
                since=1e6 - 1,
                attempt="a" if i < exposed else None,
                digests={"app": "new"} if i < exposed else {},
            )
        )
    ledger.add([message(i, h) for h in range(hours) for i in people if reports(i, h)])
    here = int((~gone[:exposed]).sum())
    return judge(
        Case(
            policy=POLICY,
            step=StepLimits(
                min_soak=24 * HOUR,
                max_soak=72 * HOUR,
                soaked=hours * HOUR,
                reporting=here,
                updated=here,
            ),
            observations=ledger.snapshot(),
            # Who is away has not begun: it is in no denominator.
            outcomes=(Outcome(wave=0, hardware="a", started=here, committed=here),),
        )
    )


def test_a_fleet_of_12_waits_and_says_how_many_devices_it_lacks() -> None:
    found = judged(6, 6)
    assert found.verdict is Verdict.WAIT
    assert "of 44 devices needed" in found.sentence
    assert found.numbers["grow"] is False or "failed" in found.numbers["binding"]


def test_a_fleet_of_12_still_sees_what_is_gross() -> None:
    assert judged(6, 60, rate=0.02, rise=30, seed=3).verdict is Verdict.ROLL_BACK


def test_a_fleet_without_history_reaches_a_verdict() -> None:
    assert judged(100, 300, past=0).verdict is Verdict.WIDEN
    assert judged(100, 300, past=0, rise=5).verdict is Verdict.ROLL_BACK


def test_a_metric_without_events_is_safe_only_by_its_budget() -> None:
    assert judged(100, 300, rate=0.0).verdict is Verdict.WIDEN  # 4,800 h refute 40 per 1,000 h
    quiet = judged(60, 300, rate=0.0, hours=1)
    assert quiet.verdict is Verdict.WAIT
    assert any(
        "device hours without another event needed" in text for text in quiet.numbers["missing"]
    )


@pytest.mark.parametrize("seed", range(3))
def test_a_tenth_away_and_a_tenth_asleep_at_night_change_nothing(seed: int) -> None:
    assert judged(150, 450, away=0.1, asleep=0.1, seed=seed).verdict is Verdict.WIDEN
    bad = judged(150, 450, away=0.1, asleep=0.1, rise=4, seed=seed)
    assert bad.verdict is Verdict.ROLL_BACK
    assert "crash" in bad.sentence
