"""What other methods would have said on the same looks: pure rules, for comparison only.

Each takes the looks of one rollout in time order and answers when it would have stopped, or that it
would have let the release pass. Thresholds are the usual ones of each tool, not tuned for a fleet:

- hawkBit: reported failures ÷ group above 50 % (its default), 5 %, 2 %; blind to silence.
- AWS IoT Jobs abortConfig: failed and timed out ÷ finished, at least 20 finished: 5 %, 2 %.
- Argo Rollouts: event rate above 1.5 × control in an interval, more than failureLimit = 3 times.
- Kayenta: Mann-Whitney (one-sided p < .02) on the intervals' rates, effect above a quarter; judged
  once it has 8 intervals. Approximated: no outlier step, no score weights.
- Per message: z test at 5 % on all events, looked at every time; messages of one device are taken
  for independent, which they are not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

INTERVALS = 8  # that Kayenta wants
FAILURE_LIMIT = 3
FINISHED = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """Sums so far of one metric at one moment; `wave` restarts what is counted by group."""

    at: float
    wave: int
    group: int  # devices of this wave that began
    failed: int  # of this wave: reported
    timed_out: int  # of this wave: silent or lost
    finished: int  # of this wave: reported either way, or timed out
    events: float = 0.0  # updated devices, all waves
    exposure: float = 0.0
    control_events: float = 0.0
    control_exposure: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    method: str
    stops: bool
    at: float | None  # of the look at which it stops
    why: str


Rule = Callable[[Sequence[Look]], str]  # looks so far → why it stops, or ""


def compare(looks: Sequence[Look]) -> tuple[Said, ...]:
    """Every method on these looks."""
    return tuple(_run(name, rule, looks) for name, rule in METHODS.items())


def _run(name: str, rule: Rule, looks: Sequence[Look]) -> Said:
    for n in range(1, len(looks) + 1):
        why = rule(looks[:n])
        if why:
            return Said(method=name, stops=True, at=looks[n - 1].at, why=why)
    return Said(method=name, stops=False, at=None, why="lets it pass")


def hawkbit(share: float) -> Rule:
    def rule(looks: Sequence[Look]) -> str:
        now = looks[-1]
        if now.group <= 0 or now.failed <= share * now.group:
            return ""
        return f"{now.failed} of {now.group} failed, above {share:.0%}"

    return rule


def aws(share: float) -> Rule:
    def rule(looks: Sequence[Look]) -> str:
        now = looks[-1]
        bad = now.failed + now.timed_out
        if now.finished < FINISHED or bad < share * now.finished:
            return ""
        return f"{bad} of {now.finished} finished ones failed or timed out, at or above {share:.0%}"

    return rule


def argo(looks: Sequence[Look]) -> str:
    over = [ratio for ratio in _ratios(looks) if ratio > 1.5]
    return (
        f"{len(over)} intervals above 1.5 × control, limit {FAILURE_LIMIT}"
        if len(over) > FAILURE_LIMIT
        else ""
    )


def kayenta(looks: Sequence[Look]) -> str:
    rates = _rates(looks)
    if len(rates) < INTERVALS:
        return ""
    one, zero = [a for a, _ in rates], [b for _, b in rates]
    usual = sum(zero) / len(zero)
    shifts = sorted(a - b for a in one for b in zero)
    effect = shifts[len(shifts) // 2]
    p = _mann_whitney(one, zero)
    if p >= 0.02 or usual <= 0 or effect <= 0.25 * usual:
        return ""
    return f"intervals {effect / usual:+.0%} above control, p {p:.2g}"


def per_message(looks: Sequence[Look]) -> str:
    now = looks[-1]
    if min(now.exposure, now.control_exposure) <= 0 or now.events + now.control_events < 1:
        return ""
    share = now.exposure / (now.exposure + now.control_exposure)
    total = now.events + now.control_events
    z = (now.events - total * share) / math.sqrt(total * share * (1 - share))
    return f"z = {z:.1f} on {total:.0f} events" if z > 1.645 else ""


METHODS: dict[str, Rule] = {
    "hawkBit > 50 %": hawkbit(0.5),
    "hawkBit > 5 %": hawkbit(0.05),
    "hawkBit > 2 %": hawkbit(0.02),
    "AWS abort ≥ 5 %": aws(0.05),
    "AWS abort ≥ 2 %": aws(0.02),
    "Argo ratio > 1.5": argo,
    "Kayenta Mann-Whitney": kayenta,
    "per message z": per_message,
}


def _rates(looks: Sequence[Look]) -> list[tuple[float, float]]:
    """(updated, control) events per exposure of the intervals in which both reported."""
    found = []
    for before, after in pairwise(looks):
        one = after.exposure - before.exposure
        zero = after.control_exposure - before.control_exposure
        if one > 0 and zero > 0:
            found.append(
                (
                    max(0.0, after.events - before.events) / one,
                    max(0.0, after.control_events - before.control_events) / zero,
                )
            )
    return found


def _ratios(looks: Sequence[Look]) -> list[float]:
    return [one / zero if zero > 0 else math.inf for one, zero in _rates(looks) if one > 0]


def _mann_whitney(one: Sequence[float], zero: Sequence[float]) -> float:
    """One-sided p of "one is larger", normal approximation with ties (Lehmann 1975)."""
    n, m = len(one), len(zero)
    u = sum((a > b) + 0.5 * (a == b) for a in one for b in zero)
    counted: dict[float, int] = {}
    for value in [*one, *zero]:
        counted[value] = counted.get(value, 0) + 1
    whole = n + m
    ties = sum(t**3 - t for t in counted.values()) / (whole * (whole - 1))
    variance = n * m / 12 * (whole + 1 - ties)
    if variance <= 0:
        return 1.0
    return 0.5 * math.erfc((u - n * m / 2 - 0.5) / math.sqrt(2 * variance))
