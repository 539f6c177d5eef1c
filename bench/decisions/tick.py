"""What a tick costs, from rollups to verdict, and what a rollout keeps, as the fleet grows."""

from __future__ import annotations

import json
import time
from statistics import median

import numpy as np

from bench.report import Row
from controller.rollout.gate import Case, Outcome, Silence, StepLimits, judge
from telemetry.evidence.tally import Rollup, Tally, observe
from telemetry.policy import Gate, GateType, Margin, Policy

SIZES = (1_000, 15_000, 100_000, 1_000_000)
LIMIT_SIZE = 15_000  # 10,000 devices in waves and 5,000 controls
HARDWARE = "ABCDE"
WAVES = 2
TICKS = 24
MEASURED = 8
RATES = tuple(Gate(metric=f"rate{i}", type=GateType.RATE) for i in range(4))
LEVELS = tuple(
    Gate(metric=f"level{i}", type=GateType.MEAN, margin=Margin(absolute=2.0)) for i in range(4)
)
POLICY = Policy(
    name="tick",
    gates=(Gate(metric="update_ok", type=GateType.PROPORTION), *RATES, *LEVELS),
)


def rows() -> list[Row]:
    """Milliseconds of one core a tick, bytes of state: 8 guardrails and outcomes, 10 strata."""
    found = []
    for size in SIZES:
        milliseconds, stored = _measure(size)
        limited = size == LIMIT_SIZE
        found.append(
            Row(
                name=f"tick of {size:,} devices",
                value=milliseconds,
                unit="ms",
                limit=50.0 if limited else None,
                peer="issue 4" if limited else "",
                more={"devices": size},
            )
        )
        found.append(
            Row(
                name=f"state of {size:,} devices",
                value=float(stored),
                unit="bytes",
                limit=1e6,
                peer="issue 4",
                more={"devices": size},
            )
        )
    return found


def _measure(devices: int) -> tuple[float, int]:
    chance = np.random.default_rng(devices)
    tally = Tally(POLICY.engine, RATES, LEVELS)
    exposed = devices * 2 // 3
    strata = [(w, h) for w in range(WAVES) for h in HARDWARE]
    for k, (wave, kind) in enumerate(strata):
        for arm, many in ((True, exposed), (False, devices - exposed)):
            here = many // len(strata) + (k < many % len(strata))
            tally.enrol_all(wave, [kind] * here, 0, arm)
    tally.past("hours")[:] = 100.0
    tally.past("messages")[:] = 100.0
    spent = []
    for at in range(TICKS):
        rollup = _rollup(chance, devices, at)
        start = time.process_time()
        tally.fold(rollup)
        case = Case(
            policy=POLICY,
            step=StepLimits(reporting=exposed, updated=exposed, soaked=at * 3600.0),
            observations=observe(tally, RATES, LEVELS),
            outcomes=tuple(
                Outcome(wave=w, hardware=h, started=exposed // 10, committed=exposed // 10)
                for w, h in strata
            ),
            silence=tuple(
                Silence(wave=w, hardware=h, exposed=exposed // 10, exposed_silent=0)
                for w, h in strata
            ),
        )
        judge(case)
        spent.append(time.process_time() - start)
    stored = len(json.dumps(case.to_json(), separators=(",", ":")))
    return median(spent[-MEASURED:]) * 1000, stored


def _rollup(chance: np.random.Generator, devices: int, at: int) -> Rollup:
    who = np.flatnonzero(chance.random(devices) < 0.9)
    return Rollup(
        unit=who,
        tick=np.full(who.size, at),
        hours=np.ones(who.size),
        counts={gate.metric: chance.poisson(0.005, who.size) for gate in RATES},
        levels={
            gate.metric: (np.ones(who.size), chance.normal(50, 5, who.size)) for gate in LEVELS
        },
    )
