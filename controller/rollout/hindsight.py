"""Tries a policy on the past: what it would have decided on recorded telemetry, and when.

Pure. Messages come in the order of their arrival; at every look the case is put together again:
what became of the members as the recorded decisions saw it, the observations as this policy's
ledger folds them from the messages, soak as it passed. The gate then judges it by the policy tried.

What cannot be known is said: after its first other verdict the tried policy would have had other
devices updated, so that the answer ends there; a metric that no message carried is not observed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from controller.rollout.gate import Case, Judgement, Verdict, judge
from telemetry.evidence import rivals
from telemetry.evidence.ledger import Enrolment, Ledger
from telemetry.evidence.observations import Observations
from telemetry.policy import GateType, Policy
from telemetry.report import HealthRow

LOOKS = 200  # over the whole rollout, beside the recorded ones


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """A verdict as it was recorded, with its case."""

    at: float
    verdict: str
    sentence: str
    case: Case


@dataclass(frozen=True, slots=True, kw_only=True)
class Past:
    """All that is kept of a rollout."""

    name: str
    release: str
    opened_at: float
    finished_at: float | None
    enrolled: tuple[Enrolment, ...]  # who counted in which arm, from when till when
    recorded: tuple[Recorded, ...]  # oldest first


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One look: what the tried policy would have said."""

    at: float
    case: Case
    judgement: Judgement

    def to_json(self, opened_at: float) -> dict[str, Any]:
        numbers = self.judgement.numbers
        return {
            "at": self.at,
            "hours": (self.at - opened_at) / 3600,
            "step": self.case.step.wave,
            "verdict": str(self.judgement.verdict),
            "sentence": self.judgement.sentence,
            "harm": numbers["harm"],
            "harm_limit": numbers["harm_limit"],
            "guardrails": {
                name: {key: g[key] for key in ("harm", "safe", "estimate", "band", "counts")}
                for name, g in numbers["guardrails"].items()
            },
        }


def retry(
    past: Past, rows: Iterable[Sequence[HealthRow]], policy: Policy | None = None
) -> list[Seen]:
    """Every look by `policy` (None: the one in force then). `rows`: pages, in order of arrival."""
    if not past.recorded:
        return []
    tried = policy or past.recorded[-1].case.policy
    ledger = Ledger(tried)
    waiting = sorted(past.enrolled, key=lambda e: e.since, reverse=True)
    found: list[Seen] = []
    moments = _moments(past)
    for chunk, moment in _until(rows, moments):
        while waiting and waiting[-1].since <= moment:
            ledger.enrol(waiting.pop())
        ledger.add(chunk)
        found.append(_look(past, tried, ledger.snapshot(), moment))
    return found


def _until(
    rows: Iterable[Sequence[HealthRow]], moments: Sequence[float]
) -> Iterator[tuple[list[HealthRow], float]]:
    """What arrived up to each moment, since the one before."""
    chunk: list[HealthRow] = []
    place = 0
    for row in (row for page in rows for row in page):
        while place < len(moments) and row.received_at > moments[place]:
            yield chunk, moments[place]
            chunk, place = [], place + 1
        if place == len(moments):
            return
        chunk.append(row)
    for moment in moments[place:]:
        yield chunk, moment
        chunk = []


def again(past: Past, policy: Policy) -> list[Seen]:
    """The recorded cases alone, judged by another policy: without the messages."""
    return [
        Seen(at=one.at, case=case, judgement=judge(case))
        for one in past.recorded
        for case in [replace(one.case, policy=policy)]
    ]


def told(past: Past, looks: Sequence[Seen]) -> list[str]:
    """What would have happened, in sentences; it ends where the past no longer fits."""
    lines: list[str] = []
    decided: set[int] = set()
    for look in looks:
        step, verdict = look.case.step.wave, look.judgement.verdict
        if verdict is Verdict.WAIT or step in decided:
            continue
        decided.add(step)
        hours = (look.at - past.opened_at) / 3600
        lines.append(f"{_span(hours)} step {step + 1}: {look.judgement.sentence}")
        if verdict is Verdict.ROLL_BACK:
            lines.append(_against(past, look.at))
            return lines
    if not lines and looks:
        lines.append(f"it would have waited to the end: {looks[-1].judgement.sentence}")
    lines += [f"{gate}: no message carried it; it was not observed" for gate in unobserved(looks)]
    return lines


def unobserved(looks: Sequence[Seen]) -> list[str]:
    """Gates of the tried policy of which the past knows nothing."""
    if not looks:
        return []
    last = looks[-1].case
    missing = []
    for gate in last.policy.gates:
        seen = last.observations.metric(gate.metric)
        level = gate.type is GateType.MEAN and not seen.levels
        rate = gate.type is GateType.RATE and not any(t.events for t in seen.totals)
        if level or rate:
            missing.append(gate.metric)
    return missing


def compared(past: Past, looks: Sequence[Seen]) -> tuple[rivals.Said, ...]:
    """What other methods would have said on the same looks, on the loudest rate gate."""
    return rivals.compare([_as_look(look) for look in looks])


def _look(past: Past, policy: Policy, seen: Observations, at: float) -> Seen:
    recorded = [one for one in past.recorded if one.at <= at]
    last = recorded[-1] if recorded else past.recorded[0]
    waited = max(0.0, at - last.at) if last.verdict == Verdict.WAIT else 0.0
    step = replace(last.case.step, soaked=last.case.step.soaked + waited)
    # Messages are kept for some days; after that the observations that were recorded speak.
    heard = any(arm.reporting for arm in seen.arms)
    kept = seen if heard or not last.case.observations.arms else last.case.observations
    case = replace(last.case, policy=policy, observations=kept, step=step)
    return Seen(at=at, case=case, judgement=judge(case))


def _moments(past: Past) -> list[float]:
    end = past.finished_at or past.recorded[-1].at
    first = past.recorded[0].at
    even = [first + (end - first) * i / LOOKS for i in range(LOOKS + 1)] if end > first else [end]
    return sorted({*even, *(one.at for one in past.recorded if one.at <= end)})


def _against(past: Past, at: float) -> str:
    back = next((one for one in past.recorded if one.verdict == Verdict.ROLL_BACK), None)
    if back is None:
        return "the policy in force then never rolled back: what followed would have been otherwise"
    hours = (back.at - at) / 3600
    if abs(hours) < 1e-3:
        return "so did the policy in force then, at the same time"
    return f"that is {_span(abs(hours))} {'earlier' if hours > 0 else 'later'} than it was"


def _as_look(look: Seen) -> rivals.Look:
    case = look.case
    here = [one for one in case.outcomes if one.wave == case.step.wave]
    failed, started = sum(o.failed for o in here), sum(o.started for o in here)
    timed_out = sum(o.silent + o.lost for o in here)
    pending = sum(o.activating + o.pending for o in here)
    loudest = _loudest(case)
    sums = {"exposed": (0.0, 0.0), "control": (0.0, 0.0)}
    for total in case.observations.metric(loudest).totals if loudest else ():
        events, exposure = sums[total.arm]
        sums[total.arm] = events + total.events, exposure + total.exposure
    return rivals.Look(
        at=look.at,
        wave=case.step.wave,
        group=started,
        failed=failed,
        timed_out=timed_out,
        finished=started - pending,
        events=sums["exposed"][0],
        exposure=sums["exposed"][1],
        control_events=sums["control"][0],
        control_exposure=sums["control"][1],
    )


def _loudest(case: Case) -> str:
    """The rate gate with the most events: what the message-level methods look at."""
    rates = [gate.metric for gate in case.policy.of(GateType.RATE)]
    many = {
        metric: sum(t.events for t in case.observations.metric(metric).totals) for metric in rates
    }
    return max(rates, key=lambda metric: many[metric], default="")


def cases(rows: Iterable[Mapping[str, Any]], when: Mapping[str, float]) -> Iterator[Recorded]:
    """Recorded verdicts (API or database rows, oldest first); `when`: id → Unix seconds."""
    for row in rows:
        if row["kind"] == "verdict" and row["inputs"]:
            yield Recorded(
                at=when[row["id"]],
                verdict=str(row["verdict"]),
                sentence=str(row["sentence"]),
                case=Case.from_json(row["inputs"]),
            )


def _span(hours: float) -> str:
    if not math.isfinite(hours):
        return "never"
    return f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min"
