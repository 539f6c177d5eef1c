"""The dialog before a verb: who changes, who cannot be reached, what it touches besides. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from controller.http.dashboard.figures import count
from controller.http.dashboard.rollout import VERBS
from controller.roles import Right

Plain = Mapping[str, Any]
TYPE_THE_NAME = 1_000  # devices: above it the fleet's name is typed


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    n: int
    what: str
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialog:
    verb: str
    label: str
    means: str
    button: str  # the verb and the number
    needs_reason: bool
    type_name: str  # the fleet's name, when it is to be typed
    lines: tuple[Line, ...]
    besides: tuple[str, ...]
    danger: bool
    exact: bool  # False: from the counters; who cannot go back is not among them


def dialog(verb: str, plan: Plain, fleet: str, away: int, *, whole: bool = True) -> Dialog:
    """`plan` is the verb's dry run, exact (with its groups of devices) or from the counters alone;
    `away`: members told that are offline now, for the counters; `whole`: it reaches everybody."""
    label, right, means = VERBS[verb]
    devices = int(plan["devices"])
    changes = verb in ("rollback", "hold")
    exact = verb == "rollback" and "cannot" in plan
    return Dialog(
        verb=verb,
        label=label,
        means=means,
        button=_button(verb, label, devices),
        needs_reason=changes or verb == "lift",
        type_name=fleet if whole and verb == "rollback" and devices > TYPE_THE_NAME else "",
        lines=_groups(plan) if exact else _lines(verb, plan["members"], devices, away),
        besides=_besides(verb, plan),
        danger=right is Right.STOP and verb != "pause",
        exact=exact or verb != "rollback",
    )


def _groups(plan: Plain) -> tuple[Line, ...]:
    """Device by device: who changes, who is away, who waits for its safety, who cannot and why."""
    also = sum(plan["also"].values())
    found = (
        Line(n=plan["changes"]["count"], what="change now", detail="each to what it ran before"),
        Line(n=plan["offline"]["count"], what="are offline", detail="each at its next contact"),
        Line(
            n=plan["waiting"]["count"], what="wait for their own safety",
            detail=_why(plan["waiting"]),
        ),
        Line(
            n=plan["cannot"]["count"], what="cannot go back: fix forward",
            detail=_why(plan["cannot"]),
        ),
        Line(n=plan["untold"], what="more would have been told", detail="they never are"),
        Line(n=also, what="other components go back with them", detail=", ".join(plan["also"])),
    )  # fmt: skip
    return tuple(line for line in found if line.n or line is found[0])


def _why(group: Plain) -> str:
    reasons: Mapping[str, int] = group["reasons"]
    return "; ".join(f"{n:,} {why}" for why, n in list(reasons.items())[:4])


def _button(verb: str, label: str, devices: int) -> str:
    if verb == "rollback":
        return f"Roll back {count(devices, 'device')}"
    if verb == "hold":
        return f"Hold: keep {count(devices, 'device')} as they are"
    return label


def _lines(verb: str, states: Mapping[str, int], devices: int, away: int) -> tuple[Line, ...]:
    n = states.get
    if verb == "rollback":
        found = [
            Line(n=devices, what="were told this release",
                 detail="each returns to what it ran before"),
            Line(n=min(away, devices), what="of them are offline now",
                 detail="each goes back at its next contact"),
            Line(n=n("told", 0), what="of them are still installing",
                 detail="they stop, or go back once it is safe (parked, landed)"),
            Line(n=n("failed", 0) + n("silent", 0), what="of them failed or are silent",
                 detail="the order waits for them; a silent one may need a visit"),
            Line(n=n("drawn", 0), what="more would have been told", detail="they never are"),
        ]  # fmt: skip
        return tuple(line for line in found if line.n or line is found[0])
    if verb == "hold":
        return (
            Line(n=devices, what="keep this release", detail="nobody is moved"),
            Line(n=n("drawn", 0), what="more would have been told", detail="they never are"),
        )
    open_ends = n("drawn", 0) + n("told", 0)
    return (
        Line(n=sum(states.values()), what="are in the rollout so far", detail=""),
        Line(n=open_ends, what="are not updated yet", detail="they are who this concerns"),
    )


def _besides(verb: str, plan: Plain) -> tuple[str, ...]:
    if verb in ("rollback", "hold"):
        return (
            f"Rejects {plan['release']}: no commit brings it back until the hold is lifted.",
            "Writes the hold to Git when Git answers; it acts at once, with Git down too.",
            "Does not touch other rollouts or other components of these devices.",
        )
    if verb == "lift":
        return (f"{plan['sentence']}.",)
    if verb == "promote":
        return ("The step passes without the gate's proof: the audit names you.",)
    return ()
