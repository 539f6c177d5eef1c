"""A fleet of 10,000 with a known harm: what each way of drawing may claim about it.

Score, draw, match, ledger and guardrail are the product's own; only the fleet is made up. Device
rates are 0.01/h × log-normal (sd 1), online 40 % of the time; the score comes from 14 days of the
device's own past, the wave lasts 48 h. A single run's estimate scatters by 15 %, so that the mean
of its logarithm over seeds is compared with the truth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest

from controller.manifests.kinds import Cohort
from controller.rollout import controls
from controller.rollout.cohort import draw, scored
from controller.rollout.model import Device
from telemetry.evidence import guardrails
from telemetry.evidence.guardrails import Reading
from telemetry.evidence.ledger import Enrolment, Ledger
from telemetry.policy import Factor, Gate, GateType, Margin, Policy, ScoreSpec
from telemetry.report import HealthRow, Totals
from telemetry.score import bands, score

N = 10_000
PAST, WAVE, DUTY = 14 * 24.0, 48.0, 0.4
GATE = Gate(metric="braking", type=GateType.RATE, margin=Margin(ratio=1.5))
POLICY = Policy(name="p", gates=(GATE,))
SPEC = ScoreSpec(
    min_exposure=1.0, factors=(Factor(metric="braking", good=0.0, bad=0.1, weight=100.0),)
)
START = 1_000_000.0


@dataclass
class Seen:
    reading: Reading
    truth: float  # the true ratio of the fleet
    own: float  # ratio by first events in the wave's own strata
    naive: float  # the wave against everybody else: what nobody may be shown
    valid_from: float | None


@cache
def run(mode: str, ratio: float, seed: int, only_risky: bool = False) -> Seen:
    dice = np.random.default_rng(seed)
    rates = 0.01 * np.exp(dice.normal(0.0, 1.0, N))
    names = [f"d-{i:05d}" for i in range(N)]
    before = dice.poisson(rates * PAST * DUTY)
    totals = Totals(
        devices=names,
        counters={"braking": before.astype(float)},
        exposure={"device_hour": np.full(N, PAST * DUTY)},
        levels={},
    )
    result = score(totals, SPEC)
    quintiles = bands(result)
    values = {
        name: (float(v), int(b)) for name, v, b in zip(names, result.value, quintiles, strict=True)
    }
    devices = [Device(id=n, fleet="f", labels={"hardware": "hw3"}, status="active") for n in names]
    everybody = scored(devices, values)
    cohort = Cohort.model_validate({"name": "canary", "select": {"mode": mode}})
    drawn = draw(cohort, inside=everybody, already=frozenset(), percent=0.05, seed=str(seed))
    taken = {c.device.id for c in drawn.exposed}
    matched = controls.match(
        cohort, drawn.exposed, [c for c in everybody if c.device.id not in taken], str(seed),
        engine=POLICY.engine, best_first=drawn.valid_from is not None,
    )  # fmt: skip
    harmed = rates >= np.quantile(rates, 0.6) if only_risky else np.ones(N, dtype=bool)
    harm = np.where(harmed, ratio, 1.0)
    ledger = Ledger(POLICY, tick=3600.0)
    place = {name: i for i, name in enumerate(names)}
    arms = [("exposed", c) for c in drawn.exposed] + [("control", c) for c in matched.chosen]
    ledger.add(
        _row(name, START - PAST * 3600, PAST * DUTY, int(before[place[name]]), None)
        for name in (c.device.id for _, c in arms)
    )
    rows = []
    for arm, c in arms:
        attempt = "a" if arm == "exposed" else None
        ledger.enrol(
            Enrolment(
                device=c.device.id, arm=arm, wave=0, hardware="hw3", band=c.band,
                since=START, attempt=attempt,
            )
        )  # fmt: skip
        mean = rates[place[c.device.id]] * (harm[place[c.device.id]] if attempt else 1.0)
        for hour in range(0, int(WAVE), 6):
            count = int(dice.poisson(mean * 6 * DUTY))
            rows.append(_row(c.device.id, START + hour * 3600, 6 * DUTY, count, attempt))
    ledger.add(rows)
    seen = ledger.snapshot().metric("braking")
    weights = controls.weights(everybody)
    reading = guardrails.rate(POLICY.engine, GATE, seen, 1.5, weights)
    exposed = np.array([place[c.device.id] for c in drawn.exposed])
    others = np.ones(N, dtype=bool)
    others[exposed] = False
    events = sum(t.events for t in seen.totals if t.arm == "exposed")
    hours = sum(t.exposure for t in seen.totals if t.arm == "exposed")
    now = dice.poisson(rates[others] * WAVE * DUTY).sum() / (WAVE * DUTY * others.sum())
    return Seen(
        reading=reading,
        truth=float((rates * harm).sum() / rates.sum()),
        own=reading.estimate,
        naive=float(events / hours / now),
        valid_from=drawn.valid_from,
    )


def _row(device: str, at: float, hours: float, count: int, attempt: str | None) -> HealthRow:
    return HealthRow(
        batch=1, device=device, received_at=at + 6 * 3600, boot="b", seq=int(at), attempt=attempt,
        components={}, t0=at, seconds=hours * 3600, levels={}, counters={"braking": count},
        exposure={"device_hour": hours},
    )  # fmt: skip


def geometric(values: list[float]) -> float:
    return math.exp(sum(math.log(v) for v in values) / len(values))


def fleetwide(seen: Seen) -> dict[str, Any]:
    found: dict[str, Any] = dict(seen.reading.counts["fleet"])
    return found


SEEDS = range(700, 704)


@pytest.mark.parametrize("mode", ["stratified", "hybrid"])
def test_a_doubled_rate_is_estimated_for_the_fleet(mode: str) -> None:
    runs = [run(mode, 2.0, seed) for seed in SEEDS]
    assert geometric([fleetwide(r)["ratio"] for r in runs]) == pytest.approx(2.0, rel=0.1)
    assert all(fleetwide(r)["covered"] > 0.999 for r in runs)
    assert all(fleetwide(r)["ratio_band"][0] < 2.0 < fleetwide(r)["ratio_band"][1] for r in runs)


def test_best_first_estimates_a_doubled_rate_for_its_own_band_and_says_so() -> None:
    runs = [run("best_first", 2.0, seed) for seed in SEEDS]
    assert geometric([fleetwide(r)["ratio"] for r in runs]) == pytest.approx(2.0, rel=0.1)
    for r in runs:
        assert r.valid_from is not None
        assert fleetwide(r)["covered"] < 0.5  # and the sentence names that part of the fleet
        assert " % of it" in r.reading.says
    # What everybody's rate would have said: a doubled rate is hidden completely.
    assert geometric([r.naive for r in runs]) < 1.1


def test_hybrid_weighted_by_the_fleet_finds_harm_that_lives_in_the_risky() -> None:
    runs = [run("hybrid", 3.0, seed, only_risky=True) for seed in SEEDS]
    truth = geometric([r.truth for r in runs])
    weighted = geometric([fleetwide(r)["ratio"] for r in runs])
    assert weighted == pytest.approx(truth, rel=0.12)


def test_the_excess_says_how_many_events_a_ratio_stands_for() -> None:
    runs = [run("stratified", 2.0, seed) for seed in SEEDS]
    # A rate of 0.01/h × e^½ doubled: 16.5 more events per 1,000 device hours.
    mean = sum(fleetwide(r)["excess_per_1000"] for r in runs) / len(runs)
    assert mean == pytest.approx(10 * math.exp(0.5), rel=0.15)


def test_a_harmless_release_is_one_to_one_for_the_fleet() -> None:
    runs = [run(mode, 1.0, seed) for mode in ("stratified", "hybrid") for seed in SEEDS]
    assert geometric([fleetwide(r)["ratio"] for r in runs]) == pytest.approx(1.0, rel=0.06)
    assert all(r.reading.harm < 80 for r in runs)  # 1 ÷ (α × its weight of 0.25)
