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


def dialog(verb: str, plan: Plain, fleet: str, away: int) -> Dialog:
    """`plan` is the verb's dry run; `away`: members told that are offline now."""
    label, right, means = VERBS[verb]
    states: Mapping[str, int] = plan["members"]
    devices = int(plan["devices"])
    changes = verb in ("rollback", "hold")
    return Dialog(
        verb=verb,
        label=label,
        means=means,
        button=_button(verb, label, devices),
        needs_reason=changes or verb == "lift",
        type_name=fleet if verb == "rollback" and devices > TYPE_THE_NAME else "",
        lines=_lines(verb, states, devices, away),
        besides=_besides(verb, plan),
        danger=right is Right.STOP and verb != "pause",
    )


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
    if verb == "promote":
        return ("The step passes without the gate's proof: the audit names you.",)
    return ()
