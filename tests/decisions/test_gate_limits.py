"""Where a verdict tips over: the limits of the gate, from both sides."""

from __future__ import annotations

from dataclasses import replace

import pytest

from controller.rollout.gate import Case, Outcome, Silence, StepLimits, Verdict, judge
from telemetry.evidence.levels import Sums
from telemetry.evidence.observations import ArmTotals, MetricSeen, Observations
from telemetry.policy import UPDATE_OK, Engine, Gate, GateType, Policy

PLAIN = Policy(name="p", gates=(Gate(metric=UPDATE_OK, type=GateType.PROPORTION),))
STEP = StepLimits(min_soak=60, soaked=90, reporting=100, updated=100)


def failed(count: int, started: int) -> Case:
    here = Outcome(wave=0, hardware="A", started=started, committed=started - count, failed=count)
    return Case(policy=PLAIN, step=STEP, outcomes=(here,))


def test_evidence_of_twenty_rolls_back_and_less_does_not() -> None:
    limit = 1 / Engine().alpha
    tipped = 0
    for count in (2, 3, 4, 5, 6):
        for started in range(count, 400, 3):
            found = judge(failed(count, started))
            assert (found.verdict is Verdict.ROLL_BACK) is (found.numbers["harm"] >= limit)
            tipped += limit <= found.numbers["harm"] < 2 * limit
    assert tipped  # the limit itself is between two of these


def silent(exposed_silent: int, control: int, control_silent: int, hardware: str = "A") -> Case:
    here = Outcome(wave=0, hardware="A", started=100, committed=100)
    quiet = Silence(
        wave=0, hardware=hardware, exposed=100, exposed_silent=exposed_silent,
        control=control, control_silent=control_silent,
    )  # fmt: skip
    return Case(policy=PLAIN, step=STEP, outcomes=(here,), silence=(quiet,))


@pytest.mark.parametrize(
    ("exposed", "control", "control_silent", "bad"),
    [
        (3, 300, 9, 0),  # as many as in control
        (4, 300, 9, 1),
        (2, 300, 9, 0),
        (50, 300, 150, 45),  # at most half the margin of 10 % is taken for usual
        (4, 19, 19, 4),  # too few controls to say what is usual
        (4, 20, 1, 0),
    ],
)
def test_silence_beyond_the_usual_counts_as_lost(
    exposed: int, control: int, control_silent: int, bad: int
) -> None:
    proofs = judge(silent(exposed, control, control_silent)).numbers["proofs"]
    assert (proofs["failed or lost"]["bad"], proofs["failed or lost"]["n"]) == (bad, 100)
    assert proofs["failed"]["bad"] == 0


def test_silence_of_a_hardware_without_outcomes_adds_no_devices() -> None:
    proofs = judge(silent(4, 300, 0, hardware="B")).numbers["proofs"]
    assert (proofs["failed or lost"]["bad"], proofs["failed or lost"]["n"]) == (0, 100)


def test_who_never_confirmed_is_counted_once() -> None:
    """It is in the outcomes, and silent too."""
    here = Outcome(wave=0, hardware="A", started=100, committed=95, silent=3, lost=2)
    quiet = Silence(wave=0, hardware="A", exposed=100, exposed_silent=6, control=300)
    case = Case(policy=PLAIN, step=STEP, outcomes=(here,), silence=(quiet,))
    proofs = judge(case).numbers["proofs"]
    assert proofs["failed or lost"]["bad"] == 6
    assert proofs["failed"]["bad"] == 2


@pytest.mark.parametrize(
    ("hits", "verdict"), [(0, Verdict.WIDEN), (1, Verdict.WAIT), (2, Verdict.ROLL_BACK)]
)
def test_a_tripwire_without_a_number_is_two_devices(hits: int, verdict: Verdict) -> None:
    fire = Gate(metric="fire", type=GateType.EVENT)
    total = ArmTotals(
        wave=0, hardware="A", arm="exposed", devices=100, first=hits, events=hits, exposure=50.0,
        at_risk=50.0, budget_sums=Sums(),
    )  # fmt: skip
    seen = Observations(metrics={"fire": MetricSeen(metric="fire", totals=(total,))})
    case = replace(
        failed(0, 100), observations=seen, policy=replace(PLAIN, gates=(*PLAIN.gates, fire))
    )
    found = judge(case)
    assert found.verdict is verdict
    if hits == 1:
        assert "fire on 1 of 100 updated devices, below the tripwire of 2" in found.sentence
        assert found.numbers["page"]
