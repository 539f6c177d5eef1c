"""Updated devices that report less than their controls: who is silent cannot look bad."""

from __future__ import annotations

from scipy import stats

from controller.rollout.gate import Case, Outcome, StepLimits, Verdict, judge
from telemetry.evidence.observations import ArmSeen, Observations
from telemetry.policy import UPDATE_OK, Engine, Gate, GateType, Policy

PLAIN = Policy(name="p", gates=(Gate(metric=UPDATE_OK, type=GateType.PROPORTION),))
HERE = (100, 300)  # enrolled: updated, control
CONTROL = 270  # of them reporting


def missing(updated: int, control: int, *, here: tuple[int, int] = HERE, wave: int = 0) -> str:
    """What a step lacks of which so many report; it lacks nothing else."""
    arms = tuple(
        ArmSeen(wave=wave, hardware=f"hw{k}", arm=arm, enrolled=n // 2, reporting=s // 2, hours=1.0)
        if k
        else ArmSeen(
            wave=wave, hardware="hw0", arm=arm, enrolled=n - n // 2, reporting=s - s // 2, hours=1.0
        )
        for arm, n, s in (("exposed", here[0], updated), ("control", here[1], control))
        for k in (0, 1)
    )
    found = judge(
        Case(
            policy=PLAIN,
            step=StepLimits(min_soak=60, soaked=90, reporting=100, updated=100),
            outcomes=(Outcome(wave=0, hardware="A", started=100, committed=100),),
            observations=Observations(arms=arms),
        )
    )
    if found.verdict is Verdict.WIDEN:
        return ""
    assert found.numbers["binding"] == "invalid"
    return found.sentence


def tail(updated: int) -> float:
    """One-sided p of two shares with a pooled variance: chi-square without correction, halved."""
    table = [[updated, HERE[0] - updated], [CONTROL, HERE[1] - CONTROL]]
    return float(stats.chi2_contingency(table, correction=False).pvalue) / 2


def test_arms_are_uneven_from_the_first_count_that_chance_seldom_brings() -> None:
    level = Engine().sample_ratio_level
    last = max(s for s in range(90) if tail(s) < level)
    assert 70 < last < 89
    assert missing(last, CONTROL) == (
        f"WAITING — the arms report unevenly: {last} of 100 updated devices, 270 of 300 in control"
    )
    assert missing(last + 1, CONTROL) == ""


def test_controls_that_report_less_make_nothing_invalid() -> None:
    assert missing(100, 200) == ""


def test_arms_of_which_all_or_none_report_are_even() -> None:
    assert missing(100, 300) == ""
    assert missing(0, 0) == ""


def test_five_devices_an_arm_are_asked_for_and_only_this_waves() -> None:
    assert missing(0, CONTROL, here=(4, 300)) == ""
    assert missing(0, CONTROL, here=(5, 300)) != ""
    assert missing(0, CONTROL, wave=1) == ""
