"""The ledger and the verdict ladder: each rule one test."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from controller.rollout.gate import (
    AbortFailed,
    Case,
    Outcome,
    Silence,
    StepLimits,
    Verdict,
    judge,
    needed,
)
from telemetry.evidence import first_events, levels
from telemetry.evidence.ledger import Enrolment, Ledger, Observations, merge
from telemetry.policy import Engine, Gate, GateType, Margin, Policy
from telemetry.report import HealthRow, Level

ONLY_OUTCOME = Policy(name="plain", gates=(Gate(metric="update_ok", type=GateType.PROPORTION),))
RATE = Gate(metric="disengagement", type=GateType.RATE, margin=Margin(ratio=1.5))
DRIVING = Policy(
    name="driving", gates=(*ONLY_OUTCOME.gates, replace(RATE, budget={"per_1000h": 40}))
)
SOAKED = StepLimits(name="canary", min_soak=60, max_soak=600, soaked=60, reporting=60, updated=60)


def clean(n: int = 60) -> Outcome:
    return Outcome(wave=0, hardware="hw3", started=n, committed=n)


def row(
    device: str,
    at: float,
    *,
    events: int = 0,
    attempt: str | None = None,
    digest: str = "old",
    seq: int = 0,
    level: float = 50.0,
) -> HealthRow:
    return HealthRow(
        batch=1,
        device=device,
        received_at=at,
        boot="b",
        seq=seq,
        attempt=attempt,
        components={"app": digest},
        t0=at - 60,
        seconds=60,
        levels={"cabin_cpu": Level(n=60, total=60 * level, squares=60 * level**2)},
        counters={"disengagement": events} if events else {},
        exposure={"device_hour": 1.0},
    )


def exposed(device: str, since: float = 1000.0, wave: int = 0) -> Enrolment:
    return Enrolment(
        device=device,
        arm="exposed",
        wave=wave,
        hardware="hw3",
        band=0,
        since=since,
        attempt="a1",
        digests={"app": "new"},
    )


def control(device: str, since: float = 1000.0) -> Enrolment:
    return Enrolment(device=device, arm="control", wave=0, hardware="hw3", band=0, since=since)


def fleet(
    policy: Policy, *, ratio: float, seed: int, n1: int = 12, n0: int = 60, mean: float = 0.3
) -> list[Observations]:
    """Snapshots over a wave of 20 ticks; `mean` events per device of an unharmed one."""
    chance = np.random.default_rng(seed)
    ledger = Ledger(policy, tick=60)
    names = [f"car-{i:03d}" for i in range(n1 + n0)]
    for i, name in enumerate(names):
        ledger.enrol(exposed(name) if i < n1 else control(name))
    frailty = chance.lognormal(-0.5, 1, n1 + n0)
    seen = []
    for tick in range(20):
        rows = []
        for i, name in enumerate(names):
            rate = mean / 20 * frailty[i] * (ratio if i < n1 else 1.0)
            rows.append(
                row(
                    name,
                    1060.0 + 60 * tick,
                    events=int(chance.poisson(rate)),
                    attempt="a1" if i < n1 else None,
                    digest="new" if i < n1 else "old",
                    seq=tick,
                )
            )
        ledger.add(rows)
        seen.append(ledger.snapshot())
    return seen


def test_a_clean_soaked_step_widens() -> None:
    judged = judge(Case(policy=ONLY_OUTCOME, step=SOAKED, outcomes=(clean(),)))
    assert judged.verdict is Verdict.WIDEN
    assert judged.sentence.startswith("WIDENED — 60 of 60 devices")


def test_what_is_lacking_names_the_hardware_that_lacks_it() -> None:
    outcomes = (
        replace(clean(2_000), hardware="hw3"),
        replace(clean(400), hardware="hw4", committed=370, failed=30),
    )
    step = replace(SOAKED, reporting=2_400, updated=2_400)
    patient = replace(ONLY_OUTCOME, engine=Engine(failed_budget=0.05))
    judged = judge(Case(policy=patient, step=step, outcomes=outcomes))
    assert judged.verdict is Verdict.WAIT
    assert "of hardware hw4 needed" in judged.sentence
    assert "(30 failed" in judged.sentence


@pytest.mark.parametrize(
    ("name", "value"),
    [("modest_ratio", 1.0), ("modest_ratio", math.nan), ("modest_weight", 1.5),
     ("modest_weight", -0.1), ("modest_weight", math.nan)],
)  # fmt: skip
def test_a_bet_that_is_none_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=r"modest|finite|number"):
        Engine(**{name: value})


def test_too_few_devices_wait_and_say_how_many_are_needed() -> None:
    step = replace(SOAKED, reporting=9, updated=9)
    judged = judge(Case(policy=ONLY_OUTCOME, step=step, outcomes=(clean(9),)))
    assert judged.verdict is Verdict.WAIT
    assert "9 of 44 devices needed" in judged.sentence


def test_the_soak_is_waited_for() -> None:
    judged = judge(Case(policy=ONLY_OUTCOME, step=replace(SOAKED, soaked=10), outcomes=(clean(),)))
    assert judged.verdict is Verdict.WAIT
    assert "soaked 10 s of 60 s" in judged.sentence


def test_too_few_reporting_wait() -> None:
    judged = judge(
        Case(policy=ONLY_OUTCOME, step=replace(SOAKED, reporting=40), outcomes=(clean(),))
    )
    assert judged.verdict is Verdict.WAIT
    assert judged.numbers["binding"] == "reporting"


def test_maximum_soak_without_proof_is_inconclusive() -> None:
    step = replace(SOAKED, soaked=600, reporting=9, updated=9)
    judged = judge(Case(policy=ONLY_OUTCOME, step=step, outcomes=(clean(9),)))
    assert judged.verdict is Verdict.INCONCLUSIVE


def test_maximum_soak_with_evidence_of_harm_waits_for_a_person() -> None:
    one = Outcome(wave=0, hardware="hw3", started=9, committed=8, failed=1)
    step = replace(SOAKED, soaked=600, reporting=8, updated=8)
    judged = judge(Case(policy=ONLY_OUTCOME, step=step, outcomes=(one,)))
    assert judged.verdict is Verdict.WAIT
    assert judged.numbers["page"] is True


def test_a_policy_with_update_ok_alone_can_roll_back() -> None:
    bad = Outcome(wave=0, hardware="hw3", started=10, committed=6, failed=4)
    judged = judge(Case(policy=ONLY_OUTCOME, step=SOAKED, outcomes=(bad,), commit="9c1f2abcd"))
    assert judged.verdict is Verdict.ROLL_BACK
    assert judged.sentence.startswith("ROLLED BACK — 4 of 10 devices failed")
    assert judged.sentence.endswith("by policy `plain`, commit 9c1f2ab")


def test_silence_counts_as_failure() -> None:
    gone = Outcome(wave=0, hardware="hw3", started=10, committed=6, silent=4)
    assert judge(Case(policy=ONLY_OUTCOME, step=SOAKED, outcomes=(gone,))).verdict is (
        Verdict.ROLL_BACK
    )


def test_silence_of_committed_devices_is_compared_with_control() -> None:
    quiet = Silence(wave=0, hardware="hw3", exposed=60, exposed_silent=20, control=300)
    outage = replace(quiet, control_silent=100)
    case = Case(policy=ONLY_OUTCOME, step=SOAKED, outcomes=(clean(),), silence=(quiet,))
    assert judge(case).verdict is Verdict.ROLL_BACK
    assert judge(replace(case, silence=(outage,))).verdict is Verdict.WAIT


def test_pending_is_success_for_rollback_and_failure_for_promotion() -> None:
    half = Outcome(wave=0, hardware="hw3", started=60, committed=30, pending=30)
    assert judge(Case(policy=ONLY_OUTCOME, step=SOAKED, outcomes=(half,))).verdict is Verdict.WAIT


def test_abort_failed_needs_count_and_share() -> None:
    bad = Outcome(wave=0, hardware="hw3", started=20, committed=18, failed=2)
    case = Case(policy=ONLY_OUTCOME, step=SOAKED, outcomes=(bad,), max_failed=0.2)
    assert judge(case).verdict is Verdict.WAIT
    brake = AbortFailed(count=2, share=0.1)
    assert judge(replace(case, abort_failed=brake)).verdict is Verdict.ROLL_BACK
    assert judge(replace(case, abort_failed=replace(brake, share=0.2))).verdict is Verdict.WAIT
    assert judge(replace(case, abort_failed=replace(brake, count=3))).verdict is Verdict.WAIT


def test_harm_in_one_hardware_is_not_diluted() -> None:
    good = Outcome(wave=0, hardware="a", started=2000, committed=2000)
    bad = Outcome(wave=0, hardware="b", started=20, committed=15, failed=5)
    assert judge(Case(policy=ONLY_OUTCOME, step=SOAKED, outcomes=(good, bad))).verdict is (
        Verdict.ROLL_BACK
    )


def test_hardware_with_too_few_devices_is_named_unproven() -> None:
    few = Outcome(wave=0, hardware="rare", started=3, committed=3)
    judged = judge(Case(policy=ONLY_OUTCOME, step=SOAKED, outcomes=(clean(), few)))
    assert judged.verdict is Verdict.WIDEN
    assert "unproven for want of devices: rare" in judged.sentence


def test_nothing_observed_never_passes() -> None:
    judged = judge(Case(policy=DRIVING, step=SOAKED, outcomes=(clean(),)))
    assert judged.verdict is Verdict.WAIT
    assert judged.numbers["binding"] == "disengagement"


@pytest.mark.parametrize("seed", range(5))
def test_a_six_fold_rise_in_a_canary_of_24_is_caught(seed: int) -> None:
    judged = []
    for seen in fleet(DRIVING, ratio=6, seed=seed, n1=24, n0=120):
        case = Case(policy=DRIVING, step=SOAKED, outcomes=(clean(24),), observations=seen)
        judged.append(judge(case))
    caught = [j for j in judged if j.verdict is Verdict.ROLL_BACK]
    assert caught
    assert caught[0].sentence.startswith("ROLLED BACK — disengagement")
    assert "control" in caught[0].sentence


def test_many_events_of_two_devices_are_two_observations() -> None:
    """A heavy-tailed fleet of 10: two busy devices beside eight silent ones prove nothing."""
    busy = levels.Sums(n=10, y=30, x=6, yy=2 * 15**2, xy=30 * 0.6, xx=3.6)
    control = levels.Sums(n=50, y=30, x=30, yy=60, xy=18, xx=18)
    even = levels.Sums(n=10, y=30, x=6, yy=10 * 3**2, xy=18, xx=3.6)
    scale = math.log(2)
    assert levels.harm(levels.repeat([(busy, control)], 10), scale) < 20
    assert levels.harm(levels.repeat([(even, control)], 10), scale) > 160


def test_harmless_small_fleets_are_not_rolled_back_under_peeking() -> None:
    wrong = 0
    for seed in range(100, 160):
        wrong += any(
            judge(
                Case(policy=DRIVING, step=SOAKED, outcomes=(clean(12),), observations=seen)
            ).verdict
            is Verdict.ROLL_BACK
            for seen in fleet(DRIVING, ratio=1, seed=seed)
        )
    assert wrong / 60 <= 0.05


def test_no_control_left_is_judged_by_the_budget() -> None:
    policy = Policy(name="b", gates=(replace(RATE, budget={"per_device_hour": 0.05}),))
    good = fleet(policy, ratio=0.01, seed=1, n0=0)[-1]
    bad = fleet(policy, ratio=40, seed=1, n0=0)[-1]
    case = Case(policy=policy, step=SOAKED, outcomes=(clean(),), observations=good)
    assert judge(case).verdict is Verdict.WIDEN
    assert judge(replace(case, observations=bad)).verdict is Verdict.ROLL_BACK


def test_a_dry_run_gate_is_shown_and_never_acted_on() -> None:
    policy = Policy(name="dry", gates=(replace(RATE, dry_run=True),))
    seen = fleet(policy, ratio=10, seed=2)[-1]
    judged = judge(Case(policy=policy, step=SOAKED, outcomes=(clean(),), observations=seen))
    assert judged.verdict is Verdict.WIDEN
    assert judged.numbers["guardrails"]["disengagement"]["harm"] > 20


@pytest.mark.parametrize(("hits", "verdict"), [(1, Verdict.WAIT), (2, Verdict.ROLL_BACK)])
def test_tripwire(hits: int, verdict: Verdict) -> None:
    policy = Policy(
        name="t", gates=(Gate(metric="disengagement", type=GateType.EVENT, tripwire_devices=2),)
    )
    ledger = Ledger(policy, tick=60)
    for i in range(5):
        ledger.enrol(exposed(f"car-{i}"))
        ledger.add([row(f"car-{i}", 1100, events=int(i < hits), attempt="a1", digest="new")])
    case = Case(policy=policy, step=SOAKED, outcomes=(clean(),), observations=ledger.snapshot())
    assert judge(case).verdict is verdict
    confirmed = replace(case, corroborated=("disengagement",))
    assert judge(confirmed).verdict is Verdict.ROLL_BACK


def test_replay_gives_the_same_verdict_and_a_changed_input_another() -> None:
    seen = fleet(DRIVING, ratio=6, seed=1)[-1]
    case = Case(policy=DRIVING, step=SOAKED, outcomes=(clean(12),), observations=seen)
    data = json.loads(json.dumps(case.to_json()))
    assert judge(Case.from_json(data)) == judge(case)
    for first in data["observations"]["metrics"]["disengagement"]["firsts"]:
        first["curve"] = first["curve"][::-1]
    data["observations"]["metrics"]["disengagement"]["repeats"] = []
    assert judge(Case.from_json(data)).verdict is not judge(case).verdict


def test_needed_says_what_a_clean_step_must_show() -> None:
    need = needed(DRIVING, StepLimits(margins={"ratio": 2}))
    assert need["failed"] == 44
    assert need["gates"]["disengagement"]["hours"] == pytest.approx(90, rel=0.1)
    assert needed(DRIVING, StepLimits(margins={"failed": 0.3, "lost": 0.3}))["devices"] <= 12


# -- the ledger -----------------------------------------------------------------------------------


def script() -> tuple[list[Enrolment], list[HealthRow]]:
    chance = random.Random(5)
    people = [exposed("a"), exposed("b"), control("c"), control("d"), control("e")]
    rows = []
    for who in people:
        for k in range(10):
            at = 500 + 100.0 * k
            under = who.arm == "exposed" and at > 1000
            rows.append(
                row(
                    who.device,
                    at,
                    events=chance.choice([0, 0, 1, 3]),
                    attempt="a1" if under else None,
                    digest="new" if under else "old",
                    seq=k,
                    level=chance.uniform(40, 60),
                )
            )
    return people, rows


LEVELS = Policy(name="l", gates=(*DRIVING.gates, Gate(metric="cabin_cpu", type=GateType.MEAN)))


@pytest.mark.parametrize("seed", range(5))
def test_order_of_arrival_is_irrelevant(seed: int) -> None:
    people, rows = script()
    one, other = Ledger(LEVELS, tick=60), Ledger(LEVELS, tick=60)
    for who in people:
        one.enrol(who)
    one.add(rows)
    one.censor("c", 1250)
    random.Random(seed).shuffle(rows)
    other.add(rows[:15])  # fewer than fix winsor limits
    for who in people:
        other.enrol(who)
    other.censor("c", 1250)
    for each in rows[15:]:
        other.add([each])
    # Sums of floats may differ in their last bit.
    assert flat(other.snapshot().to_json()) == pytest.approx(flat(one.snapshot().to_json()))


def flat(data: object) -> list[float]:
    if isinstance(data, dict):
        return [x for key in sorted(data) for x in flat(data[key])]
    if isinstance(data, list):
        return [x for item in data for x in flat(item)]
    return [float(data)] if isinstance(data, int | float) else []


def test_evidence_needs_the_attempt_and_the_digest() -> None:
    ledger = Ledger(DRIVING, tick=60)
    ledger.enrol(exposed("a"))
    ledger.add(
        [
            row("a", 1100, events=1, attempt="other", digest="new"),
            row("a", 1160, events=1, attempt="a1", digest="old", seq=1),
            row("a", 1220, events=1, attempt=None, digest="new", seq=2),
        ]
    )
    assert ledger.snapshot().metric("disengagement").firsts == ()


def test_only_the_first_event_of_a_device_counts() -> None:
    ledger = Ledger(DRIVING, tick=60)
    ledger.enrol(control("c"))
    ledger.add([row("c", 1100 + 60 * k, events=5, seq=k) for k in range(4)])
    seen = ledger.snapshot().metric("disengagement")
    assert sum(first.d0 for first in seen.firsts) == 1
    assert seen.totals[0].events == 20


def test_a_censored_device_counts_no_longer() -> None:
    ledger = Ledger(DRIVING, tick=60)
    ledger.enrol(control("c"))
    ledger.add([row("c", 1300, events=1)])
    ledger.censor("c", 1200)
    assert ledger.snapshot().metric("disengagement").firsts == ()


def test_merge_of_shards_is_everything_at_once() -> None:
    seen = [fleet(DRIVING, ratio=2, seed=s)[-1] for s in (1, 2)]
    together = merge(seen)
    engine = Engine()

    def curve(one: Observations) -> np.ndarray:
        firsts = one.metric("disengagement").firsts
        return sum((np.array(f.curve) for f in firsts), first_events.flat(engine))

    assert np.allclose(curve(together), curve(seen[0]) + curve(seen[1]))
    assert merge(seen).arms[0].enrolled == 2 * seen[0].arms[0].enrolled


def test_a_lying_clock_cannot_place_evidence_before_the_enrolment() -> None:
    ledger = Ledger(DRIVING, tick=60)
    ledger.enrol(exposed("a", since=1e9))
    lying = msgspec.structs.replace(
        row("a", 1e9 + 60, events=1, attempt="a1", digest="new"), t0=1e9 - 500_000
    )
    ledger.enrol(control("b", since=1e9))
    ledger.add([lying, row("b", 1e9 + 10)])
    (first,) = ledger.snapshot().metric("disengagement").firsts
    # Both were at risk in one tick: alone at its own time, the event would have said nothing.
    assert first.curve == pytest.approx(first_events.curve(Engine(), [(1, 0, 1, 1)]), abs=1e-6)


@pytest.mark.parametrize("damage", [{"step": None}, {"policy": {"name": 3}}, {"extra": 1}])
def test_damaged_cases_are_refused(damage: dict[str, object]) -> None:
    data = Case(policy=DRIVING, step=SOAKED).to_json() | damage
    with pytest.raises(ValueError, match="case"):
        Case.from_json(data)


@pytest.mark.parametrize(("shift", "verdict"), [(0.0, Verdict.WIDEN), (30.0, Verdict.ROLL_BACK)])
def test_a_level_is_compared_with_control_and_its_own_past(shift: float, verdict: Verdict) -> None:
    gate = Gate(metric="cabin_cpu", type=GateType.MEAN, margin=Margin(ratio=1.2))
    policy = Policy(name="cpu", gates=(gate,))
    chance = np.random.default_rng(4)
    ledger = Ledger(policy, tick=60)
    names = [f"car-{i:03d}" for i in range(72)]
    own = {name: float(chance.normal(50, 6)) for name in names}

    def hour(name: str, at: float, seq: int, extra: float) -> HealthRow:
        now = extra > -1 and name < "car-012"
        return row(
            name,
            at,
            seq=seq,
            attempt="a1" if now else None,
            digest="new" if now else "old",
            level=own[name] + float(chance.normal(0, 2)) + max(0.0, extra),
        )

    ledger.add([hour(name, 400 + 60 * k, k, -2) for name in names for k in range(5)])
    for name in names:
        ledger.enrol(exposed(name) if name < "car-012" else control(name))
    ledger.add(
        [
            hour(name, 1060 + 60 * k, 10 + k, shift if name < "car-012" else 0.0)
            for name in names
            for k in range(5)
        ]
    )
    case = Case(policy=policy, step=SOAKED, outcomes=(clean(),), observations=ledger.snapshot())
    assert judge(case).verdict is verdict


def test_enrolling_before_reading_as_after_a_restart_gives_the_same() -> None:
    people, rows = script()
    rows.sort(key=lambda each: each.received_at)
    live, restarted = Ledger(LEVELS), Ledger(LEVELS)
    live.add([each for each in rows if each.received_at < 1000])
    for who in people:
        live.enrol(who)
        restarted.enrol(who)
    live.add([each for each in rows if each.received_at >= 1000])
    restarted.add(rows)
    assert live.tick == restarted.tick == 150
    assert flat(live.snapshot().to_json()) == pytest.approx(flat(restarted.snapshot().to_json()))
