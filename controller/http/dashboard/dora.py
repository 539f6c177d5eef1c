"""The board: how often, how fast and how safely a team ships. Pure.

Definitions (shown beside each figure, with its n and its period):

- *Deployment frequency*: rollouts completed, a week.
- *Lead time*: from the commit's acceptance to `Completed`, median.
- *Change failure rate*: rolled back or held ÷ (those + completed).
- *Recovery time*: from the rejection to `RolledBack`, median.
- *Rework rate*: releases that name another one they fix ÷ all.

After the five measures of DORA (dora.dev, State of DevOps 2024).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from controller.http.dashboard.figures import percent, span
from controller.http.dashboard.signs import of_rollout
from controller.http.dashboard.tally import Tally, tally

DAY = 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A rollout as the board counts it. Times are Unix seconds."""

    id: str
    product: str
    team: str
    fleet: str
    release: str
    state: str
    opened_at: float
    finished_at: float | None
    rejected_at: float | None
    fixes: bool


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
    outcomes: Tally
    rollouts: tuple[Ended, ...]  # newest first


def scorecards(ended: Iterable[Ended], days: float) -> tuple[Scorecard, ...]:
    """One card for each product and team, over a period that ends now."""
    groups: dict[tuple[str, str], list[Ended]] = {}
    for one in ended:
        groups.setdefault((one.product, one.team), []).append(one)
    return tuple(
        _card(product, team, ours, days) for (product, team), ours in sorted(groups.items())
    )


def _card(product: str, team: str, ours: list[Ended], days: float) -> Scorecard:
    done = [one for one in ours if one.state == "Completed"]
    bad = [one for one in ours if one.state in ("RolledBack", "RollingBack", "Held")]
    leads = [one.finished_at - one.opened_at for one in done if one.finished_at]
    back = [
        one.finished_at - one.rejected_at
        for one in bad
        if one.state == "RolledBack" and one.finished_at and one.rejected_at
    ]
    fixes = sum(one.fixes for one in ours)
    counts: dict[str, int] = {}
    for one in ours:
        counts[one.state] = counts.get(one.state, 0) + 1
    return Scorecard(
        product=product,
        team=team,
        figures=(
            Figure(
                name="Deployment frequency",
                value=f"{len(done) / days * 7:.2g} a week",
                n=f"{len(done)} completed in {days:g} days",
                meaning="rollouts completed, a week",
            ),
            Figure(
                name="Lead time",
                value=span(median(leads)) if leads else "—",
                n=f"n = {len(leads)}",
                meaning="median, commit accepted → every reachable device updated",
            ),
            Figure(
                name="Change failure rate",
                value=percent(len(bad) / (len(bad) + len(done))) if bad or done else "—",
                n=f"{len(bad)} of {len(bad) + len(done)}",
                meaning="rolled back or held ÷ these and completed",
            ),
            Figure(
                name="Recovery time",
                value=span(median(back)) if back else "—",
                n=f"n = {len(back)}",
                meaning="median, rejection → every reachable device back",
            ),
            Figure(
                name="Rework rate",
                value=percent(fixes / len(ours)) if ours else "—",
                n=f"{fixes} of {len(ours)}",
                meaning="releases that fix another one ÷ all",
            ),
        ),
        outcomes=tally(
            (state, of_rollout(state).word, of_rollout(state).tone, n)
            for state, n in sorted(counts.items())
        ),
        rollouts=tuple(sorted(ours, key=lambda one: one.opened_at, reverse=True)),
    )
