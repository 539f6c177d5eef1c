"""What one gate's curves say: evidence of harm E, evidence of safety F, estimate, band, counts.

Decides how the parts of a guardrail combine, not what follows (`controller.rollout.gate`):

1. E is a mean of the pooled E and of the E of each hardware: harm in a small group is not diluted.
2. A share's E is a mean of the K1 mixture and of an exact test of early failures; a rate's of first
   events (K2) and repeat rate (K3r); with no control at all, K2' against the declared budget alone.
   A weighted mean of e-values is an e-value under any dependence (Vovk & Wang 2021).
3. A rate is safe when its ratio margin *or* its budget is refuted. Above 20 % of devices with a
   first event the ratio listens to K3r alone, the budget to the worse of first and capped counts.
4. NaN anywhere stays NaN: it passes no gate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from telemetry.evidence import curves, first_events, fleetwide, levels, outcome
from telemetry.evidence.observations import ArmSums, ArmTotals, MetricSeen
from telemetry.policy import Direction, Engine, Gate, GateType


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One guardrail as it stands."""

    name: str
    kind: str  # outcome | lost | silence | events | levels
    harm: float  # E
    safe: float | None  # F at this wave's margin; None: judged by another guardrail
    margin: float | None
    estimate: float  # share, ratio or difference
    band: tuple[float, float]
    dry_run: bool = False
    counts: Mapping[str, Any] = field(default_factory=dict)
    lacks: str = ""  # what is missing until it is safe
    says: str = ""  # number, band, limit, n


def shares(
    engine: Engine,
    name: str,
    kind: str,
    groups: Mapping[str, tuple[int, int]],
    budget: float,
    weight: float,
) -> Reading:
    """K1 of (failures, started) by hardware against a budget; its safety is judged apart.

    `weight` is this guardrail's share of α: what the exact count of early failures may spend.
    """
    failures, started = (sum(g[i] for g in groups.values()) for i in (0, 1))
    parts = list(groups.values()) if len(groups) > 1 else []
    pooled_weight = engine.pooled_share if parts else 1.0
    evidence, met = _shares_harm(engine, (failures, started), budget, weight * pooled_weight)
    each = []
    for group in parts:
        share = weight * (1 - pooled_weight) / len(parts)
        one, hit = _shares_harm(engine, group, budget, share)
        each.append(one)
        met = met or hit
    low, high = outcome.band(engine, failures, started)
    share = failures / started if started else math.nan
    says = (
        f"{failures} of {started} devices {_what(kind)} ({_percent(share)} "
        f"[{_percent(low)}, {_percent(high)}]), budget {_percent(budget)}"
    )
    if met:
        says += f": a release within it seldom has {met[0]} among its first {met[1]} devices"
    return Reading(
        name=name,
        kind=kind,
        harm=_pooled(engine.pooled_share, evidence, each),
        safe=None,
        margin=budget,
        estimate=share,
        band=(low, high),
        counts={"failures": failures, "started": started, "budget": budget},
        says=says,
    )


def _shares_harm(
    engine: Engine, group: tuple[int, int], budget: float, weight: float
) -> tuple[float, tuple[int, int] | None]:
    """(E, the early count that is met): a mean of the mixture and of the exact test."""
    failures, started = group
    mixture = outcome.harm(engine, failures, started, budget)
    level = engine.alpha * weight * engine.quick_share
    if not 0 < level < 1:
        return mixture, None
    met = outcome.quick(failures, started, budget, level)
    share = engine.quick_share
    return (1 - share) * mixture + (share / level if met else 0.0), met


def silence(
    engine: Engine,
    groups: Mapping[str, tuple[int, int, int, int]],
    ells: Mapping[str, curves.Array],
) -> Reading:
    """K2 on "no contact": (d1, d0, y1, y0) and the curve by hardware."""
    pooled = sum(ells.values(), first_events.flat(engine))
    evidence = _pooled(
        engine.pooled_share,
        first_events.harm(engine, pooled),
        [first_events.harm(engine, ell) for ell in ells.values()],
    )
    d1, d0, y1, y0 = (sum(group[i] for group in groups.values()) for i in range(4))
    return Reading(
        name="silence",
        kind="silence",
        harm=evidence,
        safe=None,
        margin=None,
        estimate=curves.peak(curves.ratio_grid(engine), pooled),
        band=first_events.band(engine, pooled),
        counts={"exposed_silent": d1, "control_silent": d0, "exposed": y1, "control": y0},
        says=f"{d1} of {y1} updated devices silent, {d0} of {y0} in control",
    )


def rate(
    engine: Engine,
    gate: Gate,
    seen: MetricSeen,
    margin: float,
    weights: Mapping[str, float] | None = None,
) -> Reading:
    """A rate gate: ratio against control, and the absolute budget.

    `weights`: `band/hardware` → devices of the eligible fleet, for the fleet-level number.
    """
    controls = _controls(seen)
    evidence = rate_harm(engine, gate, seen)
    ell = _curve(engine, gate, seen, None)
    ratio_seen, low, high = _ratio(engine, ell, _repeats(engine, gate, seen.repeats, None))
    one, zero = _arm(seen.totals, "exposed"), _arm(seen.totals, "control")
    counts = {"exposed": one, "control": zero}
    crowded = _crowded(engine, seen)
    ratio = _ratio_safe(engine, ell, _pairs(engine, gate, seen.repeats, None), margin, crowded)
    safe, lacks = ratio, _lacks_events(engine, gate, one, zero, margin)
    budget = gate.budget_rate()
    if budget is not None:
        against = _budget_safe(engine, seen, budget[0], crowded)
        safe = math.nan if math.isnan(against) or math.isnan(ratio) else max(ratio, against)
        lacks = _lacks_hours(engine, gate, seen, budget)
    rate1, rate0 = _rate(one, gate), _rate(zero, gate)
    whole = fleetwide.estimate(seen.bands, weights or {}, engine.ratio_prior)
    fleet = {"fleet": whole.to_json()} if whole is not None else {}
    return Reading(
        name=gate.metric,
        kind="events",
        harm=evidence,
        safe=safe,
        margin=margin,
        estimate=ratio_seen if controls else math.nan,
        band=(low, high),
        dry_run=gate.dry_run,
        counts=counts | {"rate": rate1, "control_rate": rate0, "ratio_band": [low, high]} | fleet,
        lacks=lacks,
        says=_says_rate(gate, one, zero, (ratio_seen, low, high), margin, budget)
        + _says_fleet(gate, whole),
    )


def rate_harm(engine: Engine, gate: Gate, seen: MetricSeen) -> float:
    """E of a rate gate: the mean of the pooled evidence and that of each hardware."""
    controls = _controls(seen)
    hardware = sorted({t.hardware for t in seen.totals})
    parts = [_rate_harm(engine, gate, seen, h, controls) for h in hardware]
    return _pooled(engine.pooled_rate, _rate_harm(engine, gate, seen, None, controls), parts)


def _controls(seen: MetricSeen) -> bool:
    return any(t.arm == "control" and t.devices for t in seen.totals)


def share_of_devices(
    engine: Engine, gate: Gate, seen: MetricSeen, margin: float, weight: float
) -> Reading:
    """A proportion gate on a counter: the share of exposed devices with at least one."""
    groups: dict[str, tuple[int, int]] = {}
    for total in seen.totals:
        if total.arm == "exposed":
            s, n = groups.get(total.hardware, (0, 0))
            groups[total.hardware] = s + total.first, n + total.devices
    budget = gate.budget_share if gate.budget_share is not None else engine.failed_budget
    base = shares(engine, gate.metric, "events", groups, budget, weight)
    s, n = base.counts["failures"], base.counts["started"]
    return Reading(
        name=gate.metric,
        kind="events",
        harm=base.harm,
        safe=outcome.safe(engine, min(s, n), n, margin),
        margin=margin,
        estimate=base.estimate,
        band=base.band,
        dry_run=gate.dry_run,
        counts=base.counts,
        lacks=f"{n} of {outcome.needed(engine, margin, s)} devices needed to refute "
        f"{_percent(margin)}",
        says=base.says,
    )


def level(
    engine: Engine, gate: Gate, seen: MetricSeen, loosening: float, fixed: float | None
) -> Reading:
    """A mean gate against its margin, in the metric's units (or logs, when it is skewed)."""
    control = _sum(part.control for part in seen.levels)
    exposed = _sum(part.exposed for part in seen.levels)
    own = _level_margin(gate, control.mean, seen.logged)
    margin = own * loosening if fixed is None else _as_level(fixed, control.mean, seen.logged)
    scale = levels.scale_of(engine, own)
    sign = 1.0 if gate.direction is Direction.INCREASE else -1.0
    pooled = _signed(levels.level([(p.exposed, p.control) for p in seen.levels]), sign)
    groups = {part.hardware for part in seen.levels}
    known = math.isfinite(margin) and margin > 0
    harm = 1.0
    if known:
        each = [
            levels.harm(
                _signed(
                    levels.level([(p.exposed, p.control) for p in seen.levels if p.hardware == h]),
                    sign,
                ),
                scale,
            )
            for h in sorted(groups)
        ]
        harm = _pooled(engine.pooled_rate, levels.harm(pooled, scale), each)
    low, high = levels.band(pooled, scale) if known else (-math.inf, math.inf)
    safe = levels.safe(pooled, margin, scale) if known else 1.0
    n1, n0 = int(exposed.n), int(control.n)
    return Reading(
        name=gate.metric,
        kind="levels",
        harm=harm,
        safe=safe,
        margin=margin if known else None,
        estimate=pooled.estimate,
        band=(low, high),
        dry_run=gate.dry_run,
        counts={"exposed": n1, "control": n0, "mean": exposed.mean, "control_mean": control.mean},
        lacks=f"{n1} updated and {n0} control devices measured, proof {_number(safe)} of "
        f"{_number(1 / engine.beta)}",
        says=(
            f"{_words(gate.metric)} {_number(exposed.mean)}, {_number(pooled.estimate)} "
            f"[{_number(low)}, {_number(high)}] above control ({_number(control.mean)}), margin "
            f"{_number(margin)}; {n1:,} and {n0:,} devices"
        ),
    )


def incomparable(gate: Gate, why: str) -> Reading:
    """A gate whose arms report different revisions of its metric: no data, in either direction."""
    return Reading(
        name=gate.metric,
        kind="levels" if gate.type is GateType.MEAN else "events",
        harm=1.0,
        safe=math.nan,
        margin=None,
        estimate=math.nan,
        band=(-math.inf, math.inf),
        dry_run=gate.dry_run,
        lacks=why,
        says=f"{_words(gate.metric)}: {why}",
    )


# -- parts ----------------------------------------------------------------------------------------


def _pooled(share: float, pooled: float, each: list[float]) -> float:
    """All hardware together and each by itself: harm in a small group is not diluted."""
    if len(each) < 2:
        return pooled
    return share * pooled + (1 - share) * curves.average(each)


def _rate_harm(
    engine: Engine, gate: Gate, seen: MetricSeen, hardware: str | None, controls: bool
) -> float:
    if controls:
        ell = _curve(engine, gate, seen, hardware)
        late = engine.late_weight
        repeats = _repeats(engine, gate, seen.repeats, hardware)
        later = _repeats(engine, gate, seen.late, hardware)
        repeated = _repeats_harm(engine, repeats) * (1 - late - engine.first_weight)
        first = engine.first_weight * first_events.harm(engine, ell)
        return first + repeated + late * _repeats_harm(engine, later)
    budget = gate.budget_rate()
    if budget is None:
        return 1.0  # own past alone is advisory: nothing to judge against
    firsts, exposure, _ = _at_risk(seen, hardware)
    return first_events.budget_harm(engine, firsts, exposure, budget[0])


def _repeats_harm(engine: Engine, repeats: levels.Normal) -> float:
    """A mean of the bet on a modest rise and of the mixture over all: large ones are seen."""
    modest = engine.modest_weight * levels.harm_at(repeats, math.log(engine.modest_ratio))
    return modest + (1 - engine.modest_weight) * levels.harm(repeats, engine.ratio_prior)


def _mixed(engine: Engine, first: float, repeated: float) -> float:
    return engine.first_weight * first + (1 - engine.first_weight) * repeated


def _ratio_safe(
    engine: Engine, ell: curves.Array, pairs: list[levels.Pair], margin: float, crowded: bool
) -> float:
    """F of the ratio. First events alone understate it where many devices had one (frailty)."""
    first = first_events.safe(engine, ell, margin)
    repeated, speaks = levels.repeat_safe(pairs, math.log(margin), engine.safe_min_events)
    if not speaks and not crowded:
        return first
    return repeated if crowded else _mixed(engine, first, repeated)


def _ratio(engine: Engine, ell: curves.Array, repeats: levels.Normal) -> tuple[float, float, float]:
    """(estimate, low, high) of the part that speaks louder: the sentence shows what decided.

    The estimate is that part's own, not the raw quotient: a device's repeats are capped, and a
    first event counts once, so that a few bursting devices do not make the number.
    """
    tau = engine.ratio_prior
    if repeats.i > 0 and levels.harm(repeats, tau) > first_events.harm(engine, ell):
        low, high = levels.band(repeats, tau)
        bounded = (max(-20.0, min(20.0, value)) for value in (repeats.estimate, low, high))
        estimate, low, high = (math.exp(value) for value in bounded)
        return estimate, low, high
    return curves.peak(curves.ratio_grid(engine), ell), *first_events.band(engine, ell)


def _curve(engine: Engine, gate: Gate, seen: MetricSeen, hardware: str | None) -> curves.Array:
    """The strata's curves of first events, added."""
    ell = first_events.flat(engine)
    for part in seen.firsts:
        if part.curve and (hardware is None or part.hardware == hardware):
            ell = ell + np.array(part.curve)
    # Where fewer events are the harm, the arms change places.
    return first_events.turned(engine, ell) if gate.direction is Direction.DECREASE else ell


def _repeats(
    engine: Engine, gate: Gate, parts: Iterable[ArmSums], hardware: str | None
) -> levels.Normal:
    return levels.repeat(_pairs(engine, gate, parts, hardware), engine.repeat_min_events)


def _pairs(
    engine: Engine, gate: Gate, parts: Iterable[ArmSums], hardware: str | None
) -> list[levels.Pair]:
    """The strata whose repeat rates are compared; where fewer events are the harm, turned."""
    chosen = [p for p in parts if hardware is None or p.hardware == hardware]
    waves: dict[int, tuple[levels.Sums, levels.Sums]] = {}
    pairs = []
    for part in chosen:
        pair = (part.exposed, part.control)
        if min(arm.y for arm in pair) >= engine.repeat_own_events:
            pairs.append(pair)
        else:  # too few for themselves: with the others of their wave
            one, zero = waves.get(part.wave, (levels.Sums(), levels.Sums()))
            waves[part.wave] = one + part.exposed, zero + part.control
    pairs += waves.values()
    if gate.direction is Direction.DECREASE:
        pairs = [(zero, one) for one, zero in pairs]
    return pairs


def _at_risk(seen: MetricSeen, hardware: str | None) -> tuple[int, float, levels.Sums]:
    chosen = [
        t
        for t in seen.totals
        if t.arm == "exposed" and (hardware is None or t.hardware == hardware)
    ]
    sums = _sum(t.budget_sums for t in chosen)
    return sum(t.first for t in chosen), math.fsum(t.at_risk for t in chosen), sums


def _crowded(engine: Engine, seen: MetricSeen) -> bool:
    devices = sum(t.devices for t in seen.totals)
    return devices > 0 and sum(t.first for t in seen.totals) > engine.first_share_limit * devices


def _budget_safe(engine: Engine, seen: MetricSeen, budget: float, crowded: bool) -> float:
    firsts, exposure, sums = _at_risk(seen, None)
    proof = first_events.budget_safe(engine, firsts, exposure, budget)
    if not crowded:
        return proof
    # The devices still at risk are the quieter ones; all their (capped) events over all their
    # hours are not, and scatter between devices makes them count for less.
    wide = levels.dispersion(sums) if sums.x > 0 else 1.0
    return min(proof, first_events.budget_safe(engine, sums.y / wide, sums.x / wide, budget))


def _lacks_hours(engine: Engine, gate: Gate, seen: MetricSeen, budget: tuple[float, str]) -> str:
    firsts, exposure, _ = _at_risk(seen, None)
    hours = first_events.hours_needed(engine, budget[0], firsts)
    return (
        f"{_number(exposure)} of {_number(hours)} {_words(budget[1])}s without another event "
        f"needed ({firsts} {'device' if firsts == 1 else 'devices'} had one)"
    )


def _lacks_events(
    engine: Engine, gate: Gate, one: Mapping[str, float], zero: Mapping[str, float], margin: float
) -> str:
    everybody = one["devices"] + zero["devices"]
    if not one["devices"] or not zero["devices"]:
        return "no control to compare with and no budget declared: it cannot be proven"
    total = first_events.events_needed(engine, margin, one["devices"] / everybody)
    have = int(one["first"] + zero["first"])
    return f"{have} of about {total} first events needed to refute {_number(margin)} × control"


def _arm(totals: Iterable[ArmTotals], arm: str) -> dict[str, float]:
    chosen = [t for t in totals if t.arm == arm]
    return {
        "devices": sum(t.devices for t in chosen),
        "first": sum(t.first for t in chosen),
        "events": sum(t.events for t in chosen),
        "exposure": math.fsum(t.exposure for t in chosen),
    }


def _rate(arm: Mapping[str, float], gate: Gate) -> float:
    return arm["events"] / arm["exposure"] * gate.scale if arm["exposure"] > 0 else math.nan


def _says_rate(
    gate: Gate,
    one: Mapping[str, float],
    zero: Mapping[str, float],
    ratio: tuple[float, float, float],
    margin: float,
    budget: tuple[float, str] | None,
) -> str:
    per = f"{_number(gate.scale)} {_words(gate.unit)}s" if gate.scale != 1 else _words(gate.unit)
    rate1, rate0 = _rate(one, gate), _rate(zero, gate)
    head = f"{_words(gate.metric)} {_number(rate1)} per {per}"
    tail = (
        f"{int(one['devices']):,} devices, {_number(one['exposure'])} {_words(gate.unit)}s, "
        f"{int(one['first'])} with an event; control {int(zero['devices']):,} devices, "
        f"{int(zero['first'])} with an event"
    )
    if not zero["devices"]:
        limit = f"no control, budget {_number(budget[0] * gate.scale)}" if budget else "no control"
        return f"{head} ({limit}); {tail}"
    estimate, low, high = ratio
    if rate0 > 0:
        head = f"{_words(gate.metric)} {_number(estimate * rate0)} per {per}"
        shown = f"{head} [{_number(low * rate0)}, {_number(high * rate0)}]"
    else:
        shown = f"{head}, at least {_number(low)} × control"
    limit = f"{_number(margin)} × control" if low >= margin else "control"
    verb = "exceeds" if low > 1 else "against"
    return f"{shown} {verb} {limit} ({_number(rate0)}); {tail}"


def _says_fleet(gate: Gate, whole: fleetwide.Fleetwide | None) -> str:
    """The post-stratified number, with the excess that a ratio hides."""
    if whole is None or math.isnan(whole.ratio):
        return ""
    part = "" if whole.covered > 0.995 else f" (of {whole.covered * 100:.0f} % of it)"
    return (
        f"; for the fleet{part} {_number(whole.ratio)} ×, {whole.excess:+.3g} per 1,000 "
        f"{_words(gate.unit)}s"
    )


def _level_margin(gate: Gate, mean: float, logged: bool) -> float:
    if gate.margin.absolute is not None:
        return _as_level(gate.margin.absolute, mean, logged)
    ratio = gate.margin.ratio if gate.margin.ratio is not None else 1.2
    return math.log(ratio) if logged else (ratio - 1) * abs(mean)


def _as_level(absolute: float, mean: float, logged: bool) -> float:
    return math.log1p(absolute / math.exp(mean)) if logged else absolute


def _signed(normal: levels.Normal, sign: float) -> levels.Normal:
    return levels.Normal(s=sign * normal.s, i=normal.i)


def _sum(parts: Iterable[levels.Sums]) -> levels.Sums:
    return sum(parts, levels.Sums())


def _what(kind: str) -> str:
    return {"outcome": "failed or were never confirmed", "lost": "were lost in activation"}.get(
        kind, "had one"
    )


def _words(name: str) -> str:
    return name.replace("_", " ")


def _percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{share * 100:.3g} %"


def _number(value: float) -> str:
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
