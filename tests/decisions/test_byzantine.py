"""Canaries that lie: inflating, hiding, colluding, silent; through ledger and gate.

A device controls what it says, not who it is, when it is drawn, how often it counts, or whether the
server hears it. 100 canaries, 300 controls, one metric at 0.02 events per hour, 48 hours.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pytest

from controller.manifests.kinds import Cohort
from controller.rollout.cohort import Candidate, assign
from controller.rollout.gate import Case, Judgement, Outcome, Silence, StepLimits, Verdict, judge
from controller.rollout.model import Device
from telemetry.evidence.ledger import Enrolment, Ledger
from telemetry.policy import UPDATE_OK, Gate, GateType, Margin, Policy
from telemetry.report import HealthRow

N, CONTROLS, HOURS, EVERY = 100, 300, 48, 6
RATE = 0.02
POLICY = Policy(
    name="p",
    gates=(
        Gate(metric=UPDATE_OK, type=GateType.PROPORTION),
        Gate(metric="braking", type=GateType.RATE, margin=Margin(ratio=1.5)),
        Gate(metric="crash", type=GateType.EVENT, tripwire_devices=2),
    ),
)
STEP = StepLimits(name="canary", min_soak=86_400, max_soak=172_800, updated=N)


@dataclass(frozen=True, kw_only=True)
class Attack:
    """What the first `liars` canaries do, and what the release really does to all."""

    liars: int = 0
    inflate: int = 0  # events that a liar claims in each message
    crash: bool = False  # a liar claims a crash
    failed: bool = False  # a liar claims that its update failed
    harm: float = 1.0  # the true ratio of rates
    broken: float = 0.0  # the true share of updates that fail
    mute: float = 0.0  # share of canaries that are hurt, and fall silent at once


def run(attack: Attack, seed: int, policy: Policy = POLICY) -> list[Judgement]:
    """The gate's word at every look."""
    dice = np.random.default_rng(seed)
    names = [f"d-{i:03d}" for i in range(N + CONTROLS)]
    liar = np.arange(N + CONTROLS) < attack.liars
    canary = np.arange(N + CONTROLS) < N
    mute = canary & (dice.random(N + CONTROLS) < attack.mute)
    fails = canary & ~liar & (dice.random(N + CONTROLS) < attack.broken)
    if attack.failed:
        fails |= liar
    own = dice.gamma(2.0, 0.5, N + CONTROLS) * RATE
    ledger = Ledger(policy, tick=3600.0 * EVERY)
    for i, name in enumerate(names):
        ledger.enrol(
            Enrolment(
                device=name, arm="exposed" if canary[i] else "control", wave=0, hardware="hw",
                band=0, since=0.0, attempt="a" if canary[i] else None,
            )
        )  # fmt: skip
    said = []
    for look in range(1, HOURS // EVERY + 1):
        at = look * EVERY * 3600.0
        counts = dice.poisson(own * EVERY * np.where(canary, attack.harm, 1.0))
        counts = np.where(liar, attack.inflate, counts)
        ledger.add(
            HealthRow(
                batch=look, device=names[i], received_at=at, boot="b", seq=look,
                attempt="a" if canary[i] else None, components={}, t0=at - 3600.0 * EVERY,
                seconds=3600.0 * EVERY, levels={}, exposure={"device_hour": float(EVERY)},
                counters={"braking": int(counts[i]), "crash": int(liar[i] and attack.crash)},
            )
            for i in range(N + CONTROLS)
            if not (mute[i] or fails[i])
        )  # fmt: skip
        silent, failed = int((mute & ~fails).sum()), int(fails.sum())
        outcome = Outcome(
            wave=0, hardware="hw", started=N, failed=failed, committed=N - failed,
        )  # fmt: skip
        quiet = Silence(
            wave=0, hardware="hw", exposed=N - failed, exposed_silent=silent, control=CONTROLS
        )
        step = replace(STEP, soaked=at, reporting=N - silent - failed, updated=N - failed)
        said.append(
            judge(
                Case(
                    policy=policy, step=step, outcomes=(outcome,), silence=(quiet,),
                    observations=ledger.snapshot(),
                )
            )
        )  # fmt: skip
    return said


def ends(attack: Attack, seed: int) -> Verdict:
    """The first word that is not "wait"; what stands at the end otherwise."""
    for judgement in run(attack, seed):
        if judgement.verdict in (Verdict.WIDEN, Verdict.ROLL_BACK):
            return judgement.verdict
    return Verdict.WAIT


def tally(attack: Attack, runs: int = 10) -> Counter[Verdict]:
    return Counter(ends(attack, seed) for seed in range(runs))


def test_without_liars_a_good_release_widens_and_a_bad_one_does_not() -> None:
    assert tally(Attack())[Verdict.WIDEN] >= 9
    assert tally(Attack(harm=4.0))[Verdict.ROLL_BACK] >= 9


def test_six_of_a_hundred_that_hide_cannot_widen_a_bad_release() -> None:
    assert tally(Attack(liars=6, harm=4.0))[Verdict.WIDEN] == 0
    # They claim a good update while 15 % of the others fail to boot.
    assert tally(Attack(liars=6, broken=0.15))[Verdict.WIDEN] == 0
    assert tally(Attack(liars=6, harm=3.0, broken=0.1))[Verdict.WIDEN] == 0


@pytest.mark.parametrize(
    "attack",
    [
        Attack(liars=1, inflate=1_000_000_000),
        Attack(liars=1, failed=True),
        Attack(liars=1, crash=True),
        Attack(liars=1, inflate=1_000_000_000, failed=True),
    ],
)
def test_one_of_a_hundred_cannot_roll_a_good_release_back(attack: Attack) -> None:
    found = tally(attack)
    assert found[Verdict.ROLL_BACK] == 0


def test_a_single_crash_asks_a_person_and_stops_nothing_for_good() -> None:
    last = run(Attack(liars=1, crash=True), seed=1)[-1]
    assert last.verdict is Verdict.WAIT
    assert last.numbers["page"] is True
    assert "a person decides" in last.sentence


def test_a_billion_events_of_one_device_are_one_bounded_vote() -> None:
    loud = run(Attack(liars=1, inflate=1_000_000_000), seed=3)[-1].numbers["guardrails"]["braking"]
    calm = run(Attack(liars=1, inflate=1), seed=3)[-1].numbers["guardrails"]["braking"]
    assert loud["harm"] <= 4 * max(calm["harm"], 1.0)
    assert loud["estimate"] < 1.3 * calm["estimate"]


@pytest.mark.parametrize("share", [0.15, 0.3, 0.6])
def test_the_silence_of_the_hurt_never_widens(share: float) -> None:
    """Those that the release hurts say nothing: no event of theirs is ever counted."""
    found = tally(Attack(mute=share, harm=3.0))
    assert found[Verdict.WIDEN] == 0
    assert tally(Attack(mute=share))[Verdict.WIDEN] == 0


def test_silence_of_all_is_no_success() -> None:
    assert tally(Attack(mute=1.0), runs=3)[Verdict.WIDEN] == 0


def test_colluders_of_one_batch_are_capped_and_cannot_choose_to_be_drawn() -> None:
    """6 % of the fleet came in one batch; a cap leaves it 3 % of the canary."""
    devices = [
        Candidate(
            device=Device(
                id=f"d-{i:04d}", fleet="f", status="active",
                labels={"hardware": "hw", "batch": "bought" if i < 60 else f"batch-{i % 40}"},
            ),
            score=100.0 if i < 60 else 80.0 + i % 10, band=4 if i < 60 else i % 5,
        )
        for i in range(1000)
    ]  # fmt: skip
    shares = []
    for seed in range(30):
        for caps, most in (({}, 100), ({"batch": "3%"}, 3)):
            cohort = Cohort.model_validate(
                {"name": "canary", "select": {"mode": "stratified"}, "limit": 100, "caps": caps}
            )
            rest = Cohort.model_validate({"name": "rest", "rest": True})
            drawn = assign([cohort, rest], devices, f"seed {seed}")["canary"]
            bought = sum(c.device.labels["batch"] == "bought" for c in drawn)
            assert bought <= most
            if not caps:
                shares.append(bought / len(drawn))
    # Perfect scores buy no place: their share of the draw is their share of the fleet.
    assert abs(sum(shares) / len(shares) - 0.06) < 0.02
