"""The board: how a team ships, and what each release changed. Pure.

The measures and their definitions are `telemetry.outcomes`'; here they get their words. Every
figure stands with its definition and n, and leads to the rollouts that it was made of.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from controller.http.dashboard.figures import number, percent, span
from controller.http.dashboard.signs import Sign, Tone, of_rollout, sign
from controller.http.dashboard.tally import Tally, tally
from telemetry.outcomes import Delivery, Measure, Shipped

Plain = Mapping[str, Any]
_VERDICT = {
    "better": ("Better", Tone.GOOD),
    "worse": ("Worse", Tone.BAD),
    "no difference shown": ("No difference shown", Tone.IDLE),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    name: str
    value: str
    n: str
    meaning: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Scorecard:
    product: str
    team: str
    figures: tuple[Figure, ...]
    states: Tally
    rollouts: tuple[Plain, ...]  # id, release, fleet, state; newest first


@dataclass(frozen=True, slots=True, kw_only=True)
class Initiative:
    """What the releases of one initiative changed, newest first: (rollout, outcome, sign); and
    what cannot be measured, by its reason: (why, rollouts)."""

    name: str
    product: str
    rows: tuple[tuple[Plain, Plain, Sign], ...]
    unmeasured: tuple[tuple[str, tuple[Plain, ...]], ...]


def scorecards(
    delivered: Iterable[Delivery], shipped: Sequence[tuple[Shipped, Plain]]
) -> tuple[Scorecard, ...]:
    """One card for each product and team; `shipped`: what was counted, with its rollout."""
    return tuple(_card(one, shipped) for one in delivered)


def _card(one: Delivery, shipped: Sequence[tuple[Shipped, Plain]]) -> Scorecard:
    ours = [row for what, row in shipped if (what.product, what.team) == (one.product, one.team)]
    states = Counter(str(row["state"]) for row in ours)
    return Scorecard(
        product=one.product or "no product label",
        team=one.team or "no team label",
        figures=tuple(_figure(measure) for measure in one.measures),
        states=tally(
            (state, of_rollout(state).word, of_rollout(state).tone, n)
            for state, n in sorted(states.items())
        ),
        rollouts=tuple(sorted(ours, key=lambda row: str(row["id"]), reverse=True)),
    )


def _figure(measure: Measure) -> Figure:
    value = measure.value
    match measure.unit:
        case "s":
            shown = span(value)
        case "share":
            shown = percent(value)
        case _:
            shown = f"{number(value)} {measure.unit}" if value is not None else "—"
    return Figure(
        name=measure.name.replace("_", " ").capitalize(),
        value=shown,
        n=f"{measure.n:,} of {measure.of:,}",
        meaning=measure.definition,
    )


def initiatives(items: Iterable[Plain]) -> tuple[Initiative, ...]:
    """Outcomes by initiative, as `controller.outcomes.board` tells them; a release without one
    stands under its product. A rollout whose policy declares no goal has nothing to show."""
    measured: dict[tuple[str, str], list[tuple[Plain, Plain, Sign]]] = {}
    unmeasured: dict[tuple[str, str], dict[str, list[Plain]]] = {}
    for item in items:
        key = (item["initiative"] or "No initiative named", item["product"] or "")
        for outcome in item["outcomes"]:
            if outcome["verdict"] == "not measurable":
                why = unmeasured.setdefault(key, {}).setdefault(str(outcome["sentence"]), [])
                why.append(item)
                continue
            word, tone = _VERDICT.get(outcome["verdict"], (outcome["verdict"], Tone.IDLE))
            measured.setdefault(key, []).append((item, outcome, sign(word, tone)))
    return tuple(
        Initiative(
            name=key[0],
            product=key[1],
            rows=tuple(measured.get(key, ())),
            unmeasured=tuple((w, tuple(found)) for w, found in unmeasured.get(key, {}).items()),
        )
        for key in sorted({*measured, *unmeasured})
    )
