"""What a fleet's past makes of the failure budget, and what a clean step needs: by an oracle."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from controller.rollout.gate import Case, Outcome, StepLimits, Verdict, judge
from telemetry.evidence import first_events, outcome
from telemetry.policy import UPDATE_OK, Engine, Gate, GateType, Policy

ENGINE = Engine()
PLAIN = Policy(name="p", gates=(Gate(metric=UPDATE_OK, type=GateType.PROPORTION),))


def bound(failed: int, started: int) -> float:
    """Clopper and Pearson's, one-sided."""
    return float(stats.beta.ppf(ENGINE.history_bound, failed + 1, started - failed))


def budget(*past: tuple[int, int], declared: float | None = None) -> float:
    return outcome.budget(ENGINE, declared, past, 0.005)


def test_a_fleet_without_a_past_has_the_usual_budget_or_the_declared_one() -> None:
    assert budget() == 0.005
    assert budget(declared=0.02) == 0.02


def test_a_short_past_only_raises_the_budget() -> None:
    assert budget((0, 300)) == pytest.approx(max(0.005, bound(0, 300)))
    assert budget((5, 300)) == pytest.approx(bound(5, 300))
    assert budget((0, 199)) == 0.005  # 1/0.005 devices are too few for any word
    assert budget((5, 199)) == 0.005
    assert budget((5, 200)) == pytest.approx(bound(5, 200))


def test_from_a_thousand_updates_on_the_past_replaces_the_usual_budget() -> None:
    assert budget((1, 999)) == 0.005
    assert budget((1, 1000)) == pytest.approx(bound(1, 1000))
    assert budget((0, 100_000)) == ENGINE.history_floor
    assert budget((1, 1000), declared=0.02) == 0.02
    assert budget((60, 1000), declared=0.02) == pytest.approx(bound(60, 1000))
    assert budget((900, 1000)) == 0.5


def test_what_was_accepted_once_stays_within_the_budget() -> None:
    """The worst of the earlier releases, of 200 devices at least: fewer say too little."""
    many = (1, 10_000)
    assert budget(many, (4, 200)) == 0.02
    assert budget(many, (4, 199)) == pytest.approx(bound(5, 10_199))


def test_only_the_last_five_releases_count() -> None:
    assert budget((500, 1000), *[(1, 1000)] * 5) == pytest.approx(bound(5, 5000))


def test_the_first_events_that_refute_a_ratio_are_the_fewest() -> None:
    """Of both arms, at no harm: the exposed have their share of them, and of the risk set."""
    share, margin = 0.25, 2.0

    def proof(total: int) -> float:
        grid = np.exp(np.linspace(math.log(0.05), math.log(20), 4001))
        ell = total * share * np.log(grid) - total * np.log1p(share * (grid - 1))
        at = total * share * math.log(margin) - total * math.log1p(share * (margin - 1))
        below = grid < margin
        weight = np.exp(-0.5 * (np.log(grid[below] / margin) / ENGINE.ratio_prior) ** 2)
        return float((weight * np.exp(ell[below] - at)).sum() / weight.sum())

    found = first_events.events_needed(ENGINE, margin, share)
    assert proof(math.ceil(found * 1.06)) >= 1 / ENGINE.beta
    assert proof(math.floor(found * 0.94)) < 1 / ENGINE.beta


def test_many_ticks_say_what_they_say_one_by_one() -> None:
    """More ticks than cost less to add up than to sort, some of them alike."""
    chance = np.random.default_rng(5)
    ticks = [(int(d1), int(d0), 10 + k % 7, 50 + k % 3)
             for k, (d1, d0) in enumerate(chance.integers(0, 4, size=(60, 2)))]  # fmt: skip
    whole = first_events.curve(ENGINE, ticks)
    assert whole == pytest.approx(sum(first_events.curve(ENGINE, [tick]) for tick in ticks))


def test_nothing_started_proves_nothing() -> None:
    assert outcome.safe(ENGINE, 0, 0, 0.05) == 1.0
    assert outcome.harm(ENGINE, 0, 0, 0.005) == 1.0


def test_what_no_wait_can_mend_is_said_first() -> None:
    """Too few report: that binds before a proof that lacks devices."""
    few = Outcome(wave=0, hardware="A", started=9, committed=9)
    step = StepLimits(min_soak=60, soaked=90, reporting=5, updated=9)
    found = judge(Case(policy=PLAIN, step=step, outcomes=(few,)))
    assert found.numbers["binding"] == "reporting"
    assert len(found.numbers["missing"]) == 3
    assert "; and 2 more" in found.sentence


def test_it_is_said_before_outcomes_that_speak_against_the_release() -> None:
    """Their proof is then below 1, and above nothing."""
    some = Outcome(wave=0, hardware="A", started=40, committed=38, failed=2)
    step = StepLimits(min_soak=60, soaked=90, reporting=20, updated=40)
    found = judge(Case(policy=PLAIN, step=step, outcomes=(some,)))
    assert found.verdict is Verdict.WAIT
    assert found.numbers["proofs"]["failed"]["safe"] < 1
    assert found.numbers["binding"] == "reporting"


def test_a_rollback_says_its_evidence_and_the_limit() -> None:
    bad = Outcome(wave=0, hardware="A", started=60, committed=40, failed=20)
    step = StepLimits(min_soak=60, soaked=90, reporting=60, updated=60)
    found = judge(Case(policy=PLAIN, step=step, outcomes=(bad,)))
    assert found.verdict is Verdict.ROLL_BACK
    assert "; evidence of harm " in found.sentence
    assert found.sentence.endswith(", limit 20; by policy `p`")
