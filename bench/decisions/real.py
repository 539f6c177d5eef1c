"""`--real CSV`: does the promise hold on your fleet? A/A and A/B on its own history.

Many times: a moment and two random groups of devices are drawn. Nothing happened to either (A/A),
or harm is added to one (A/B: events recur, levels shift). The production decision looks after every
tick. A/A rollbacks are false by construction; their share must stay at or below α.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np

from bench.decisions.history import Floats, History, Ints, Unreadable, read
from bench.report import Options, Row
from controller.rollout.gate import Case, StepLimits, Verdict, judge
from telemetry.evidence.ledger import Shape, shape_of
from telemetry.evidence.outcome import upper_bound
from telemetry.evidence.tally import Rollup, Tally, observe
from telemetry.policy import Gate, GateType, Margin, Policy

SIZES = (10, 30, 100, 300, 1_000)  # devices per arm; the control takes up to five times as many
RUNS = 100
TICKS = 72  # looks, at most
FACTOR = 2.0  # A/B: events × this
SHIFT = 1.0  # A/B: levels + this many standard deviations between devices
BASELINE_DAYS = 14
LEAST = 20  # devices in the file
WRONG_CLOCK = 20  # × the stretch that holds 99 % of the rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The fleet's history with what is judged and how finely it is looked at."""

    history: History
    policy: Policy
    tick: float  # seconds
    scatter: Mapping[str, float]  # of a level between devices

    @property
    def rates(self) -> tuple[Gate, ...]:
        return self.policy.of(GateType.RATE)

    @property
    def means(self) -> tuple[Gate, ...]:
        return self.policy.of(GateType.MEAN)


def run(options: Options) -> list[Row]:
    """A row per arm size, A/A and A/B; raises Unreadable (a ValueError) for a file that is none."""
    plan = prepared(read(options.real or Path("history.csv")))
    sizes = [n for n in SIZES if 2 * n <= len(plan.history.devices)]
    runs = options.runs or RUNS
    rows = []
    for size in sizes:
        for harmed in (False, True):
            seeds = [[options.seed, size, k] for k in range(runs)]
            hit = sum(_all(partial(rolled_back, plan, size, harmed), seeds, options.jobs))
            rows.append(_row(plan, size, harmed, hit, runs))
    return rows


def prepared(history: History) -> Plan:
    if len(history.devices) < LEAST:
        raise Unreadable(f"{len(history.devices)} devices; two groups of 10 need {LEAST}")
    span = float(history.time[-1] - history.time[0])
    _timely(history, span)
    gaps = _gaps(history)
    if span <= 0 or gaps.size == 0:
        raise Unreadable("every device has one row only: there is no time to look at")
    tick = max(float(np.median(gaps)), span * 0.6 / TICKS)
    scatter = {name: _scatter(history, values) for name, values in history.levels.items()}
    gates = [
        Gate(metric=name, type=GateType.RATE)
        for name, counts in history.events.items()
        if counts[history.exposure > 0].any()
    ]
    gates += [
        Gate(metric=name, type=GateType.MEAN, margin=Margin(absolute=wide))
        for name, wide in scatter.items()
        if wide > 0
    ]
    if not gates:
        raise Unreadable(
            "nothing to judge: every exposure is 0, or no event ever happened and no level varies "
            "between devices"
        )
    return Plan(
        history=history,
        policy=Policy(name="calibration", gates=tuple(gates)),
        tick=tick,
        scatter=scatter,
    )


def _timely(history: History, span: float) -> None:
    """One clock of 1970 would stretch every tick to years."""
    low, high = np.quantile(history.time, [0.005, 0.995])
    if span > WRONG_CLOCK * max(float(high - low), 1.0) and history.time.size >= 200:
        first, last = (
            datetime.fromtimestamp(float(t), UTC).date().isoformat()
            for t in (history.time[0], history.time[-1])
        )
        raise Unreadable(
            f"times reach from {first} to {last}, but 99 % of the rows lie within "
            f"{float(high - low) / 86_400:.3g} days; leave out the rows of wrong clocks"
        )


def rolled_back(plan: Plan, size: int, harmed: bool, seed: list[int]) -> bool:
    """One draw: `size` devices against up to five times as many, looked at after every tick."""
    chance = np.random.default_rng(seed)
    history = plan.history
    first, last = float(history.time[0]), float(history.time[-1])
    start = first + (last - first) * chance.uniform(0.3, 0.6)
    begin = int(np.searchsorted(history.time, start))
    there = np.unique(history.device[begin:])
    if there.size < 2 * size:
        return False
    drawn = chance.permutation(there)
    exposed, control = drawn[:size], drawn[size : 6 * size]
    tally = Tally(plan.policy.engine, plan.rates, plan.means)
    tally.late_ticks = max(1, round(plan.policy.engine.late_hours * 3600 / plan.tick))
    unit = np.full(len(history.devices), -1)
    unit[exposed] = tally.enrol_all(0, [""] * exposed.size, 0, True)
    unit[control] = tally.enrol_all(0, [""] * control.size, 0, False)
    shapes = _past(plan, tally, unit, start, begin)
    rows = np.flatnonzero(unit[history.device[begin:]] >= 0) + begin
    rows = rows[history.exposure[rows] > 0]
    tick = (history.time[rows] - start) // plan.tick
    rows = rows[np.lexsort((unit[history.device[rows]], tick))]
    events, levels = _told(plan, rows, unit, size, harmed, chance)
    ticks = ((history.time[rows] - start) // plan.tick).astype(np.int64)
    logged = {name for name, shape in shapes.items() if shape.logged}
    edges = np.flatnonzero(np.diff(ticks)) + 1
    for part in np.split(np.arange(rows.size), edges):
        if part.size == 0 or ticks[part[0]] >= 2 * TICKS:
            continue
        tally.fold(
            Rollup(
                unit=unit[history.device[rows[part]]],
                tick=ticks[part],
                hours=history.exposure[rows[part]],
                counts={name: counts[part] for name, counts in events.items()},
                levels={name: _read_as(shapes[name], v[part]) for name, v in levels.items()},
            )
        )
        case = Case(
            policy=plan.policy,
            step=StepLimits(min_soak=1e12, max_soak=None, reporting=size, updated=size),
            observations=observe(tally, plan.rates, plan.means, logged),
        )
        if judge(case).verdict is Verdict.ROLL_BACK:
            return True
    return False


def _past(plan: Plan, tally: Tally, unit: Ints, start: float, begin: int) -> dict[str, Shape]:
    """Each unit's own days before; returns how levels are read, from the whole fleet's."""
    history, engine = plan.history, plan.policy.engine
    low = int(np.searchsorted(history.time, start - BASELINE_DAYS * 86_400))
    before = np.arange(low, begin)
    before = before[history.exposure[before] > 0]
    mine = before[unit[history.device[before]] >= 0]
    who = unit[history.device[mine]]

    def into(name: str, amounts: Floats) -> None:
        column = tally.past(name)
        column[: tally.units] += np.bincount(who, weights=amounts, minlength=tally.units)

    into("hours", history.exposure[mine])
    into("messages", np.ones(mine.size))
    for gate in plan.rates:
        counts = history.events[gate.metric][mine].astype(np.float64)
        into(f"events {gate.metric}", counts)
        into(f"eventful {gate.metric}", (counts > 0).astype(np.float64))
    shapes = {}
    for gate in plan.means:
        values = history.levels[gate.metric]
        known = values[before][np.isfinite(values[before])]
        shape = shape_of(known[:: max(1, known.size // 2_000)], engine.winsor, engine.skew_limit)
        shapes[gate.metric] = shape
        n, total = _read_as(shape, values[mine])
        into(f"n {gate.metric}", n)
        into(f"sum {gate.metric}", total)
    return shapes


def _told(
    plan: Plan, rows: Ints, unit: Ints, size: int, harmed: bool, chance: np.random.Generator
) -> tuple[dict[str, Ints], dict[str, Floats]]:
    """What the rows say; with harm: events of the updated recur in other rows, levels shift."""
    history = plan.history
    events = {gate.metric: history.events[gate.metric][rows].copy() for gate in plan.rates}
    levels = {gate.metric: history.levels[gate.metric][rows].copy() for gate in plan.means}
    if not harmed:
        return events, levels
    updated = np.flatnonzero(unit[history.device[rows]] < size)
    mine = unit[history.device[rows[updated]]]
    order = updated[np.argsort(mine, kind="stable")]
    edges = np.searchsorted(np.sort(mine), np.arange(size + 1))
    for counts in events.values():
        more = chance.binomial(counts[updated], min(1.0, FACTOR - 1))
        for at, k in zip(updated[more > 0], more[more > 0], strict=True):
            device = int(unit[history.device[rows[at]]])
            own = order[edges[device] : edges[device + 1]]
            np.add.at(counts, chance.choice(own, size=min(int(k), 10_000)), 1)
    for name, values in levels.items():
        values[updated] += SHIFT * plan.scatter[name]
    return events, levels


def _read_as(shape: Shape, values: Floats) -> tuple[Floats, Floats]:
    """(n, Σ) of each row as the ledger reads it."""
    known = np.isfinite(values)
    read = np.clip(np.where(known, values, 0.0), shape.low, shape.high)
    if shape.logged:
        read = np.log(np.maximum(read, 1e-12))
    return known.astype(np.float64), np.where(known, read, 0.0)


def _gaps(history: History) -> Floats:
    order = np.lexsort((history.time, history.device))
    gaps = np.diff(history.time[order])
    found: Floats = gaps[(np.diff(history.device[order]) == 0) & (gaps > 0)]
    return found


def _scatter(history: History, values: Floats) -> float:
    """Standard deviation of the devices' means, outer 5 % cut: the unit of the shift."""
    known = np.isfinite(values)
    many = np.bincount(history.device[known], minlength=len(history.devices))
    total = np.bincount(
        history.device[known], weights=values[known], minlength=len(history.devices)
    )
    means = np.sort(total[many > 0] / many[many > 0])
    cut = means.size // 20
    return float(means[cut : means.size - cut].std()) if means.size > 2 else 0.0


def _row(plan: Plan, size: int, harmed: bool, hit: int, runs: int) -> Row:
    control = min(5 * size, len(plan.history.devices) - size)
    what = "A/B" if harmed else "A/A"
    return Row(
        name=f"{what} {size:,} against {control:,} devices",
        value=hit / runs,
        unit="detected" if harmed else "false rollback",
        limit=None if harmed else plan.policy.engine.alpha,
        better="higher" if harmed else "lower",
        peer="" if harmed else "alpha",
        more={
            "runs": runs,
            "rolled_back": hit,
            "lower_95": round(1 - upper_bound(runs - hit, runs, 0.95), 4) if hit else 0.0,
            "upper_95": round(upper_bound(hit, runs, 0.95), 4),
            "harm": f"events × {FACTOR:g}, levels + {SHIFT:g} sd" if harmed else "none",
            "tick_hours": round(plan.tick / 3600, 3),
            "repeated_rows": plan.history.repeated,
            "ignored_columns": " ".join(plan.history.ignored),
        },
    )


def _all(one: partial[bool], seeds: list[list[int]], jobs: int) -> list[bool]:
    if jobs <= 1:
        return [one(seed) for seed in seeds]
    with ProcessPoolExecutor(jobs) as pool:
        return list(pool.map(one, seeds, chunksize=max(1, len(seeds) // (4 * jobs))))
