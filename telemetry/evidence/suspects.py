"""Ranks what the affected devices have in common, against all others: from a symptom to suspects.

Pure. A factor is anything that can be true of a device: it runs a release, a component of it
changed lately, its hardware, a label, its step in a rollout. For each factor the 2 × 2 table

                 with it   without
    affected        a         b
    others          c         d

gives the lift (a/(a+b)) / ((a+c)/n), the odds ratio with ½ added to each cell (Haldane 1956,
Anscombe 1956) and the one-sided p of Fisher's exact test, the hypergeometric tail P(X ≥ a),
multiplied by the number of factors that were tried (Bonferroni). It points at suspects; it proves
nothing: the cohorts of a rollout are drawn, the affected devices are not.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

FEWEST = 2  # affected devices that share a factor, before it is named


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Factor:
    kind: str  # running | changed | hardware | label | fleet | rollout | …
    name: str
    value: str

    def __str__(self) -> str:
        return " ".join(part for part in (self.kind, self.name, self.value) if part)


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspect:
    factor: Factor
    affected: int  # affected devices with the factor
    affected_of: int
    others: int  # other devices with the factor
    others_of: int
    lift: float
    odds_ratio: float
    p: float  # corrected: at most 1
    sentence: str


def rank(
    affected: Sequence[Iterable[Factor]], others: Sequence[Iterable[Factor]]
) -> tuple[list[Suspect], int]:
    """(suspects, the most suspicious first; number of factors tried).

    Each device is the set of its factors. Factors of fewer than two affected devices, or not more
    frequent among the affected than among the others, are no suspects.
    """
    with_it = Counter(factor for device in affected for factor in set(device))
    without = Counter(factor for device in others for factor in set(device))
    tried = [factor for factor, count in with_it.items() if count >= FEWEST]
    n1, n0 = len(affected), len(others)
    found = []
    for factor in tried:
        a, c = with_it[factor], without[factor]
        if a * n0 <= c * n1:
            continue
        p = min(1.0, tail(a, n1, c, n0) * len(tried))
        found.append(_suspect(factor, a, n1, c, n0, p))
    found.sort(key=lambda s: (s.p, -s.odds_ratio, s.factor))
    return found, len(tried)


def tail(a: int, n1: int, c: int, n0: int) -> float:
    """P(X ≥ a) for X hypergeometric: a + c of n1 + n0 devices have the factor, n1 are affected."""
    k, n = a + c, n1 + n0
    whole = _choose(n, n1)
    total = 0.0
    for x in range(a, min(k, n1) + 1):
        if n1 - x > n - k:
            continue
        term = math.exp(_choose(k, x) + _choose(n - k, n1 - x) - whole)
        total += term
        if term < total * 1e-17:
            break  # the terms fall from the mode on, and a lies beyond it
    return min(1.0, total)


def _choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def _suspect(factor: Factor, a: int, n1: int, c: int, n0: int, p: float) -> Suspect:
    odds = (a + 0.5) * (n0 - c + 0.5) / ((n1 - a + 0.5) * (c + 0.5))
    lift = (a / n1) / ((a + c) / (n1 + n0))
    sentence = (
        f"{factor}: {a} of {n1} affected devices ({a / n1:.0%}), "
        f"{c} of {n0} others ({c / max(n0, 1):.0%}); odds × {odds:.3g}"
    )
    return Suspect(
        factor=factor,
        affected=a,
        affected_of=n1,
        others=c,
        others_of=n0,
        lift=lift,
        odds_ratio=odds,
        p=p,
        sentence=sentence,
    )
