"""A planted error in each formula: sign, prior, missing censoring. Its oracle test must notice.

Each case replaces one function by one that errs in a way people err, and runs the test that guards
it. Were that test unable to fail, this one would. `docs/mutation.md` has the wider search.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from controller.rollout import cohort, controls, gate, holdout, power
from controller.rollout import hindsight as past
from telemetry import outcomes, poisson, risk
from telemetry.evidence import curves, first_events, fleetwide, ledger, levels, outcome

HERE = Path(__file__).parent
_loaded: dict[str, ModuleType] = {}


def oracle(file: str, name: str) -> Callable[..., Any]:
    """A test function of a neighbouring file."""
    if file not in _loaded:
        spec = importlib.util.spec_from_file_location(f"planted_{file}", HERE / f"test_{file}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        _loaded[file] = module
    found: Callable[..., Any] = getattr(_loaded[file], name)
    return found


def _scaled(module: ModuleType, name: str, by: Callable[[Any], Any]) -> Callable[..., Any]:
    right = getattr(module, name)
    return lambda *args, **more: by(right(*args, **more))


def _flat_prior(grid: Any, curve: Any, at_null: float, null: float, scale: float) -> float:
    above = grid > null * (1 + 1e-12)
    return curves._mixture(np.ones(int(above.sum())), curve[above] - at_null)


def _no_risk_set(engine: Any, ticks: Any) -> Any:
    """The censoring forgotten: every tick is compared as if nobody had left the risk set."""
    table = np.array(list(ticks), dtype=float).reshape(-1, 4)
    table[:, 2:] = 1e9
    return _CURVE(engine, table)


_CURVE = first_events.curve
_NEG = np.negative

# name, (module, function), the error, (file, test, arguments)
PLANTED: list[tuple[str, tuple[Any, str], Any, tuple[str, str, tuple[Any, ...]]]] = [
    (
        "K1: sign of the likelihood", (outcome, "curve"), _scaled(outcome, "curve", _NEG),
        ("evidence_curves", "test_outcome_curve_is_the_binomial_likelihood", ()),
    ),
    (
        "E: flat prior", (curves, "harm"), _flat_prior,
        ("evidence_curves", "test_first_event_evidence_matches_the_published_example", ()),
    ),
    (
        "K1: safe prior flat in log p", (curves, "flat_in_share"), curves.flat_in_log,
        ("evidence_curves", "test_44_clean_devices_refute_eight_percent", ()),
    ),
    (
        "K1: lower bound for an upper one", (outcome, "at_most"),
        _scaled(outcome, "at_most", lambda p: 1 - p),
        ("evidence_curves", "test_upper_bound_is_clopper_pearson", (2, 50)),
    ),
    (
        "K2: sign of the likelihood", (first_events, "curve"),
        _scaled(first_events, "curve", _NEG),
        ("evidence_curves", "test_first_event_evidence_matches_the_published_example", ()),
    ),
    (
        "K2: missing censoring", (first_events, "curve"), _no_risk_set,
        ("evidence_curves", "test_first_event_evidence_matches_the_published_example", ()),
    ),
    (
        "K2': sign of the exposure", (first_events, "budget_curve"),
        lambda engine, events, hours, budget: events * np.log(curves.ratio_grid(engine))
        + curves.ratio_grid(engine) * hours * budget,
        ("evidence_curves", "test_budget_curve_is_the_poisson_likelihood", ()),
    ),
    (
        "band: a narrower one", (curves, "band"),
        lambda grid, curve, level=0.05, prior=None: (curves.peak(grid, curve),) * 2,
        ("evidence_curves", "test_bands_cover_the_truth", (1.0,)),
    ),
    (
        "K3: the prior's factor 2 forgotten", (levels, "_evidence"),
        _scaled(levels, "_evidence", lambda e: e / 2),
        ("evidence_curves", "test_level_evidence_is_the_integral_over_its_prior", ()),
    ),
    (
        "K3: sign of the difference", (levels, "normal_of_t"),
        _scaled(levels, "normal_of_t", lambda z: -z),
        ("evidence_curves", "test_a_shifted_level_is_harm_and_an_equal_one_becomes_safe", ()),
    ),
    (
        "K3r: the bet's own cost forgotten", (levels, "harm_at"),
        lambda normal, rise: curves.bounded(rise * normal.s),
        ("evidence_levels", "test_a_bet_on_one_rise_is_an_e_value_and_the_best_one_there", (10.0,)),
    ),
    (
        "K3r: all scatter is taken as known", (levels, "_scatter"),
        lambda arm, usual: (usual.least(arm) / arm.y, 1e4),
        ("evidence_levels", "test_only_what_exceeds_poisson_has_few_degrees_of_freedom", ()),
    ),
    (
        "K3r: few devices believe themselves", (levels, "_scatter"),
        lambda arm, usual: (max(levels._clustered(arm), 1 / arm.y), 1e4),
        ("evidence_levels", "test_few_devices_lean_on_the_scatter_of_all", ()),
    ),
    (
        "K3r: a device's rate neither comes nor goes", (levels._Scatter, "least"),
        lambda self, arm: self.wide,
        ("evidence_levels", "test_few_devices_of_a_heavy_tailed_fleet_are_rarely_wrong", (4,)),
    ),
    (
        "K3r: safe without its margin", (levels, "_share"),
        lambda one, zero, rise: one.x / (one.x + zero.x),
        ("evidence_safe", "test_without_a_rise_it_is_the_likelihood_ratio_of_the_binomial", ()),
    ),
    (
        "K3r: half of the deviance", (levels, "_deviance"),
        _scaled(levels, "_deviance", lambda found: found / 2),
        ("evidence_safe", "test_at_the_margin_it_is_worth_one_on_average", (150, 5.0)),
    ),
    (
        "K3: normal instead of Student", (levels, "student_tail"),
        lambda t, df: 0.5 * math.erfc(t / math.sqrt(2)),
        ("evidence_curves", "test_student_tail_is_scipys", (2.0, 3)),
    ),
    (
        "fleet: strata unweighted", (fleetwide, "_strata"),
        lambda bands: {"0/hw": next(iter(fleetwide_strata(bands).values()))},
        ("fleetwide", "test_strata_are_weighted_by_the_fleet_and_its_exposure", ()),
    ),
    (
        "fleet: variance of messages", (fleetwide, "_variance"), lambda arm: arm.y / arm.x**2,
        ("fleetwide", "test_the_band_is_the_normal_mixture_around_it", ()),
    ),
    (
        "ledger: no censoring", (ledger.Ledger, "_censor"), lambda *args: None,
        ("gate", "test_a_censored_device_counts_no_longer", ()),
    ),
    (
        "ledger: any attempt counts", (ledger.Ledger, "_belongs"), lambda *args: True,
        ("gate", "test_evidence_needs_the_attempt_and_the_digest", ()),
    ),
    (
        "gate: silence is no failure", (gate, "_readings"),
        lambda case, *given: _READINGS(_unheard(case), *given),
        ("gate", "test_silence_counts_as_failure", ()),
    ),
    (
        "cohort: proportions rounded one by one", (cohort, "portions"),
        lambda sizes, n, lot: {k: round(n * s / max(1, sum(sizes.values()))) for k, s in
                               sizes.items()},
        ("cohort", "test_many_small_strata_do_not_starve_a_band", ()),
    ),
    (
        "cohort: the worst are drawn too", (cohort, "WORST"), 0.0,
        ("cohort", "test_hybrid_drops_the_worst_and_takes_half_from_the_top", ()),
    ),
    (
        "cohort: best last", (cohort, "_by_score"),
        lambda pool, seed: _BY_SCORE(pool, seed)[::-1],
        ("cohort", "test_best_first_takes_the_best_and_says_from_which_score_it_is_valid", ()),
    ),
    (
        "cohort: caps forgotten", (cohort, "_within_caps"), lambda c, chosen, order, n: chosen,
        ("cohort", "test_caps_hold_for_a_site_that_lies_in_wait", ()),
    ),
    (
        "controls: no floor", (controls, "_floor"), lambda *args: None,
        ("cohort", "test_no_control_below_a_declared_floor_ever", ()),
    ),
    (
        "controls: labels forgotten", (controls, "matches"), lambda *args: True,
        ("cohort", "test_labels_hold_for_the_controls_too_and_else_it_is_said", ()),
    ),
    (
        "holdout: the other share", (holdout, "chosen"),
        _scaled(holdout, "chosen", lambda held: not held),
        ("cohort", "test_a_holdout_is_a_fair_share_and_depends_on_the_seed", ()),
    ),
    (
        "score: Tesla's slope", (risk, "TESLA_SLOPE"), 22.0,
        ("score_risk", "test_the_published_example_of_hard_braking", ()),
    ),
    (
        "score: rates not shrunk", (risk, "SHRINK"), 1e-9,
        ("score_risk", "test_pif_shrinks_rates_and_is_relative_to_the_best_of_the_fleet", ()),
    ),
    (
        "regression: no penalty", (poisson, "_irls"),
        lambda z, y, offset, ridge: _IRLS(z, y, offset, 0.0),
        ("score_risk", "test_the_fit_is_the_minimum_of_the_penalised_deviance", ()),
    ),
    (
        "outcomes: the arms change places", (outcomes, "measure"),
        lambda aim, strata, against, engine: _MEASURE(aim, _swapped(strata), against, engine),
        ("outcomes", "test_a_benefit_is_found_with_its_band", ()),
    ),
    (
        "power: no spread between devices", (power._Arm, "made"),
        staticmethod(lambda n, names, shares, known, *more: _MADE(
            n, names, shares, dataclasses.replace(known, spread=0.0, rate=known.rate * 2), *more
        )),
        (
            "power", "test_power_agrees_with_another_simulator_within_five_points",
            (100, 500, 2.0, 300),
        ),
    ),
    (
        "hindsight: it knows the future", (past, "_until"),
        lambda rows, moments: ((([r for p in rows for r in p] if i == 0 else []), m)
                               for i, m in enumerate(moments)),
        ("hindsight", "test_no_look_knows_more_than_had_arrived", ()),
    ),
]  # fmt: skip

fleetwide_strata = fleetwide._strata
_READINGS, _BY_SCORE, _IRLS = gate._readings, cohort._by_score, poisson._irls
_MEASURE, _MADE = outcomes.measure, power._Arm.made


def _unheard(case: gate.Case) -> gate.Case:
    deaf = tuple(dataclasses.replace(one, silent=0, lost=0) for one in case.outcomes)
    return dataclasses.replace(case, outcomes=deaf)


def _swapped(strata: Any) -> list[Any]:
    return [dataclasses.replace(s, treated=s.control, control=s.treated) for s in strata]


def forget() -> None:
    """Nothing that was computed before an error may hide it."""
    for module in (first_events, outcome):
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()
    power._known.clear()


@pytest.mark.parametrize(
    ("where", "error", "guard"),
    [pytest.param(where, error, guard, id=name) for name, where, error, guard in PLANTED],
)
def test_a_planted_error_is_noticed(
    where: tuple[Any, str],
    error: Any,
    guard: tuple[str, str, tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file, name, arguments = guard
    test = oracle(file, name)
    forget()
    monkeypatch.setattr(*where, error)
    bound = [m for m in _loaded.values() if getattr(m, where[1], None) is not None]
    for module in bound:  # names that the test file imported for itself
        if getattr(module, where[1]) is not error and where[0] is not ledger.Ledger:
            monkeypatch.setattr(module, where[1], error)
    try:
        with pytest.raises((AssertionError, ArithmeticError, ValueError, RuntimeWarning)):
            test(*arguments)
    finally:
        forget()


def test_the_guards_pass_without_an_error() -> None:
    for file, name, arguments in {guard for *_, guard in PLANTED}:
        if file != "power":  # slow, and run by itself
            oracle(file, name)(*arguments)
