"""What the gate says while a step soaks, told three times: clean, harmful, too thin to prove.

Real observations through the real ledger and the real gate: so pages show true bands, and a replay
of what they show gives the same verdict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from controller.rollout.gate import Case, Outcome, Silence, StepLimits, judge
from telemetry.evidence.ledger import Enrolment, Ledger
from telemetry.policy import Factor, Gate, GateType, Margin, Policy, ScoreSpec
from telemetry.report import HealthRow, Level

POLICY = Policy(
    name="driving",
    score=ScoreSpec(
        min_exposure=20.0,
        factors=(Factor(metric="disengagement", per="1000h", good=0.0, bad=100.0, weight=60.0),),
    ),
    gates=(
        Gate(metric="update_ok", type=GateType.PROPORTION),
        Gate(
            metric="disengagement",
            type=GateType.RATE,
            per="1000h",
            margin=Margin(ratio=2.0),
            budget={"per_1000h": 60},
        ),
        Gate(metric="collision", type=GateType.EVENT, tripwire_devices=2),
        Gate(metric="cabin_cpu", type=GateType.MEAN, margin=Margin(ratio=1.2), dry_run=True),
    ),
)
_SOAK = 86_400.0
_TICKS = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """One judgement as the loop would have recorded it."""

    verdict: str
    sentence: str
    inputs: Mapping[str, Any]
    numbers: Mapping[str, Any]
    soaked: float


@cache
def story(name: str, seed: int) -> Sequence[Told]:
    """Judgements of one step, oldest first, up to the one that ends it."""
    ratio, exposed, controls = {
        "clean": (1.0, 240, 600),
        "harmful": (2.6, 60, 200),
        "thin": (1.0, 9, 9),
    }[name]
    chance = np.random.default_rng(seed)
    ledger = Ledger(POLICY, tick=_SOAK / _TICKS)
    names = [f"d{i:04d}" for i in range(exposed + controls)]
    for place, device in enumerate(names):
        ledger.enrol(_enrolment(device, place, place < exposed))
    frailty = chance.lognormal(-0.5, 1, len(names))
    told: list[Told] = []
    for tick in range(_TICKS):
        rate = 0.03 * frailty
        rate[:exposed] *= ratio
        events = chance.poisson(rate)
        ledger.add(
            [_row(d, tick, int(events[i]), i < exposed, chance) for i, d in enumerate(names)]
        )
        soaked = _SOAK * (tick + 1) / _TICKS * (3 if name == "thin" else 1)
        one = _judged(ledger, exposed, controls, soaked)
        told.append(one)
        if one.verdict in ("roll_back", "widen", "inconclusive"):
            break
    return told


def _judged(ledger: Ledger, exposed: int, controls: int, soaked: float) -> Told:
    half = exposed // 2
    case = Case(
        policy=POLICY,
        step=StepLimits(
            name="early 10%", wave=1, min_soak=_SOAK, max_soak=3 * _SOAK, soaked=soaked,
            reporting=exposed, updated=exposed,
        ),
        observations=ledger.snapshot(),
        outcomes=tuple(
            Outcome(wave=1, hardware=hardware, started=n, committed=n - bad, failed=bad)
            for hardware, n, bad in (("m3-hw3", half, 0), ("m3-hw4", exposed - half, 0))
        ),
        silence=(Silence(wave=1, hardware="m3-hw3", exposed=exposed, exposed_silent=0,
                         control=controls, control_silent=1),),
        release="autopilot",
        commit="9c1f2ab",
    )  # fmt: skip
    said = judge(case)
    return Told(
        verdict=str(said.verdict),
        sentence=said.sentence,
        inputs=case.to_json(),
        numbers=dict(said.numbers),
        soaked=soaked,
    )


def _enrolment(device: str, place: int, exposed: bool) -> Enrolment:
    base = Enrolment(
        device=device, arm="control", wave=1, hardware=("m3-hw3", "m3-hw4")[place % 2],
        band=place % 5, since=0.0,
    )  # fmt: skip
    if not exposed:
        return base
    return replace(base, arm="exposed", attempt="a1", digests={"autopilot": "new"})


def _row(device: str, tick: int, events: int, exposed: bool, chance: Any) -> HealthRow:
    level, end = 50 + float(chance.normal()), _SOAK / _TICKS * (tick + 1)
    return HealthRow(
        batch=1,
        device=device,
        received_at=end,
        boot="b",
        seq=tick,
        attempt="a1" if exposed else None,
        components={"autopilot": "new" if exposed else "old"},
        t0=end - _SOAK / _TICKS,
        seconds=_SOAK / _TICKS,
        levels={"cabin_cpu": Level(n=60, total=60 * level, squares=60 * level**2)},
        counters={"disengagement": events} if events else {},
        exposure={"device_hour": 1.0},
    )
