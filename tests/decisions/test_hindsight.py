"""A policy tried on the past, the paragraph of a verdict, and what other methods would say."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from scipy import stats
from typer.testing import CliRunner

from controller.cli import replay as command
from controller.rollout.explaining import paragraph
from controller.rollout.gate import Case, Outcome, StepLimits, Verdict, judge
from controller.rollout.hindsight import Past, Recorded, again, compared, retry, told
from telemetry.evidence import rivals
from telemetry.evidence.ledger import Enrolment, Ledger
from telemetry.evidence.rivals import Look, compare
from telemetry.policy import UPDATE_OK, Gate, GateType, Margin, Policy
from telemetry.report import HealthRow

START, HOURS = 1_000_000.0, 24
THEN = Policy(name="then", gates=(Gate(metric=UPDATE_OK, type=GateType.PROPORTION),))
BRAKING = Gate(metric="braking", type=GateType.RATE, margin=Margin(ratio=1.5))
STRICT = Policy(name="strict", gates=(*THEN.gates, BRAKING))
TRIPWIRE = Policy(
    name="wire", gates=(*THEN.gates, Gate(metric="crash", type=GateType.EVENT, tripwire_devices=2))
)
STEP = StepLimits(name="canary", min_soak=86_400, max_soak=None, reporting=40, updated=40)


def rows(ratio: float, crash_at: int = 99) -> list[HealthRow]:
    dice = np.random.default_rng(4)
    found = []
    for hour in range(-48, HOURS):
        for i in range(240):
            treated = i < 40 and hour >= 0
            count = int(dice.poisson(0.05 * (ratio if treated else 1.0)))
            counters = {"braking": count} if count else {}
            if treated and hour == crash_at and i < 2:
                counters["crash"] = 1
            at = START + hour * 3600
            found.append(
                HealthRow(
                    batch=len(found) + 1, device=f"d-{i:03d}", received_at=at + 3600, boot="b",
                    seq=hour + 100, attempt="a" if treated else None,
                    components={"app": "new" if treated else "old"}, t0=at, seconds=3600.0,
                    levels={}, counters=counters, exposure={"device_hour": 1.0},
                )
            )  # fmt: skip
    return found


def enrolled() -> tuple[Enrolment, ...]:
    return tuple(
        Enrolment(
            device=f"d-{i:03d}", arm="exposed" if i < 40 else "control", wave=0, hardware="hw3",
            band=0, since=START, attempt="a" if i < 40 else None,
            digests={"app": "new"} if i < 40 else {},
        )
        for i in range(240)
    )  # fmt: skip


def past(verdicts: tuple[tuple[float, str], ...] = ((1.0, "wait"), (24.0, "wait"))) -> Past:
    case = Case(
        policy=THEN,
        step=STEP,
        outcomes=(Outcome(wave=0, hardware="hw3", started=40, committed=40),),
    )
    recorded = tuple(
        Recorded(
            at=START + hour * 3600, verdict=verdict, sentence="…",
            case=replace(case, step=replace(STEP, soaked=hour * 3600)),
        )
        for hour, verdict in verdicts
    )  # fmt: skip
    return Past(
        name="cars", release="app-2", opened_at=START, finished_at=START + 25 * 3600,
        enrolled=enrolled(), recorded=recorded,
    )  # fmt: skip


def pages(found: list[HealthRow], size: int) -> list[list[HealthRow]]:
    return [found[i : i + size] for i in range(0, len(found), size)]


def test_a_policy_that_listens_would_have_rolled_back_and_says_when() -> None:
    looks = retry(past(), pages(rows(6.0), 500), STRICT)
    lines = told(past(), looks)
    back = next(look for look in looks if look.judgement.verdict is Verdict.ROLL_BACK)
    assert START < back.at < START + 24 * 3600
    assert "ROLLED BACK — braking" in lines[0]
    assert lines[1].startswith("the policy in force then never rolled back")
    late = past(((1.0, "wait"), (23.5, "roll_back")))
    assert "earlier than it was" in told(late, looks)[1]


def test_a_harmless_past_is_not_rolled_back() -> None:
    looks = retry(past(), pages(rows(1.0), 500), STRICT)
    assert all(look.judgement.verdict is not Verdict.ROLL_BACK for look in looks)
    assert told(past(), looks)[0].startswith("it would have waited to the end")


def test_a_tripwire_is_tried_at_the_hour_of_the_crash() -> None:
    looks = retry(past(), pages(rows(1.0, crash_at=10), 500), TRIPWIRE)
    back = next(look for look in looks if look.judgement.verdict is Verdict.ROLL_BACK)
    assert 11 <= (back.at - START) / 3600 <= 11.5


def test_no_look_knows_more_than_had_arrived() -> None:
    everything = rows(6.0)
    looks = retry(past(), pages(everything, 500), STRICT)
    for look in looks[:: len(looks) // 8]:
        cut = [row for row in everything if row.received_at <= look.at]
        ledger = Ledger(STRICT)
        for one in enrolled():
            ledger.enrol(one)
        ledger.add(cut)
        alone = {t.arm: t.events for t in ledger.snapshot().metric("braking").totals}
        seen = {t.arm: t.events for t in look.case.observations.metric("braking").totals}
        assert seen == alone


def test_the_size_of_the_pages_does_not_matter() -> None:
    small, large = (retry(past(), pages(rows(3.0), size), STRICT) for size in (7, 5000))
    assert [s.judgement.sentence for s in small] == [b.judgement.sentence for b in large]


def test_a_metric_that_nobody_reported_is_said_to_be_unobserved() -> None:
    absent = Policy(name="x", gates=(*THEN.gates, Gate(metric="unheard", type=GateType.RATE)))
    lines = told(past(), retry(past(), pages(rows(1.0), 500), absent))
    assert lines[-1] == "unheard: no message carried it; it was not observed"


def test_when_the_messages_are_gone_the_recorded_observations_speak() -> None:
    seen = retry(past(), pages(rows(6.0), 5000), STRICT)[-1].case.observations
    known = past()
    kept = tuple(replace(one, case=replace(one.case, observations=seen)) for one in known.recorded)
    looks = retry(replace(known, recorded=kept), [], STRICT)
    assert looks[-1].judgement.verdict is Verdict.ROLL_BACK
    assert looks[-1].case.observations == seen


def test_a_past_without_verdicts_has_nothing_to_judge() -> None:
    empty = replace(past(), recorded=())
    assert retry(empty, [], STRICT) == []
    assert told(empty, []) == []
    assert again(empty, STRICT) == []


# -- the command ----------------------------------------------------------------------------------


@pytest.fixture
def app() -> typer.Typer:
    made = typer.Typer()
    command.register(made)
    made.command("other")(lambda: None)
    return made


def exported(tmp_path: Path) -> Path:
    bad = Outcome(wave=0, hardware="hw3", started=60, committed=57, failed=3)
    case = Case(policy=THEN, step=STEP, outcomes=(bad,))
    judged = judge(case)
    row = {
        "id": "01", "at": "2026-01-01T00:00:00.000Z", "kind": "verdict", "inputs": case.to_json(),
        "verdict": str(judged.verdict), "sentence": judged.sentence, "numbers": judged.numbers,
    }  # fmt: skip
    file = tmp_path / "past.json"
    about = {"name": "cars", "release": "app-2"}
    file.write_text(json.dumps({"v": 1, "rollout": about, "decisions": [row]}))
    return file


POLICY = """\
apiVersion: bellwether.dev/v1
kind: HealthPolicy
metadata: {name: nervous}
spec:
  gates: [{metric: update_ok, type: proportion}]
  engine: {alpha: "0.5"}
"""


def test_the_command_tries_a_policy_on_exported_decisions(app: typer.Typer, tmp_path: Path) -> None:
    file, policy = exported(tmp_path), tmp_path / "nervous.yaml"
    policy.write_text(POLICY)
    found = CliRunner().invoke(app, ["replay", str(file), "--policy", str(policy)])
    assert found.exit_code == 0
    assert "cars → app-2 under nervous" in found.stdout
    assert "ROLLED BACK" in found.stdout
    as_json = CliRunner().invoke(
        app, ["replay", str(file), "--policy", str(policy), "--output", "json"]
    )
    data = json.loads(as_json.stdout)
    assert data["looks"][0]["verdict"] == "roll_back"
    assert {row["method"] for row in data["compare"]} == set(rivals.METHODS)


@pytest.mark.parametrize(
    "text", ["", "kind: Nothing", POLICY + "---\n" + POLICY, POLICY.replace("0.5", "nan"), "\0"]
)
def test_a_hostile_policy_is_refused(app: typer.Typer, tmp_path: Path, text: str) -> None:
    policy = tmp_path / "p.yaml"
    policy.write_text(text)
    found = CliRunner().invoke(app, ["replay", str(exported(tmp_path)), "--policy", str(policy)])
    assert found.exit_code != 0
    assert "Failed" in repr(found.exception)


@pytest.mark.parametrize("text", ["[]", "{}", '{"decisions": [{"id": 1}]}', '{"decisions": 3}'])
def test_a_hostile_export_is_refused(app: typer.Typer, tmp_path: Path, text: str) -> None:
    file, policy = tmp_path / "e.json", tmp_path / "p.yaml"
    file.write_text(text)
    policy.write_text(POLICY)
    found = CliRunner().invoke(app, ["replay", str(file), "--policy", str(policy)])
    assert found.exit_code != 0


# -- the paragraph --------------------------------------------------------------------------------


def decision(policy: Policy = STRICT, ratio: float = 6.0) -> dict[str, Any]:
    look = retry(past(), pages(rows(ratio), 5000), policy)[-1]
    data: dict[str, Any] = json.loads(
        json.dumps(
            {
                "verdict": str(look.judgement.verdict),
                "sentence": look.judgement.sentence,
                "numbers": look.judgement.numbers,
                "inputs": look.case.to_json(),
            }
        )
    )
    return data


def test_the_paragraph_says_what_a_release_manager_asks() -> None:
    text = paragraph(decision(), "app-2")
    assert text.startswith("ROLLED BACK app-2 after 25 h of soak, step 1 (canary).")
    assert "updated devices had one, against" in text
    assert "(same score bands, same hours)" in text
    assert "95 % always-valid range" in text
    assert "times better explained by “harmful” than by “no change”" in text
    assert "the limit is 20" in text
    assert "Other guardrails: update ok 0/40 (ok)" in text
    assert "For the whole fleet that is" in text


def test_a_waiting_paragraph_says_what_is_missing() -> None:
    text = paragraph(decision(THEN, 1.0))
    assert text.startswith("WAITING")
    assert "Still missing: " in text


def test_a_decision_without_numbers_has_its_sentence() -> None:
    assert paragraph({"verdict": "drawn", "sentence": "12 drawn", "numbers": {}}) == "12 drawn"


@pytest.mark.parametrize("hole", ["harm", "estimate", "band", "counts", "weight"])
def test_numbers_that_are_missing_break_no_paragraph(hole: str) -> None:
    found = decision()
    for rail in found["numbers"]["guardrails"].values():
        rail[hole] = None
    assert paragraph(found)


# -- rivals ---------------------------------------------------------------------------------------


def look(at: float, **more: float) -> Look:
    values: dict[str, Any] = {
        "wave": 0, "group": 100, "failed": 0, "timed_out": 0, "finished": 100, **more,
    }  # fmt: skip
    return Look(at=at, **values)


def stops(looks: list[Look]) -> dict[str, float | None]:
    return {said.method: said.at for said in compare(looks)}


def test_shares_of_failures() -> None:
    found = stops([look(1, failed=2), look(2, failed=3), look(3, failed=6), look(4, failed=51)])
    assert found["hawkBit > 2 %"] == 2
    assert found["hawkBit > 5 %"] == 3
    assert found["hawkBit > 50 %"] == 4
    assert found["AWS abort ≥ 2 %"] == 1
    assert found["AWS abort ≥ 5 %"] == 3


def test_only_aws_sees_what_timed_out_and_waits_for_twenty() -> None:
    found = stops([look(1, timed_out=15, finished=19), look(2, timed_out=15, finished=20)])
    assert found["hawkBit > 2 %"] is None
    assert found["AWS abort ≥ 2 %"] == 2


def test_argo_stops_at_the_fourth_bad_interval() -> None:
    looks = [
        look(i, events=2.0 * i, exposure=10.0 * i, control_events=1.0 * i,
             control_exposure=10.0 * i)
        for i in range(1, 8)
    ]  # fmt: skip
    assert stops(looks)["Argo ratio > 1.5"] == 5


def test_per_message_is_the_z_test() -> None:
    one = look(1, events=30, exposure=100, control_events=20, control_exposure=100)
    z = (30 - 25) / math.sqrt(50 * 0.25)
    assert stats.norm.sf(z) > 0.05
    assert stops([one])["per message z"] is None
    assert stops([replace(one, events=40)])["per message z"] == 1


def test_mann_whitney_is_scipys() -> None:
    dice = np.random.default_rng(1)
    for _ in range(20):
        a, b = dice.integers(0, 6, 12).tolist(), dice.integers(0, 5, 9).tolist()
        expected = stats.mannwhitneyu(a, b, alternative="greater", method="asymptotic").pvalue
        assert rivals._mann_whitney(a, b) == pytest.approx(expected)


def test_kayenta_needs_its_intervals_and_an_effect() -> None:
    def series(n: int, ratio: float) -> list[Look]:
        dice = np.random.default_rng(3)
        one, zero = dice.poisson(40 * ratio, n).cumsum(), dice.poisson(40, n).cumsum()
        return [
            look(i, events=float(one[i]), exposure=10.0 * (i + 1), control_events=float(zero[i]),
                 control_exposure=10.0 * (i + 1))
            for i in range(n)
        ]  # fmt: skip

    assert stops(series(8, 2.0))["Kayenta Mann-Whitney"] is None
    assert stops(series(9, 2.0))["Kayenta Mann-Whitney"] == 8
    assert stops(series(20, 1.1))["Kayenta Mann-Whitney"] is None


def test_comparing_runs_on_the_tried_looks() -> None:
    looks = retry(past(), pages(rows(6.0), 500), STRICT)
    found = {said.method: said for said in compared(past(), looks)}
    assert found["per message z"].stops
    assert not found["hawkBit > 50 %"].stops
