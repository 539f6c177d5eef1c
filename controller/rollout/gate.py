"""Decides what the evidence says about a step: widen, wait, roll back or inconclusive.

Pure: a `Case` in, a `Judgement` out; the case is stored with the decision and judged again by
`bellwether replay`. The loop decides what follows. Rules, most urgent first:

1. Tripwire: a declared event on its number of distinct devices, or `abortFailed` (count and share
   both reached) → roll back. One device below that waits for a person.
2. A = Σ w·E ≥ 1/α → roll back. The weights are shared out over the guardrails that the policy has,
   so that a policy with `update_ok` alone can still roll back, and P(false) stays ≤ α.
3. Soaked, enough of the updated report, arms report evenly, and every F ≥ 1/β → widen.
4. At the maximum soak: inconclusive where nothing speaks against it (A ≤ 1), else wait and page.
5. Wait otherwise. NaN and missing data pass no gate; no events is not "safe".

Activating and pending devices count as successes for rule 2 and as failures for rule 3. Dry-run
gates are judged and shown, never acted on.

How n, margin and budget relate (no failure, β = 0.10): a share below M is proven by about 3.5/M
devices: 44 for 8 %, 34 for 10 %, 143 for 2.5 %; a canary of 10 needs `margins: {failed: 0.3, lost:
0.3}`. A rate below a budget is proven by about 3.6/budget of exposure without an event; ratio 4
needs 13 first events in both arms, ratio 2 about 53. `needed` computes it for a policy and a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np

from telemetry.evidence import curves, first_events, guardrails, outcome
from telemetry.evidence.guardrails import Reading
from telemetry.evidence.observations import Observations
from telemetry.evidence.proofs import Proof, proof
from telemetry.policy import UPDATE_OK, Engine, Gate, GateType, Policy, built, plain

FAILED, LOST, SILENCE = "failed", "lost", "silence"
_CONTROL_SPEAKS = 20  # devices in control from which their silence is a measure


class Verdict(StrEnum):
    WIDEN = "widen"
    WAIT = "wait"
    ROLL_BACK = "roll_back"
    INCONCLUSIVE = "inconclusive"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of the told devices of one (wave, hardware); the parts are disjoint."""

    wave: int
    hardware: str
    started: int  # told and begun: the sum of the others
    committed: int = 0
    failed: int = 0  # reported failure, failed boot, returned to the old release by themselves
    silent: int = 0  # activated and never confirmed: no contact since
    lost: int = 0  # last word ACTIVATING, no TRIAL within the time to return
    activating: int = 0  # last word ACTIVATING, within the time to return: lost, for all one knows
    pending: int = 0  # begun otherwise


@dataclass(frozen=True, slots=True, kw_only=True)
class Silence:
    """Devices without contact for longer than the patience, both arms of one (wave, hardware)."""

    wave: int
    hardware: str
    exposed: int  # activated members
    exposed_silent: int
    control: int = 0
    control_silent: int = 0
    curve: tuple[float, ...] = ()  # K2, each silence against those at risk then; () from the counts


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLimits:
    """The step's own limits, and how far it has come."""

    wave: int = 0  # index of the step
    name: str = ""
    min_soak: float = 86_400.0  # seconds
    max_soak: float | None = 259_200.0
    soaked: float = 0.0
    min_reporting: float = 0.8  # of the updated members
    reporting: int = 0
    updated: int = 0
    margins: Mapping[str, float] = field(default_factory=dict)  # ratio, failed, lost, <metric>
    fix: bool = False  # a fix's first wave: too few devices to prove a rate or a level safe
    valid_from: float | None = None  # best first: what it shows is valid for scores from here on


@dataclass(frozen=True, slots=True, kw_only=True)
class AbortFailed:
    count: int
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Past:
    """Failures of an earlier release in this fleet."""

    failed: int
    started: int
    lost: int = 0  # of them in activation


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """All that a verdict is made of."""

    policy: Policy
    step: StepLimits
    observations: Observations = field(default_factory=Observations)
    outcomes: tuple[Outcome, ...] = ()
    silence: tuple[Silence, ...] = ()
    abort_failed: AbortFailed | None = None
    max_failed: float | None = None  # p0, the failure budget
    history: tuple[Past, ...] = ()
    corroborated: tuple[str, ...] = ()  # event metrics that a server-side fact confirms
    release: str = ""
    commit: str = ""
    weights: Mapping[str, float] = field(default_factory=dict)  # band/hardware → eligible devices
    incomparable: Mapping[str, str] = field(default_factory=dict)  # metric → why: it has no data

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = plain(self)
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Case:
        """Raises ValueError for what `to_json` cannot have written."""
        case: Case = built(cls, data, "case")
        return case


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    verdict: Verdict
    sentence: str
    numbers: Mapping[str, Any]  # JSON: total, limit, guardrails, binding, page, unproven


def judge(case: Case) -> Judgement:
    """The verdict on a step, with the one sentence that explains it."""
    engine = case.policy.engine
    shares = _weights(case.policy)
    readings = _readings(case, shares)
    weights = [0.0 if r.dry_run else shares.get(r.name, 0.0) for r in readings]
    total = math.fsum(w * r.harm for w, r in zip(weights, readings, strict=True) if r.harm >= 0)
    proofs = _proofs(case)
    numbers = _numbers(case, readings, weights, total, proofs)

    stopped = _brake(case) or _tripwire(case)
    if stopped:
        return _judgement(case, Verdict.ROLL_BACK, f"ROLLED BACK — {stopped}", numbers)
    if total >= 1 / engine.alpha:
        worst = _worst(readings, weights)
        sentence = (
            f"ROLLED BACK — {worst.says}; evidence of harm {_figure(total)}, limit "
            f"{_figure(1 / engine.alpha)}"
        )
        return _judgement(case, Verdict.ROLL_BACK, sentence, numbers | {"binding": worst.name})
    page = _page(case)
    missing = _missing(case, readings, proofs)
    if page:
        sentence = f"WAITING — {page}"
        return _judgement(case, Verdict.WAIT, sentence, numbers | {"page": True})
    if not missing:
        return _judgement(case, Verdict.WIDEN, _widened(case, readings, proofs), numbers)
    binding, words = missing[0]
    numbers = numbers | {
        "binding": binding,
        "missing": [text for _, text in missing],
        "grow": _wants_devices(case, [name for name, _ in missing], readings, proofs),
    }
    more = f"; and {len(missing) - 1} more" if len(missing) > 1 else ""
    if case.step.max_soak is not None and case.step.soaked >= case.step.max_soak:
        if total <= 1 + 1e-9:
            sentence = f"INCONCLUSIVE — maximum soak reached; {words}{more}"
            return _judgement(case, Verdict.INCONCLUSIVE, sentence, numbers)
        sentence = (
            f"WAITING — maximum soak reached and the evidence leans to harm ({_figure(total)} of "
            f"{_figure(1 / engine.alpha)}): a person decides; {words}{more}"
        )
        return _judgement(case, Verdict.WAIT, sentence, numbers | {"page": True})
    return _judgement(case, Verdict.WAIT, f"WAITING — {words}{more}", numbers)


def _worst(readings: list[Reading], weights: list[float]) -> Reading:
    """The guardrail that speaks loudest against the release."""
    pairs = zip(weights, readings, strict=True)
    return max(pairs, key=lambda pair: pair[0] * pair[1].harm if pair[1].harm >= 0 else 0.0)[1]


def needed(policy: Policy, step: StepLimits, *, controls_per_device: float = 5.0) -> dict[str, Any]:
    """What a clean step must show to pass: devices without failure, hours without events.

    {"devices": n, "failed": n, "lost": n, "soak": seconds, "gates": {metric: {"hours": …, "unit":
    …, "events": …, "ratio": …, "budget": …}}}; `hours` is exposure of all updated devices together
    without an event, `events` first events in both arms at no harm. Either is enough for a rate.
    """
    engine = policy.engine
    failed = outcome.needed(engine, _failed_margin(engine, step))
    lost = outcome.needed(engine, _lost_margin(engine, step))
    gates: dict[str, Any] = {}
    for gate in policy.of(GateType.RATE):
        if gate.dry_run:
            continue
        margin = _ratio_margin(engine, gate, step)
        budget = gate.budget_rate()
        share = 1 / (1 + controls_per_device)
        gates[gate.metric] = {
            "ratio": margin,
            "events": first_events.events_needed(engine, margin, share),
            "budget": budget[0] if budget else None,
            "unit": budget[1] if budget else gate.unit,
            "hours": first_events.hours_needed(engine, budget[0]) if budget else None,
        }
    return {
        "devices": max(failed, lost),
        "failed": failed,
        "lost": lost,
        "soak": step.min_soak,
        "gates": gates,
    }


# -- readings -------------------------------------------------------------------------------------


def _readings(case: Case, weights: Mapping[str, float]) -> list[Reading]:
    engine, policy, step = case.policy.engine, case.policy, case.step
    bad: dict[str, tuple[int, int]] = {}
    lost: dict[str, tuple[int, int]] = {}
    for one in case.outcomes:
        s, n = bad.get(one.hardware, (0, 0))
        bad[one.hardware] = s + one.failed + one.silent + one.lost, n + one.started
        s, n = lost.get(one.hardware, (0, 0))
        lost[one.hardware] = s + one.lost, n + one.started
    silent: dict[str, tuple[int, int, int, int]] = {}
    quiet: dict[str, curves.Array] = {}
    for each in case.silence:
        counts = (each.exposed_silent, each.control_silent, each.exposed, each.control)
        sums = silent.get(each.hardware, (0, 0, 0, 0))
        silent[each.hardware] = _four(a + b for a, b in zip(sums, counts, strict=True))
        ell = np.array(each.curve) if each.curve else first_events.curve(engine, [counts])
        quiet[each.hardware] = quiet.get(each.hardware, 0.0) + ell
    failures = tuple((past.failed + past.lost, past.started) for past in case.history)
    losses = tuple((past.lost, past.started) for past in case.history)
    budget = outcome.budget(engine, case.max_failed, failures, engine.failed_budget)
    losable = outcome.budget(engine, None, losses, engine.lost_budget)
    readings = [
        guardrails.shares(engine, UPDATE_OK, "outcome", bad, budget, weights[UPDATE_OK]),
        guardrails.shares(engine, LOST, "lost", lost, losable, weights[LOST]),
        guardrails.silence(engine, silent, quiet),
    ]
    for gate in policy.gates:
        seen = case.observations.metric(gate.metric)
        if gate.metric in case.incomparable:
            readings.append(guardrails.incomparable(gate, case.incomparable[gate.metric]))
        elif gate.type is GateType.RATE:
            margin = _ratio_margin(engine, gate, step)
            readings.append(guardrails.rate(engine, gate, seen, margin, case.weights))
        elif gate.type is GateType.PROPORTION and gate.metric != UPDATE_OK:
            margin = step.margins.get(
                gate.metric, gate.margin.absolute or _failed_margin(engine, step)
            )
            weight = weights.get(gate.metric, 0.0)
            readings.append(guardrails.share_of_devices(engine, gate, seen, margin, weight))
        elif gate.type is GateType.MEAN:
            loosening = _of(engine.level_loosening, step.wave)
            fixed = step.margins.get(gate.metric)
            readings.append(guardrails.level(engine, gate, seen, loosening, fixed))
    return readings


def _four(values: Iterable[int]) -> tuple[int, int, int, int]:
    d1, d0, y1, y0 = values
    return d1, d0, y1, y0


def _weights(policy: Policy) -> dict[str, float]:
    """Each guardrail's share of α, summing to 1: a dry-run gate has none, a kind shares its own."""
    declared = policy.engine.weights
    kinds = {UPDATE_OK: "outcome", LOST: "lost", SILENCE: "silence"}
    for gate in policy.gates:
        if gate.metric != UPDATE_OK and gate.type is not GateType.EVENT and not gate.dry_run:
            kinds[gate.metric] = "levels" if gate.type is GateType.MEAN else "events"
    many = list(kinds.values())
    raw = {name: getattr(declared, kind) / many.count(kind) for name, kind in kinds.items()}
    total = math.fsum(raw.values())
    return {name: weight / total for name, weight in raw.items()} if total > 0 else raw


def _proofs(case: Case) -> list[Proof]:
    """Failed, and failed or lost (silent, pending), with every hardware that has enough devices.

    Who activates may be lost, and that shows later than a success: left out until it is known, a
    wave that has just been doubled would look better than it is.
    """
    engine, step = case.policy.engine, case.step
    silent: dict[str, int] = {}
    for each in case.silence:
        silent[each.hardware] = silent.get(each.hardware, 0) + each.exposed_silent
    failed: dict[str, tuple[int, int]] = {}
    lost: dict[str, tuple[int, int]] = {}
    away = 0
    for one in case.outcomes:
        s, n = failed.get(one.hardware, (0, 0))
        away += one.lost + one.activating
        failed[one.hardware] = (
            s + one.failed + one.lost + one.activating,
            n + one.started - one.pending,
        )
        s, n = lost.get(one.hardware, (0, 0))
        gone = one.failed + one.silent + one.lost + one.activating + one.pending
        lost[one.hardware] = s + gone, n + one.started
    half = _lost_margin(engine, step) / 2
    for hardware, count in silent.items():  # silent after its commit: as good as lost
        s, n = lost.get(hardware, (0, 0))
        confirmed = sum(o.silent + o.lost for o in case.outcomes if o.hardware == hardware)
        lost[hardware] = (
            min(n, s + max(0, count - confirmed - _usually(case, hardware, n, half))),
            n,
        )
    return [
        proof(
            engine,
            FAILED,
            failed,
            _failed_margin(engine, step),
            "failed or not back from activation" if away else "failed",
        ),
        proof(engine, "failed or lost", lost, _lost_margin(engine, step)),
    ]


def _usually(case: Case, hardware: str, devices: int, most: float) -> int:
    """How many of so many devices fall silent without the release, by what the control does.

    At most a share of `most`: while a third of both arms is away, nothing is proven.
    """
    parts = [one for one in case.silence if one.hardware == hardware]
    control = sum(one.control for one in parts)
    if control < _CONTROL_SPEAKS:
        return 0
    share = sum(one.control_silent for one in parts) / control
    return math.floor(devices * min(share, most))


# -- the rungs ------------------------------------------------------------------------------------


def _brake(case: Case) -> str:
    brake = case.abort_failed
    if brake is None:
        return ""
    here = [one for one in case.outcomes if one.wave == case.step.wave]
    bad = sum(one.failed + one.silent + one.lost for one in here)
    started = sum(one.started for one in here)
    if started == 0 or bad < max(1, brake.count) or bad < brake.share * started:
        return ""
    return (
        f"{bad} of {started} devices of {case.step.name or 'this step'} failed or fell silent, "
        f"abortFailed is {brake.count} devices and {brake.share * 100:.3g} %"
    )


def _tripwire(case: Case) -> str:
    for gate in case.policy.of(GateType.EVENT):
        hit, n = _hit(case, gate)
        limit = 1 if gate.metric in case.corroborated else (gate.tripwire_devices or 2)
        if not gate.dry_run and hit >= limit:
            return (
                f"{gate.metric.replace('_', ' ')} on {hit} of {n} updated devices, "
                f"tripwire at {limit}"
            )
    return ""


def _page(case: Case) -> str:
    for gate in case.policy.of(GateType.EVENT):
        hit, n = _hit(case, gate)
        if hit and not gate.dry_run:
            return (
                f"{gate.metric.replace('_', ' ')} on {hit} of {n} updated devices, below the "
                f"tripwire of {gate.tripwire_devices or 2}: a person decides"
            )
    return ""


def _hit(case: Case, gate: Gate) -> tuple[int, int]:
    totals = case.observations.metric(gate.metric).totals
    exposed = [total for total in totals if total.arm == "exposed"]
    return sum(total.first for total in exposed), sum(total.devices for total in exposed)


def _missing(case: Case, readings: list[Reading], proofs: list[Proof]) -> list[tuple[str, str]]:
    """(guardrail, what it lacks), the binding one first. Empty: every rule of widening is met."""
    step, enough = case.step, 1 / case.policy.engine.beta
    found: list[tuple[float, str, str]] = []
    for each in proofs:
        if not each.safe >= enough:  # NaN passes no gate
            found.append((_rank(each.safe), each.name, each.lacks))
    for reading in readings:
        if reading.safe is None or reading.dry_run:
            continue
        # So few devices vary too much between them to prove it, however long they drive: of a fix's
        # first wave no evidence of harm is asked; the normal steps, none skipped, prove the rest.
        harmless = step.fix and not math.isnan(reading.safe) and reading.harm < enough
        if not harmless and not reading.safe >= enough:
            words = f"{reading.name}: {reading.lacks}"
            found.append((_rank(reading.safe), reading.name, words))
    if not step.reporting >= step.min_reporting * step.updated or step.updated <= 0:
        share = f"{step.min_reporting * 100:.3g} %"
        words = f"{step.reporting} of {step.updated} updated devices report, {share} needed"
        found.append((-1.0, "reporting", words))
    uneven = _uneven(case)
    if uneven:
        found.append((-2.0, "invalid", uneven))
    found.sort(key=lambda item: item[0])
    missing = [(name, words) for _, name, words in found]
    if not step.soaked >= step.min_soak:
        words = f"soaked {_span(step.soaked)} of {_span(step.min_soak)}"
        missing.append(("soak", words))
    return missing


def _wants_devices(
    case: Case, missing: list[str], readings: list[Reading], proofs: list[Proof]
) -> bool:
    """Would more devices help where more time cannot? Soaked, every outcome known, none proven.

    A rate or level may lack proof as well, more devices help it too, but not speak against.
    """
    here = [one for one in case.outcomes if one.wave == case.step.wave]
    known = bool(here) and not any(one.activating or one.pending for one in here)
    lacking, outcomes = set(missing), {one.name for one in proofs}
    quiet = {r.name for r in readings if r.harm < 1 / case.policy.engine.beta}
    return known and (lacking <= outcomes or (FAILED in lacking and lacking <= outcomes | quiet))


def _uneven(case: Case) -> str:
    """Sample-ratio check: updated devices that report less than their controls do."""
    arms = [arm for arm in case.observations.arms if arm.wave == case.step.wave]
    n1, n0 = (sum(a.enrolled for a in arms if a.arm == k) for k in ("exposed", "control"))
    s1, s0 = (sum(a.reporting for a in arms if a.arm == k) for k in ("exposed", "control"))
    if min(n1, n0) < 5:
        return ""
    share = (s1 + s0) / (n1 + n0)
    spread = math.sqrt(share * (1 - share) * (1 / n1 + 1 / n0))
    if spread <= 0:
        return ""
    tail = 0.5 * math.erfc((s0 / n0 - s1 / n1) / spread / math.sqrt(2))
    if tail >= case.policy.engine.sample_ratio_level:
        return ""
    return f"the arms report unevenly: {s1} of {n1} updated devices, {s0} of {n0} in control"


# -- margins --------------------------------------------------------------------------------------


def _failed_margin(engine: Engine, step: StepLimits) -> float:
    return step.margins.get("failed", _of(engine.failed_margins, step.wave))


def _lost_margin(engine: Engine, step: StepLimits) -> float:
    declared = step.margins.get("lost", _of(engine.lost_margins, step.wave))
    return max(declared, _failed_margin(engine, step))


def _ratio_margin(engine: Engine, gate: Gate, step: StepLimits) -> float:
    """The step's own, else the gate's, loosened in the first waves."""
    for name in (gate.metric, "ratio"):
        if name in step.margins:
            return step.margins[name]
    usual = _of(engine.ratio_margins, step.wave)
    if gate.margin.ratio is None:
        return usual
    last = step.wave >= len(engine.ratio_margins) - 1
    return gate.margin.ratio if last else max(gate.margin.ratio, usual)


def _of(values: tuple[float, ...], wave: int) -> float:
    return values[min(max(wave, 0), len(values) - 1)]


# -- words and numbers ----------------------------------------------------------------------------


def _widened(case: Case, readings: list[Reading], proofs: list[Proof]) -> str:
    gone = proofs[-1]
    _, high = outcome.band(case.policy.engine, gone.bad, gone.n)
    parts = [
        f"{gone.n - gone.bad} of {gone.n} devices updated and heard, at most {high * 100:.3g} % "
        f"failed or lost, limit {gone.margin * 100:.3g} %"
    ]
    parts += [r.says for r in readings if r.safe is not None and not r.dry_run]
    unproven = sorted({h for one in proofs for h in one.unproven})
    if unproven:
        parts.append(f"unproven for want of devices: {', '.join(unproven)}")
    return f"WIDENED — {'; '.join(parts)}; soaked {_span(case.step.soaked)}"


def _judgement(
    case: Case, verdict: Verdict, sentence: str, numbers: Mapping[str, Any]
) -> Judgement:
    tail = ""
    if case.step.valid_from is not None:
        tail = f"; best first: valid for scores ≥ {case.step.valid_from:g}"
    if verdict is Verdict.ROLL_BACK:
        tail += f"; by policy `{case.policy.name}`"
    if verdict is Verdict.ROLL_BACK and case.commit:
        tail += f", commit {case.commit[:7]}"
    return Judgement(verdict=verdict, sentence=sentence + tail, numbers=_jsonable(numbers))


def _numbers(
    case: Case,
    readings: list[Reading],
    weights: list[float],
    total: float,
    proofs: list[Proof],
) -> dict[str, Any]:
    engine = case.policy.engine
    return {
        "harm": total,
        "harm_limit": 1 / engine.alpha,
        "safe_limit": 1 / engine.beta,
        "guardrails": {
            reading.name: {
                "kind": reading.kind,
                "weight": weight,
                "harm": reading.harm,
                "safe": reading.safe,
                "margin": reading.margin,
                "estimate": reading.estimate,
                "band": list(reading.band),
                "dry_run": reading.dry_run,
                "counts": reading.counts,
                "says": reading.says,
            }
            for reading, weight in zip(readings, weights, strict=True)
        },
        "proofs": {
            one.name: {"bad": one.bad, "n": one.n, "safe": one.safe, "margin": one.margin}
            for one in proofs
        },
        "unproven": sorted({h for one in proofs for h in one.unproven}),
        "soaked": case.step.soaked,
        "valid_from": case.step.valid_from,
        "page": False,
    }


def _jsonable(value: Any) -> Any:
    """JSON has no NaN and no infinity: what is not a number is null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    return value


def _rank(safe: float) -> float:
    return safe if safe >= 0 else 0.0


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _span(seconds: float) -> str:
    for size, unit in ((86_400.0, "d"), (3_600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"
