"""Recorded decisions judged again: same inputs, same verdict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from controller.cli import replay as command
from controller.rollout.gate import Case, Outcome, StepLimits, judge
from controller.rollout.replay import Unreadable, exported, replay
from telemetry.policy import Gate, GateType, Policy


def recorded() -> dict[str, Any]:
    case = Case(
        policy=Policy(name="p", gates=(Gate(metric="update_ok", type=GateType.PROPORTION),)),
        step=StepLimits(min_soak=60, soaked=60, reporting=60, updated=60),
        outcomes=(Outcome(wave=0, hardware="a", started=60, committed=60),),
    )
    judged = judge(case)
    row = {
        "id": "01",
        "kind": "verdict",
        "verdict": str(judged.verdict),
        "sentence": judged.sentence,
        "inputs": case.to_json(),
        "numbers": judged.numbers,
        "term": 3,
    }
    data: dict[str, Any] = json.loads(json.dumps(exported([row])))
    return data


def test_the_same_inputs_give_the_same_verdict() -> None:
    (one,) = replay(recorded())
    assert one.same
    assert one.sentence.startswith("SAME — widen")


def test_a_changed_input_gives_another_verdict() -> None:
    data = recorded()
    outcome = data["decisions"][0]["inputs"]["outcomes"][0]
    outcome["committed"], outcome["failed"] = 40, 20
    (one,) = replay(data)
    assert not one.same
    assert "judged now roll_back" in one.sentence


def test_a_changed_number_is_noticed() -> None:
    data = recorded()
    data["decisions"][0]["numbers"]["harm"] += 1
    assert not replay(data)[0].same


@pytest.mark.parametrize(
    "data",
    [
        None,
        3,
        [1],
        {},
        {"decisions": [{"kind": "verdict", "inputs": {"policy": 1}}]},
        {
            "decisions": [
                {"kind": "verdict", "inputs": {"step": {}, "policy": {"name": "x"}, "z": 1}}
            ]
        },
    ],
)
def test_what_is_no_export_is_refused(data: object) -> None:
    with pytest.raises(Unreadable):
        replay(data)


def test_the_command_exits_1_when_a_verdict_differs(tmp_path: Path) -> None:
    app = typer.Typer()
    command.register(app)
    app.command("other")(lambda: None)
    file = tmp_path / "decisions.json"
    data = recorded()
    file.write_text(json.dumps(data))
    assert CliRunner().invoke(app, ["replay", str(file)]).exit_code == 0
    data["decisions"][0]["inputs"]["outcomes"][0] |= {"committed": 40, "failed": 20}
    file.write_text(json.dumps(data))
    assert CliRunner().invoke(app, ["replay", str(file), "--output", "json"]).exit_code == 1
    file.write_text("[" * 100_000)
    assert CliRunner().invoke(app, ["replay", str(file)]).exit_code == 1
