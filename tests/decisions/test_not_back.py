"""Devices that do not come back from their activation: what they prove, and what they may prove."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from controller.rollout import hindsight
from controller.rollout.case import outcome
from controller.rollout.gate import Case, Judgement, Outcome, Silence, StepLimits, Verdict, judge
from controller.rollout.model import Arm, Member, MemberState
from device_agent.protocol import State
from telemetry.evidence import first_events
from telemetry.evidence import outcome as shares
from telemetry.evidence.levels import Sums
from telemetry.evidence.observations import ArmTotals, FirstEvents, MetricSeen, Observations
from telemetry.evidence.proofs import proof
from telemetry.policy import UPDATE_OK, Engine, Gate, GateType, Margin, Policy
from telemetry.report import DeviceRow

PLAIN = Policy(name="p", gates=(Gate(metric=UPDATE_OK, type=GateType.PROPORTION),))
RATE = Gate(metric="incident", type=GateType.RATE, margin=Margin(ratio=1.3))
# The third wave: a share of failed ones is refuted from 143 devices on.
STEP = StepLimits(wave=2, min_soak=60, soaked=90, reporting=900, updated=900)


def third_wave(**of_b: int) -> tuple[Outcome, ...]:
    bad = sum(of_b.values())
    return (
        Outcome(wave=2, hardware="A", started=600, committed=600),
        Outcome(wave=2, hardware="B", started=300, committed=300 - bad, **of_b),
    )


def verdict(*outcomes: Outcome, policy: Policy = PLAIN) -> Judgement:
    return judge(Case(policy=policy, step=STEP, outcomes=outcomes))


# A budget so wide that nothing is rolled back: what is asked here is whether the step widens.
PATIENT = replace(PLAIN, engine=Engine(failed_budget=0.02, lost_budget=0.02))


def test_a_device_lost_in_activation_has_failed() -> None:
    assert verdict(*third_wave(), policy=PATIENT).verdict is Verdict.WIDEN
    assert verdict(*third_wave(failed=3), policy=PATIENT).verdict is Verdict.WAIT
    found = verdict(*third_wave(lost=3), policy=PATIENT)
    assert found.verdict is Verdict.WAIT
    assert found.numbers["binding"] == "failed"
    assert "of hardware B needed without failure to refute 2.5 % failed or not back" in (
        found.sentence
    )
    assert "(3 failed or not back from activation)" in found.sentence


def test_who_activates_may_be_lost_and_who_installs_is_left_out() -> None:
    away = verdict(*third_wave(activating=3), policy=PATIENT)
    assert away.verdict is Verdict.WAIT
    assert away.numbers["proofs"]["failed or lost"]["bad"] == 3
    assert away.numbers["proofs"]["failed"]["bad"] == 3
    waiting = verdict(*third_wave(pending=3), policy=PATIENT)
    assert waiting.verdict is Verdict.WIDEN
    assert waiting.numbers["proofs"]["failed"] == pytest.approx(
        {"bad": 0, "n": 897, "safe": waiting.numbers["proofs"]["failed"]["safe"], "margin": 0.025}
    )


def test_doubling_a_wave_does_not_hide_what_was_lost_in_it() -> None:
    """The successes of the devices that it takes are known hours before their losses are."""
    few = verdict(*third_wave(lost=3), policy=PATIENT)
    grown = (
        Outcome(wave=2, hardware="A", started=1200, committed=1200),
        Outcome(wave=2, hardware="B", started=600, committed=591, lost=3, activating=6),
    )
    assert few.verdict is Verdict.WAIT
    assert verdict(*grown, policy=PATIENT).verdict is Verdict.WAIT
    back = replace(grown[1], committed=597, activating=0)
    assert verdict(grown[0], back, policy=PATIENT).verdict is Verdict.WIDEN


def test_who_activates_is_no_evidence_of_harm_yet() -> None:
    gone = Outcome(wave=2, hardware="A", started=60, committed=50, activating=10)
    assert verdict(gone).verdict is Verdict.WAIT
    assert verdict(replace(gone, activating=0, lost=10)).verdict is Verdict.ROLL_BACK


@pytest.mark.parametrize(
    ("state", "attempt", "exposed", "word"),
    [
        (State.ACTIVATING, "a1", None, "activating"),
        (State.ACTIVATING, "a1", 5.0, "activating"),
        (State.TRIAL, "a1", 5.0, "pending"),  # it is back
        (State.INSTALLING, "a1", None, "pending"),
        (State.DOWNLOADING, "a1", None, ""),
        (State.ACTIVATING, "a0", None, ""),  # of an earlier order
        (State.ACTIVATING, "a0", 5.0, "pending"),
    ],
)
def test_the_last_word_tells_who_activates(
    state: State, attempt: str, exposed: float | None, word: str
) -> None:
    member = Member(
        device="d", step=0, arm=Arm.EXPOSED, drawn_at=0.0, hardware="A", band=0, score=None,
        state=MemberState.TOLD, attempt="a1", told_at=1.0, exposed_at=exposed,
    )  # fmt: skip
    row = DeviceRow(
        device="d", change=1, last_contact=6.0, heard_clock=6.0, online=True, sleeping_until=None,
        boot="b", boot_count=1, reported_at=6.0, state=state, attempt=attempt,
    )  # fmt: skip
    assert outcome(member, row) == word


def test_other_methods_see_who_activates_as_unfinished() -> None:
    case = Case(policy=PLAIN, step=STEP, outcomes=third_wave(activating=2, pending=3))
    look = hindsight._as_look(hindsight.Seen(at=1.0, case=case, judgement=judge(case)))
    assert (look.group, look.finished) == (900, 895)


# -- what a proof lacks ----------------------------------------------------------------------------


def test_the_clean_devices_that_a_proof_lacks_are_counted() -> None:
    engine = Engine()
    total = next(n for n in range(1, 1000) if shares.safe(engine, 2, n, 0.07) >= 1 / engine.beta)
    found = proof(engine, "failed", {"A": (2, 100)}, 0.07)
    assert found.lacks == (
        f"update_ok: 98 of {total - 2} devices needed without failure to refute 7 % failed "
        "(2 failed)"
    )
    assert found.unproven == ()
    clean = proof(engine, "failed", {"A": (0, 9)}, 0.08)
    assert clean.lacks == "update_ok: 9 of 44 devices needed without failure to refute 8 % failed"


def test_a_hardware_speaks_for_itself_from_twice_the_devices_that_a_clean_proof_needs() -> None:
    many, twice = (0, 2000), 2 * 44
    below = proof(Engine(), "failed", {"A": many, "B": (2, twice - 1)}, 0.08)
    assert below.unproven == ("B",)
    assert below.safe > 1 / Engine().beta
    enough = proof(Engine(), "failed", {"A": many, "B": (2, twice)}, 0.08)
    assert enough.unproven == ()
    assert enough.safe == pytest.approx(shares.safe(Engine(), 2, twice, 0.08))
    # Fewer devices are enough where they prove it themselves: then they are not named.
    alone = proof(Engine(), "failed", {"A": many, "B": (0, 44)}, 0.08)
    assert alone.unproven == ()
    assert 1 / Engine().beta <= alone.safe < 2 / Engine().beta


# -- growing ---------------------------------------------------------------------------------------


def driven(exposed: int, control: int) -> Observations:
    """So many first events among 100 updated devices and 500 in control."""
    ell = first_events.curve(Engine(), [(1, 0, 100, 500)] * exposed + [(0, 1, 100, 500)] * control)
    seen = MetricSeen(
        metric="incident",
        firsts=(
            FirstEvents(
                wave=0, hardware="A", band=0, d1=exposed, d0=control, y1=100, y0=500,
                curve=tuple(np.asarray(ell).tolist()),
            ),
        ),
        totals=tuple(
            ArmTotals(
                wave=0, hardware="A", arm=arm, devices=n, first=d, events=d,
                exposure=24.0 * n, at_risk=24.0 * n, budget_sums=Sums(n=n, x=24.0 * n),
            )
            for arm, n, d in (("exposed", 100, exposed), ("control", 500, control))
        ),
    )  # fmt: skip
    return Observations(metrics={"incident": seen})


def grows(observations: Observations, **bad: int) -> bool:
    policy = Policy(name="p", gates=(*PLAIN.gates, RATE), engine=Engine(failed_margins=(0.07,)))
    here = Outcome(wave=0, hardware="A", started=100, committed=100 - sum(bad.values()), **bad)
    step = StepLimits(min_soak=60, soaked=90, reporting=95, updated=95)
    found = judge(Case(policy=policy, step=step, outcomes=(here,), observations=observations))
    assert found.verdict is Verdict.WAIT
    return bool(found.numbers["grow"])


def test_a_wave_with_failures_grows_though_its_rates_lack_proof() -> None:
    """More devices help both; until the rates have their proof a bad release would be out."""
    assert grows(driven(1, 5), failed=2)


def test_no_wave_grows_while_a_rate_speaks_against_it() -> None:
    assert not grows(driven(9, 5), failed=2)


def test_no_wave_grows_for_a_rate_alone() -> None:
    assert not grows(driven(1, 5))


@pytest.mark.parametrize("word", ["pending", "activating"])
def test_no_wave_grows_before_its_outcomes_are_known(word: str) -> None:
    assert not grows(driven(1, 5), failed=2, **{word: 1})


def test_devices_that_fall_silent_make_no_wave_grow_whose_rates_lack_proof() -> None:
    """Some always fall silent; time tells whether more do than in control."""
    policy = Policy(name="p", gates=(*PLAIN.gates, RATE))
    case = Case(
        policy=policy,
        step=StepLimits(min_soak=60, soaked=90, reporting=95, updated=95),
        outcomes=(Outcome(wave=0, hardware="A", started=100, committed=100),),
        silence=(
            Silence(
                wave=0, hardware="A", exposed=100, exposed_silent=5, control=500, control_silent=9
            ),
        ),
        observations=driven(1, 5),
    )
    found = judge(case)
    assert found.numbers["grow"] is False
    assert any("failed or lost" in words for words in found.numbers["missing"])
