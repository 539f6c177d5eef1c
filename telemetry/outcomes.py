"""What a release changed, and how a team ships: goals by the draw, and the measures of DORA.

Pure. Goals are judged by *who was drawn* (intention to treat: a device that was drawn and never
installed still counts as treated), against devices that were left out at the same time by the same
dice: the holdout, or who had not been drawn yet. Never before against after: a cohort that was
picked by its score would improve or worsen by itself. Without such devices a goal is not
measurable, and says so.

Estimates are those of the engine (`telemetry.evidence.levels`): each device against its own past,
the difference of the arms in strata that add, with an always-valid band: it may be looked at every
day. A goal never stops a release.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from telemetry.evidence import levels
from telemetry.evidence.levels import Sums
from telemetry.policy import Direction, Engine, GateType, unit_of
from telemetry.report import Totals

FEWEST = 5  # devices of an arm
_HOURS = "device_hour"


class Verdict(StrEnum):
    BETTER = "better"
    WORSE = "worse"
    NO_DIFFERENCE = "no difference shown"
    NOT_MEASURABLE = "not measurable"


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    metric: str
    type: GateType  # mean or rate
    direction: Direction  # which way is better
    per: str = _HOURS


@dataclass(frozen=True, slots=True, kw_only=True)
class Stratum:
    """Who was drawn at one moment and who was not, with the fleet's sums before and since."""

    treated: frozenset[str]
    control: frozenset[str]
    before: Totals
    since: Totals


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """`estimate` and `band`: a difference (mean) or a ratio (rate), treated against control."""

    goal: Goal
    verdict: Verdict
    against: str  # "the holdout" | "devices not yet updated" | ""
    treated: int
    control: int
    estimate: float | None
    band: tuple[float, float] | None
    sentence: str

    def to_json(self) -> dict[str, Any]:
        return {
            "metric": self.goal.metric,
            "type": str(self.goal.type),
            "direction": str(self.goal.direction),
            "verdict": str(self.verdict),
            "measurable": self.verdict is not Verdict.NOT_MEASURABLE,
            "against": self.against,
            "treated": self.treated,
            "control": self.control,
            "estimate": self.estimate,
            "band": list(self.band) if self.band else None,
            "sentence": self.sentence,
        }


def goal(data: Mapping[str, Any]) -> Goal:
    """A goal as it is written in a policy; raises ValueError with what is wrong."""
    unknown = sorted(set(data) - {"metric", "type", "direction", "per"})
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r}: a goal has metric, type, direction, per")
    if not data.get("metric"):
        raise ValueError("a goal needs a metric")
    kind = str(data.get("type", "mean"))
    if kind not in (GateType.MEAN, GateType.RATE):
        raise ValueError(f"type {kind[:40]!r}: a goal is a mean or a rate")
    way = str(data.get("direction", "increase"))
    if way not in (Direction.INCREASE, Direction.DECREASE):
        raise ValueError(f"direction {way[:40]!r}: increase or decrease, whichever is better")
    per = str(data.get("per", _HOURS))
    unit_of(per)
    return Goal(metric=str(data["metric"]), type=GateType(kind), direction=Direction(way), per=per)


def series_of(goals: Iterable[Goal]) -> frozenset[str]:
    """Names of all counters, units of exposure and levels that these goals read."""
    return frozenset(name for aim in goals for name in (aim.metric, unit_of(aim.per)[1]))


def measure(aim: Goal, strata: Sequence[Stratum], against: str, engine: Engine) -> Outcome:
    """What the release did to one goal; not measurable where nobody was left out by the draw."""
    if not any(s.treated and s.control for s in strata):
        return _unmeasurable(
            aim,
            "no holdout, and no device that was not updated at the same time: "
            "add `holdout: {percent: 5%, for: 14d}` to the rollout",
        )
    pairs = [
        (one, zero)
        for s in strata
        if (one := _sums(aim, s, s.treated, engine)).n >= 2
        and (zero := _sums(aim, s, s.control, engine)).n >= 2
    ]
    n1, n0 = (int(sum(pair[arm].n for pair in pairs)) for arm in (0, 1))
    if min(n1, n0) < FEWEST:
        why = f"{n1} drawn and {n0} other devices reported it since the draw, {FEWEST} are needed"
        return _unmeasurable(aim, why, n1, n0)
    rate = aim.type is GateType.RATE
    rule = levels.widened
    found = levels.repeat(pairs, 1.0, rule) if rate else levels.level(pairs, rule)
    if not found.i > 0:
        why = "no event in one of the arms" if rate else "every device reports the same value"
        return _unmeasurable(aim, f"{why}: there is nothing to compare", n1, n0)
    scale = engine.ratio_prior if rate else _scale(pairs)
    low, high = levels.band(found, scale)
    return _judged(aim, against, n1, n0, found.estimate, (low, high), pairs)


def _judged(
    aim: Goal,
    against: str,
    n1: int,
    n0: int,
    estimate: float,
    band: tuple[float, float],
    pairs: Sequence[levels.Pair],
) -> Outcome:
    low, high = band
    up = aim.direction is Direction.INCREASE
    verdict = Verdict.NO_DIFFERENCE
    if low > 0 or high < 0:
        verdict = Verdict.BETTER if (low > 0) is up else Verdict.WORSE
    shown = aim.metric.replace("_", " ")
    if aim.type is GateType.RATE:
        estimate, low, high = (math.exp(max(-50.0, min(50.0, v))) for v in (estimate, low, high))
        figure = f"{estimate:.3g} × [{low:.3g}, {high:.3g}]"
    else:
        usual = sum(zero.y for _, zero in pairs) / n0
        figure = f"{estimate:+.3g} [{low:+.3g}, {high:+.3g}] on {usual:.3g}"
    return Outcome(
        goal=aim,
        verdict=verdict,
        against=against,
        treated=n1,
        control=n0,
        estimate=estimate,
        band=(low, high),
        sentence=(
            f"{shown}: {verdict}, {figure} against {against}; {n1:,} devices by the draw, "
            f"{n0:,} compared"
        ),
    )


def _unmeasurable(aim: Goal, why: str, n1: int = 0, n0: int = 0) -> Outcome:
    return Outcome(
        goal=aim,
        verdict=Verdict.NOT_MEASURABLE,
        against="",
        treated=n1,
        control=n0,
        estimate=None,
        band=None,
        sentence=f"{aim.metric.replace('_', ' ')}: not measurable — {why}",
    )


def _sums(aim: Goal, stratum: Stratum, arm: frozenset[str], engine: Engine) -> Sums:
    """One arm's votes: y = the device since the draw, x = what its own past makes expect."""
    if aim.type is GateType.RATE:
        return _rate(aim, stratum, arm, engine)
    since = _column(stratum.since.levels.get(aim.metric), stratum.since, math.nan)
    before = _column(stratum.before.levels.get(aim.metric), stratum.before, math.nan)
    everybody = stratum.treated | stratum.control
    known = [x for d in everybody if math.isfinite(x := before.get(d, math.nan))]
    usual = math.fsum(sorted(known)) / len(known) if known else 0.0
    votes = [
        (y, x if math.isfinite(x := before.get(d, math.nan)) else usual)
        for d in sorted(arm)
        if math.isfinite(y := since.get(d, math.nan))
    ]
    return _added(votes)


def _rate(aim: Goal, stratum: Stratum, arm: frozenset[str], engine: Engine) -> Sums:
    _, unit = unit_of(aim.per)
    counts = _column(stratum.since.counters.get(aim.metric), stratum.since, 0.0)
    hours = _column(stratum.since.exposure.get(unit), stratum.since, 0.0)
    past = _column(stratum.before.counters.get(aim.metric), stratum.before, 0.0)
    past_hours = _column(stratum.before.exposure.get(unit), stratum.before, 0.0)
    everybody = stratum.treated | stratum.control
    many = sum(past.get(d, 0.0) for d in everybody)
    of = sum(past_hours.get(d, 0.0) for d in everybody)
    if many <= 0 or of <= 0:
        many = sum(counts.get(d, 0.0) for d in stratum.control)
        of = sum(hours.get(d, 0.0) for d in stratum.control)
    usual = many / of if many > 0 and of > 0 else 1.0
    prior = engine.repeat_prior
    votes = []
    for d in sorted(arm):
        h = hours.get(d, 0.0)
        if h <= 0:
            continue
        expected = h * (past.get(d, 0.0) + prior) / (past_hours.get(d, 0.0) + prior / usual)
        cap = engine.repeat_cap + engine.repeat_cap_per * math.ceil(expected)
        votes.append((min(counts.get(d, 0.0), cap), expected))
    return _added(votes)


def _column(
    values: npt.NDArray[np.float64] | None, totals: Totals, empty: float
) -> dict[str, float]:
    if values is None:
        return dict.fromkeys(totals.devices, empty)
    return dict(zip(totals.devices, values.tolist(), strict=True))


def _added(votes: Iterable[tuple[float, float]]) -> Sums:
    y, x = np.array(list(votes), dtype=np.float64).reshape(-1, 2).T
    return Sums(
        n=float(y.size), y=float(y.sum()), x=float(x.sum()), yy=float((y * y).sum()),
        xy=float((x * y).sum()), xx=float((x * x).sum()),
    )  # fmt: skip


def _scale(pairs: Sequence[levels.Pair]) -> float:
    """τ of a mean's band: a tenth of the control's own mean, or of its scatter around 0."""
    n = sum(zero.n for _, zero in pairs)
    usual = abs(sum(zero.y for _, zero in pairs) / n)
    wide = math.sqrt(max(sum(zero.yy for _, zero in pairs) / n, 1e-300))
    return 0.1 * max(usual, 0.1 * wide)


# -- delivery -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Shipped:
    """One rollout as the measures of delivery count it. Times are Unix seconds."""

    rollout: str
    product: str
    team: str
    state: str
    committed_at: float  # when the commit was accepted
    finished_at: float | None
    rejected_at: float | None
    fixes: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    name: str
    value: float | None  # None: nothing to measure
    unit: str
    n: int
    of: int
    definition: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    product: str
    team: str
    days: float
    measures: tuple[Measure, ...]


def delivery(shipped: Iterable[Shipped], days: float) -> tuple[Delivery, ...]:
    """The five measures of DORA (dora.dev, 2024) for each product and team, over a period."""
    groups: dict[tuple[str, str], list[Shipped]] = {}
    for one in shipped:
        groups.setdefault((one.product, one.team), []).append(one)
    return tuple(
        Delivery(product=product, team=team, days=days, measures=_measures(ours, days))
        for (product, team), ours in sorted(groups.items())
    )


def _measures(ours: Sequence[Shipped], days: float) -> tuple[Measure, ...]:
    done = [one for one in ours if one.state == "Completed"]
    bad = [one for one in ours if one.state in ("RolledBack", "RollingBack", "Held")]
    ended = len(done) + len(bad)
    leads = [o.finished_at - o.committed_at for o in done if o.finished_at is not None]
    back = [
        o.finished_at - o.rejected_at
        for o in bad
        if o.state == "RolledBack" and o.finished_at is not None and o.rejected_at is not None
    ]
    fixes = sum(one.fixes for one in ours)
    return (
        Measure(
            name="deployment_frequency", value=len(done) / days * 7 if days > 0 else None,
            unit="per week", n=len(done), of=len(ours), definition="rollouts completed, a week",
        ),
        Measure(
            name="lead_time", value=median(leads) if leads else None, unit="s", n=len(leads),
            of=len(done),
            definition="median from the commit's acceptance to every reachable device updated",
        ),
        Measure(
            name="change_failure_rate", value=len(bad) / ended if ended else None, unit="share",
            n=len(bad), of=ended, definition="rolled back or held ÷ these and completed",
        ),
        Measure(
            name="recovery_time", value=median(back) if back else None, unit="s", n=len(back),
            of=len(bad), definition="median from the rejection to every reachable device back",
        ),
        Measure(
            name="rework_rate", value=fixes / len(ours) if ours else None, unit="share", n=fixes,
            of=len(ours), definition="releases that fix another one ÷ all",
        ),
    )  # fmt: skip
