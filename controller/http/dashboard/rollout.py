"""The rollout page: steps against the plan, what a person may do, and why. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from controller.commands import allowed
from controller.http.dashboard.figures import percent
from controller.http.dashboard.signs import Sign, Tone, sign
from controller.http.dashboard.tally import Tally, members, standing
from controller.roles import Principal, Right
from controller.rollout.retreat import FROZEN

Plain = Mapping[str, Any]

VERBS: Mapping[str, tuple[str, Right, str]] = {  # verb → (label, right, what it does)
    "rollback": ("Roll back", Right.STOP, "each device returns to what it ran before"),
    "hold": ("Hold", Right.STOP, "nobody new gets this release; devices keep what they run"),
    "pause": ("Pause", Right.STOP, "the rollout waits; the release stays allowed"),
    "resume": ("Resume", Right.START, "the rollout goes on where it stopped"),
    "promote": ("Promote", Right.START, "the step passes by your word, whatever the gate says"),
    "lift": ("Lift the hold", Right.START, "the rejected release may be tried again"),
}
_ENDED = frozenset({"Completed", "RolledBack", "Superseded", "Held"})


@dataclass(frozen=True, slots=True, kw_only=True)
class StepView:
    number: int
    name: str
    sign: Sign
    current: bool
    tally: Tally
    planned: str  # who the step is for, in words
    limits: tuple[str, ...]
    soak: str  # "" before it began


@dataclass(frozen=True, slots=True, kw_only=True)
class Verb:
    name: str
    label: str
    means: str
    href: str
    stops: bool


def steps(
    one: Plain, fixes: str | None, cohorts: Mapping[str, int], now: Mapping[str, int]
) -> tuple[StepView, ...]:
    """Each step with its members by state. `cohorts`: devices in each cohort now, if known;
    `now`: how the loop last saw the current step (`standing.Standing`)."""
    plan: list[tuple[str, Plain]] = [(step_name(step), step) for step in one["steps"]]
    if fixes and plan:
        plan.insert(0, (f"devices that ran {fixes}", plan[0][1]))
    return tuple(
        _step(one, number, name, step, cohorts, now, bool(fixes) and number == 0)
        for number, (name, step) in enumerate(plan)
    )


def step_name(step: Plain) -> str:
    share = float(step.get("percent") or 1.0)
    return f"{step.get('cohort', '?')} {'all' if share >= 1 else f'{share * 100:.3g} %'}"


def _step(
    one: Plain, number: int, name: str, step: Plain, cohorts: Mapping[str, int],
    now: Mapping[str, int], fix: bool,
) -> StepView:  # fmt: skip
    by_state = one["members"]["steps"].get(str(number), {})
    current = number == one["step"] and one["state"] not in _ENDED
    counts = standing(now, by_state) if current and now else members(by_state)
    return StepView(
        number=number + 1,
        name=name,
        sign=_step_sign(one, number, counts),
        current=current,
        tally=counts,
        planned="" if fix else _planned(step, cohorts),
        limits=_limits(step),
        soak=_soak(one, step) if current else "",
    )


def _step_sign(one: Plain, number: int, counts: Tally) -> Sign:
    if number < one["step"] or one["state"] == "Completed":
        return sign("Passed", Tone.GOOD)
    if number > one["step"] or (not counts.total and one["state"] in _ENDED):
        return sign("Not started", Tone.IDLE)
    match one["state"]:
        case "RolledBack" | "RollingBack":
            return sign("Stopped here", Tone.BAD)
        case "Held":
            return sign("Held here", Tone.BAD)
        case "Superseded":
            return sign("Ended here", Tone.IDLE)
        case "Paused" | "Inconclusive" | "NoMembers":
            return sign("Waits", Tone.WAIT)
        case "Pending":
            return sign("Not started", Tone.IDLE)
    return sign("Soaks" if one["state"] == "Soaking" else "Under way", Tone.MOVING)


def _planned(step: Plain, cohorts: Mapping[str, int]) -> str:
    size = cohorts.get(str(step.get("cohort")))
    if size is None:
        return ""
    share = float(step.get("percent") or 1.0)
    if share >= 1:
        return f"all {size:,} of the cohort now"
    return f"about {round(size * share):,} of {size:,} in the cohort now"


def _limits(step: Plain) -> tuple[str, ...]:
    found = []
    if step.get("max_concurrent"):
        found.append(f"at most {step['max_concurrent']:,} at once")
    if step.get("max_per_minute"):
        found.append(f"at most {step['max_per_minute']:,} a minute")
    if step.get("pause") is not None:
        found.append("waits for `promote`")
    margins = sorted((step.get("margins") or {}).items())
    if margins:
        found.append("must refute " + ", ".join(_margin(name, value) for name, value in margins))
    return tuple(found)


def _margin(name: str, value: float) -> str:
    if name in ("failed", "lost"):  # shares of devices
        return f"{percent(value)} {name}"
    if name == "ratio":
        return f"{value:g} × control"
    return f"{name.replace('_', ' ')} {value:g}"


def _soak(one: Plain, step: Plain) -> str:
    from datetime import timedelta

    from pydantic import TypeAdapter

    from controller.http.dashboard.figures import span

    wanted = TypeAdapter(timedelta).validate_python(step.get("soak") or 0).total_seconds()
    return f"soaked {span(float(one['soakSeconds']))} of {span(wanted)}"


def verbs(one: Plain, who: Principal, held: bool) -> tuple[Verb, ...]:
    """What this person may do with the rollout as it stands."""
    flags = {"frozen": FROZEN in one["sentence"]}
    return tuple(
        Verb(
            name=name,
            label=label,
            means=means,
            href=f"/rollouts/{one['id']}/{name}",
            stops=right is Right.STOP,
        )
        for name, (label, right, means) in VERBS.items()
        if who.may(right, one["fleet"])
        and allowed(name, one["state"], flags)
        and (name != "lift" or held)
    )


def decision_rows(decisions: Sequence[Plain]) -> list[dict[str, Any]]:
    """Decisions with their sign, newest first; `judged`: can it be judged again?"""
    from controller.http.dashboard.signs import of_verdict

    return [
        {**row, "sign": of_verdict(row["verdict"]), "judged": row["kind"] == "verdict"}
        for row in decisions
    ]
