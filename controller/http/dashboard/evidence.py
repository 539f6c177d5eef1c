"""What the gate knows of each guardrail: estimate, always-valid band, limit, n, verdict. Pure.

Reads the `numbers` of decisions and readings as `controller.rollout.gate` wrote them. The bands are
drawn on one scale per guardrail: logarithmic for ratios, linear for shares and differences.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from controller.http.dashboard.figures import number, percent
from controller.http.dashboard.signs import Sign, Tone, sign

Plain = Mapping[str, Any]
_RANK = {"events": 0, "share": 1, "levels": 2, "outcome": 3, "lost": 4, "silence": 5}
_WIDTH = 100.0  # of a drawn band, in its own units


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """Where the parts of a band stand, 0–100 from left to right; None: not to be drawn."""

    low: float
    high: float
    estimate: float | None
    limit: float | None
    neutral: float | None  # no difference


@dataclass(frozen=True, slots=True, kw_only=True)
class Guardrail:
    name: str
    kind: str
    what: str  # what the estimate is
    estimate: str
    band: str
    limit: str
    control: str
    n: str
    harm: float | None
    harm_limit: float
    safe: float | None
    safe_limit: float
    weight: float
    dry_run: bool
    binding: bool
    sign: Sign
    says: str
    drawn: Drawn | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One guardrail at one moment: a row of the chart's table."""

    at: str
    estimate: float | None
    low: float | None
    high: float | None
    limit: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    name: str
    what: str
    points: tuple[Point, ...]


def guardrails(numbers: Plain) -> tuple[Guardrail, ...]:
    """Every guardrail of one judgement, the binding one first, then those that lean to harm."""
    harm_limit, safe_limit = _real(numbers, "harm_limit", 20.0), _real(numbers, "safe_limit", 10.0)
    binding = numbers.get("binding", "")
    found = [
        _guardrail(name, one, harm_limit, safe_limit, name == binding)
        for name, one in (numbers.get("guardrails") or {}).items()
        if isinstance(one, Mapping)
    ]
    return tuple(sorted(found, key=_urgency))


def _urgency(rail: Guardrail) -> tuple[bool, bool, bool, int, str]:
    """The binding one, then what leans to harm, then what the policy measures, then the rest."""
    leans = (rail.harm or 0.0) > 1
    return not rail.binding, rail.dry_run, not leans, _RANK.get(rail.kind, 9), rail.name


def _guardrail(
    name: str, one: Plain, harm_limit: float, safe_limit: float, binding: bool
) -> Guardrail:
    kind, counts = str(one.get("kind", "")), one.get("counts") or {}
    low, high = _band(one)
    estimate, limit = _number(one.get("estimate")), _number(one.get("margin"))
    write = percent if kind in ("outcome", "lost", "share") else number
    times = " ×" if kind in ("silence", "events") else ""  # what is a ratio to the control group
    harm, safe = _number(one.get("harm")), _number(one.get("safe"))
    return Guardrail(
        name=name.replace("_", " "),
        kind=kind,
        what=_what(kind),
        estimate="—" if estimate is None else f"{write(estimate)}{times}",
        band="—" if low is None else f"{write(low)} – {write(high)}{times}",
        limit="—" if limit is None else f"{write(limit)}{times}",
        control=_control(kind, counts),
        n=_n(counts),
        harm=harm,
        harm_limit=harm_limit,
        safe=safe,
        safe_limit=safe_limit,
        weight=_real(one, "weight", 0.0),
        dry_run=bool(one.get("dry_run")),
        binding=binding,
        sign=_sign(harm, safe, harm_limit, safe_limit, bool(one.get("dry_run"))),
        says=str(one.get("says", "")),
        drawn=_draw(kind, low, high, estimate, limit),
    )


def _what(kind: str) -> str:
    return {
        "outcome": "share of devices that failed",
        "lost": "share of devices lost in activation",
        "share": "share of devices",
        "silence": "silent devices, ratio to control",
        "events": "rate, ratio to control",
        "levels": "level, difference to control",
    }.get(kind, kind)


def _control(kind: str, counts: Plain) -> str:
    pairs = {"events": ("control_rate", "rate"), "levels": ("control_mean", "mean")}
    if kind in pairs and counts.get(pairs[kind][0]) is not None:
        before, new = (_number(counts.get(name)) for name in pairs[kind])
        return f"{number(before)} → {number(new)}"
    if kind == "silence":
        return f"{counts.get('control_silent', 0)} → {counts.get('exposed_silent', 0)}"
    return "—"


def _n(counts: Plain) -> str:
    """Devices, and behind the plus those of the control group."""
    if "started" in counts:
        return number(_number(counts["started"]))
    exposed, control = counts.get("exposed"), counts.get("control")
    if isinstance(exposed, Mapping):
        exposed, control = exposed.get("devices", 0), (control or {}).get("devices", 0)
    if exposed is None:
        return "—"
    return f"{number(_number(exposed))} + {number(_number(control or 0))}"


def _sign(
    harm: float | None, safe: float | None, harm_limit: float, safe_limit: float, dry: bool
) -> Sign:
    if dry:
        return sign("Only shown", Tone.IDLE)
    if harm is not None and harm >= harm_limit:
        return sign("Harmful", Tone.BAD)
    if safe is not None and safe >= safe_limit:
        return sign("Safe", Tone.GOOD)
    if safe is None:
        # Evidence of 1 leans neither way: there is nothing to watch.
        return sign("Watching", Tone.WAIT) if (harm or 0.0) > 1 else sign("No harm seen", Tone.IDLE)
    return sign("Not proven yet", Tone.WAIT)


def _draw(
    kind: str, low: float | None, high: float | None, estimate: float | None, limit: float | None
) -> Drawn | None:
    if low is None or high is None:
        return None
    log = kind in ("silence", "events")
    neutral = 1.0 if log else 0.0
    ends = [v for v in (low, high, limit, neutral) if v is not None and (v > 0 or not log)]
    if len(ends) < 2:
        return None
    place = (lambda v: math.log(max(v, 1e-9))) if log else (lambda v: v)
    left, right = place(min(ends)), place(max(ends))
    if right <= left:
        return None
    margin = (right - left) * 0.06

    def at(value: float | None) -> float | None:
        if value is None or (log and value <= 0):
            return None
        inside = (place(value) - left + margin) / (right - left + 2 * margin)
        return round(_WIDTH * min(1.0, max(0.0, inside)), 2)

    return Drawn(
        low=at(low) or 0.0,
        high=at(high) or _WIDTH,
        estimate=at(estimate),
        limit=at(limit),
        neutral=at(neutral),
    )


def traces(judged: Iterable[tuple[str, Plain]]) -> tuple[Trace, ...]:
    """Each guardrail over time, oldest first: (RFC 3339, numbers) of decisions and readings."""
    found: dict[str, list[Point]] = {}
    whats: dict[str, str] = {}
    for at, numbers in judged:
        for name, one in (numbers.get("guardrails") or {}).items():
            if not isinstance(one, Mapping):
                continue
            low, high = _band(one)
            whats[name] = _what(str(one.get("kind", "")))
            found.setdefault(name, []).append(
                Point(
                    at=at,
                    estimate=_number(one.get("estimate")),
                    low=low,
                    high=high,
                    limit=_number(one.get("margin")),
                )
            )
    return tuple(
        Trace(name=name.replace("_", " "), what=whats[name], points=tuple(points))
        for name, points in found.items()
    )


def first(traces: Sequence[Trace], rails: Sequence[Guardrail]) -> str:
    """The guardrail that the chart begins with: what the table names first."""
    return rails[0].name if rails else (traces[0].name if traces else "")


def _band(one: Plain) -> tuple[float | None, float | None]:
    band = one.get("band")
    if not isinstance(band, Sequence) or len(band) != 2:
        return None, None
    return _number(band[0]), _number(band[1])


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _real(data: Plain, key: str, otherwise: float) -> float:
    value = _number(data.get(key))
    return otherwise if value is None else value
