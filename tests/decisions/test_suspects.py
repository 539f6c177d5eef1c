"""From a symptom to suspects: the table, the exact test, the ranking."""

from __future__ import annotations

import random

import pytest
from scipy.stats import fisher_exact

from telemetry.evidence.suspects import Factor, rank, tail


def running(release: str) -> Factor:
    return Factor(kind="running", name="app", value=release)


def hardware(kind: str) -> Factor:
    return Factor(kind="label", name="hardware", value=kind)


@pytest.mark.parametrize("seed", range(40))
def test_the_tail_is_that_of_fishers_exact_test(seed: int) -> None:
    chance = random.Random(seed)
    n1, n0 = chance.randint(1, 400), chance.randint(1, 4000)
    a, c = chance.randint(0, n1), chance.randint(0, n0)
    right = fisher_exact([[a, n1 - a], [c, n0 - c]], alternative="greater").pvalue
    ours = tail(a, n1, c, n0)
    # Below its mean the tail is nearly 1 and never a suspect; from there on it must be exact.
    if a * (n1 + n0) >= (a + c) * n1:
        assert ours == pytest.approx(right, rel=1e-6, abs=1e-300)


def test_the_release_that_the_affected_share_comes_first() -> None:
    chance = random.Random(1)
    affected, others = [], []
    for i in range(2000):
        new = chance.random() < 0.3
        factors = {running("app-2" if new else "app-1"), hardware(chance.choice(["hw2", "hw3"]))}
        harmed = chance.random() < (0.2 if new else 0.01)
        (affected if harmed else others).append(factors | {hardware(f"serial-{i}")})
    suspects, tried = rank(affected, others)
    assert suspects[0].factor == running("app-2")
    assert suspects[0].p < 1e-20
    assert suspects[0].odds_ratio > 10
    assert suspects[0].lift > 2
    assert suspects[0].affected + suspects[0].others == sum(
        running("app-2") in factors for factors in affected + others
    )
    assert all("serial" not in s.factor.value for s in suspects)  # of one device: no suspect
    assert tried == 4


def test_what_everybody_has_is_no_suspect() -> None:
    suspects, _ = rank([{running("app-1")}] * 5, [{running("app-1")}] * 50)
    assert suspects == []


def test_nobody_affected_and_nobody_else_are_answers() -> None:
    assert rank([], [{running("app-1")}]) == ([], 0)
    suspects, tried = rank([{running("app-1")}] * 3, [])
    assert (suspects, tried) == ([], 1)


def test_many_factors_cost_significance() -> None:
    """With hundreds of labels, some are shared by chance: Bonferroni holds them down."""
    chance = random.Random(3)
    low = 0
    for _ in range(30):
        devices = [
            {Factor(kind="label", name=f"l{k}", value=chance.choice("ab")) for k in range(100)}
            for _ in range(200)
        ]
        suspects, _ = rank(devices[:40], devices[40:])
        low += bool(suspects) and suspects[0].p < 0.05
    assert low <= 5
