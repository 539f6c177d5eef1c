"""Tells a person why: the paragraph of a verdict, from the numbers that were recorded with it.

Pure. First the verdict and where it stands, then the guardrail that decided, in counts and in its
always-valid band, then what the evidence means in words, then the others, one clause each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

Numbers = Mapping[str, Any]

_VERBS = {
    "roll_back": "ROLLED BACK",
    "widen": "WIDENED",
    "wait": "WAITING",
    "inconclusive": "INCONCLUSIVE",
    "complete": "COMPLETED",
}


def paragraph(decision: Mapping[str, Any], release: str = "") -> str:
    """The paragraph of one recorded verdict; its sentence alone where there are no numbers."""
    numbers: Numbers = decision.get("numbers") or {}
    rails: Mapping[str, Numbers] = numbers.get("guardrails") or {}
    if not rails:
        return str(decision["sentence"])
    name = _binding(numbers, rails)
    verb = _VERBS.get(str(decision["verdict"]), str(decision["verdict"]).upper())
    inputs = decision.get("inputs") or {}
    step = (inputs.get("step") or {}) if isinstance(inputs, Mapping) else {}
    parts = [f"{verb} {release}".rstrip() + _where(numbers, step) + "."]
    if name in rails:
        parts.append(_told(name, rails[name]))
    parts.append(_meant(name, numbers, rails))
    proofs = _proofs(numbers)
    if proofs:
        parts.append(proofs)
    others = [_clause(other, rail) for other, rail in rails.items() if other != name]
    if others:
        parts.append(f"Other guardrails: {', '.join(others)}.")
    missing = numbers.get("missing") or []
    if missing and str(decision["verdict"]) in ("wait", "inconclusive"):
        parts.append(f"Still missing: {'; '.join(str(m) for m in missing)}.")
    if numbers.get("valid_from") is not None:
        parts.append(f"Drawn best first: valid for scores ≥ {numbers['valid_from']:g}.")
    if numbers.get("unproven"):
        parts.append(f"Unproven for want of devices: {', '.join(numbers['unproven'])}.")
    return " ".join(parts)


def _binding(numbers: Numbers, rails: Mapping[str, Numbers]) -> str:
    """The guardrail that decided, else the one that weighs most."""
    named = str(numbers.get("binding") or "")
    if named in rails:
        return named
    return max(rails, key=lambda n: (rails[n].get("weight") or 0) * (rails[n].get("harm") or 0))


def _where(numbers: Numbers, step: Mapping[str, Any]) -> str:
    soaked = numbers.get("soaked")
    words = f" after {_span(float(soaked))} of soak" if soaked is not None else ""
    return f"{words}, step {int(step['wave']) + 1} ({step.get('name', '')})" if step else words


def _told(name: str, rail: Numbers) -> str:
    shown = name.replace("_", " ").capitalize()
    counts, kind = rail.get("counts") or {}, rail.get("kind")
    low, high = (rail.get("band") or [None, None])[:2]
    if kind == "events" and isinstance(counts.get("exposed"), Mapping):
        one, zero = counts["exposed"], counts["control"]
        text = (
            f"{shown}: {one['first']:,.0f} of {one['devices']:,.0f} updated devices had one, "
            f"against {zero['first']:,.0f} of {zero['devices']:,.0f} comparable devices that were "
            "not updated (same score bands, same hours)."
        )
        text += _plausible(rail.get("estimate"), low, high, "×")
        return text + _fleet(counts.get("fleet"))
    if kind == "silence":
        return (
            f"{shown}: {counts.get('exposed_silent', 0)} of {counts.get('exposed', 0)} updated "
            f"devices fell silent, against {counts.get('control_silent', 0)} of "
            f"{counts.get('control', 0)} that were not updated."
        ) + _plausible(rail.get("estimate"), low, high, "×")
    if "failures" in counts:
        return (
            f"{shown}: {counts['failures']} of {counts['started']} devices, budget "
            f"{_percent(counts.get('budget'))}; plausible are {_percent(low)} to {_percent(high)}."
        )
    return f"{shown}: {rail.get('says', '')}."


def _plausible(estimate: Any, low: Any, high: Any, unit: str) -> str:
    if estimate is None:
        return ""
    return (
        f" Most plausible: {_number(estimate)} {unit} (95 % always-valid range "
        f"{_number(low)} to {_number(high)})."
    )


def _fleet(fleet: Any) -> str:
    if not isinstance(fleet, Mapping) or fleet.get("ratio") is None:
        return ""
    share = fleet.get("covered") or 0.0
    whom = "the whole fleet" if share > 0.995 else f"{share:.0%} of the fleet"
    return (
        f" For {whom} that is {_number(fleet['ratio'])} ×, or {fleet['excess_per_1000']:+.3g} "
        "events per 1,000 units of exposure."
    )


def _meant(name: str, numbers: Numbers, rails: Mapping[str, Numbers]) -> str:
    harm = (rails.get(name) or {}).get("harm")
    total, limit = numbers.get("harm"), numbers.get("harm_limit")
    text = ""
    if harm is not None and harm > 1:
        text = (
            f"These data are {_number(harm)} times better explained by “harmful” than by “no "
            "change”; "
        )
    elif harm is not None:
        text = "These data speak for “no change” rather than for harm; "
    return f"{text}the total evidence of harm is {_number(total)}, the limit is {_number(limit)}."


def _proofs(numbers: Numbers) -> str:
    proofs: Mapping[str, Numbers] = numbers.get("proofs") or {}
    enough = numbers.get("safe_limit") or math.inf
    parts = []
    for name, proof in proofs.items():
        met = (proof.get("safe") or 0) >= enough
        parts.append(
            f"{name} below {_percent(proof.get('margin'))} {'proven' if met else 'not proven yet'} "
            f"({proof.get('bad')} of {proof.get('n')})"
        )
    text = ", ".join(parts)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _clause(name: str, rail: Numbers) -> str:
    shown, harm = name.replace("_", " "), rail.get("harm")
    state = "not known" if harm is None else "ok" if harm <= 1 else f"evidence {_number(harm)}"
    figure = _figure(rail)
    tail = ", shown only" if rail.get("dry_run") else ""
    return f"{shown} {figure} ({state}{tail})" if figure else f"{shown} ({state}{tail})"


def _figure(rail: Numbers) -> str:
    counts = rail.get("counts") or {}
    if "failures" in counts:
        return f"{counts['failures']}/{counts['started']}"
    estimate = rail.get("estimate")
    if rail.get("kind") == "silence" and not (
        counts.get("exposed_silent") or counts.get("control_silent")
    ):
        return f"0/{counts.get('exposed', 0)}"
    if estimate is None:
        return ""
    return f"{estimate:+.3g}" if rail.get("kind") == "levels" else f"{_number(estimate)} ×"


def _percent(share: Any) -> str:
    return "–" if share is None else f"{float(share) * 100:.3g} %"


def _number(value: Any) -> str:
    if value is None:
        return "–"
    if value >= 1e6:
        return "more than a million"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _span(seconds: float) -> str:
    for size, unit in ((86_400.0, "d"), (3_600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"
