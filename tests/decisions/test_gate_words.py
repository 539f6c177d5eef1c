"""The words of a verdict carry the right numbers: what a release manager reads is tested too."""

from __future__ import annotations

import math

import numpy as np
import pytest

from controller.rollout import gate
from controller.rollout.gate import Case, Outcome, StepLimits, Verdict, judge
from telemetry.evidence import curves, first_events, outcome
from telemetry.policy import UPDATE_OK, Engine, Gate, GateType, Policy

ENGINE = Engine()
PLAIN = (Gate(metric=UPDATE_OK, type=GateType.PROPORTION),)
SHOWN = Gate(metric="cabin", type=GateType.MEAN, dry_run=True)


def case(**more: object) -> Case:
    step = StepLimits(
        name="canary", min_soak=60, max_soak=600, soaked=5400, reporting=196, updated=196
    )
    values: dict[str, object] = {
        "policy": Policy(name="p", gates=(*PLAIN, SHOWN)),
        "step": step,
        "outcomes": (Outcome(wave=0, hardware="hw3", started=200, committed=199, failed=1),),
        **more,
    }  # fmt: skip
    return Case(**values)  # type: ignore[arg-type]


def test_a_widened_step_says_how_many_how_sure_and_against_which_limit() -> None:
    found = judge(case())
    assert found.verdict is Verdict.WIDEN
    _, high = outcome.band(ENGINE, 1, 200)
    assert found.sentence == (
        f"WIDENED — 199 of 200 devices updated and heard, at most {high * 100:.3g} % failed or "
        "lost, limit 10 %; soaked 90 min"
    )
    assert "cabin" not in found.sentence  # a dry-run gate is shown in the numbers alone


def test_hardware_without_enough_devices_is_named() -> None:
    few = tuple(Outcome(wave=0, hardware=name, started=3, committed=3) for name in ("hw1", "hw2"))
    many = Outcome(wave=0, hardware="hw3", started=200, committed=200)
    found = judge(case(outcomes=(many, *few)))
    assert found.verdict is Verdict.WIDEN
    assert "; unproven for want of devices: hw1, hw2; soaked" in found.sentence
    assert found.numbers["unproven"] == ["hw1", "hw2"]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0, "0 s"), (119.0, "119 s"), (120.0, "2 min"), (7199.0, "120 min"), (7200.0, "2 h"),
        (172_799.0, "48 h"), (172_800.0, "2 d"), (259_200.0, "3 d"),
    ],
)  # fmt: skip
def test_spans_are_told_in_the_unit_that_a_person_would_use(seconds: float, words: str) -> None:
    assert gate._span(seconds) == words


def test_best_first_is_labelled_in_every_verdict() -> None:
    best = StepLimits(
        name="canary", min_soak=60, soaked=90, reporting=196, updated=196, valid_from=97.5
    )
    assert judge(case(step=best)).sentence.endswith("; best first: valid for scores ≥ 97.5")
    broken = (Outcome(wave=0, hardware="hw3", started=200, failed=60, committed=140),)
    back = judge(case(step=best, outcomes=broken, commit="abcdef0123"))
    assert "; best first: valid for scores ≥ 97.5; by policy `p`, commit abcdef0" in back.sentence
    assert back.numbers["valid_from"] == 97.5


def test_harm_against_a_budget_is_the_mixture_over_rates_above_it() -> None:
    grid = curves.ratio_grid(ENGINE)
    above = grid > 1 + 1e-12
    prior = np.exp(-0.5 * (np.log(grid[above]) / math.log(2)) ** 2)
    events, expected = 9.0, 4.0
    ratio = np.exp(events * np.log(grid[above]) - expected * (grid[above] - 1))
    truth = float((prior * ratio).sum() / prior.sum())
    assert first_events.budget_harm(ENGINE, events, 100.0, 0.04) == pytest.approx(truth)
