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
        _line(plan["changes"]["count"], "changes now", "change now", "to what it ran before",
              "each to what it ran before"),
        _line(plan["offline"]["count"], "is offline", "are offline", "at its next contact",
              "each at its next contact"),
        _line(
            plan["waiting"]["count"], "waits for its own safety", "wait for their own safety",
            _why(plan["waiting"]),
        ),
        Line(
            n=plan["cannot"]["count"], what="cannot go back: fix forward",
            detail=_why(plan["cannot"]),
        ),
        _untold(plan["untold"]),
        _line(also, "other component goes back with them", "other components go back with them",
              ", ".join(plan["also"])),
    )  # fmt: skip
    return tuple(line for line in found if line.n or line is found[0])


def _line(n: int, one: str, many: str, detail: str, details: str | None = None) -> Line:
    """In words that fit the number; `details` for other than one, where they differ."""
    if n == 1:
        return Line(n=n, what=one, detail=detail)
    return Line(n=n, what=many, detail=detail if details is None else details)


def _untold(n: int) -> Line:
    return _line(
        n, "more would have been told", "more would have been told", "it never is", "they never are"
    )


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
            _line(devices, "was told this release", "were told this release",
                  "it returns to what it ran before", "each returns to what it ran before"),
            _line(min(away, devices), "of them is offline now", "of them are offline now",
                  "it goes back at its next contact", "each goes back at its next contact"),
            _line(n("told", 0), "of them is still installing", "of them are still installing",
                  "it stops, or goes back once it is safe (parked, landed)",
                  "they stop, or go back once it is safe (parked, landed)"),
            _line(n("failed", 0) + n("silent", 0),
                  "of them failed or is silent", "of them failed or are silent",
                  "the order waits for it; a silent one may need a visit",
                  "the order waits for them; a silent one may need a visit"),
            _untold(n("drawn", 0)),
        ]  # fmt: skip
        return tuple(line for line in found if line.n or line is found[0])
    if verb == "hold":
        return (
            _line(devices, "keeps this release", "keep this release", "nobody is moved"),
            _untold(n("drawn", 0)),
        )
    open_ends = n("drawn", 0) + n("told", 0)
    return (
        _line(sum(states.values()), "is in the rollout so far", "are in the rollout so far", ""),
        _line(
            open_ends,
            "is not updated yet",
            "are not updated yet",
            "it is whom this concerns",
            "they are whom this concerns",
        ),
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
