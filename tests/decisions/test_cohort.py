"""Who goes first, who is compared with them, and what the comparison may claim."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from controller.manifests.kinds import Cohort
from controller.rollout import controls, holdout
from controller.rollout.cohort import Candidate, assign, choose, draw, halves, portions
from controller.rollout.model import Device
from telemetry.policy import Engine

ENGINE = Engine()


def cohort(mode: str = "stratified", **more: object) -> Cohort:
    select: dict[str, object] = {"mode": mode}
    if "score" in more:
        select["score"] = more.pop("score")
    if "labels" in more:
        select["matchLabels"] = more.pop("labels")
    return Cohort.model_validate({"name": "canary", "select": select, **more})


def rest() -> Cohort:
    return Cohort.model_validate({"name": "general", "rest": True})


def fleet(n: int = 1000, seed: int = 1, **labels: int) -> list[Candidate]:
    """n devices of two kinds of hardware with uniform scores; labels: name → how many values."""
    dice = np.random.default_rng(seed)
    scores = dice.uniform(0, 100, n).round(3)
    order = np.argsort(np.argsort(scores))
    found = []
    for i in range(n):
        own = {"hardware": "hw3" if dice.random() < 0.7 else "hw4"}
        own |= {name: f"{name}-{dice.integers(many)}" for name, many in labels.items()}
        device = Device(id=f"d-{i:05d}", fleet="f", labels=own, status="active")
        band = int(order[i] * 5 // n)
        found.append(Candidate(device=device, score=float(scores[i]), band=band))
    return found


def ids(candidates: object) -> set[str]:
    return {c.device.id for c in candidates}  # type: ignore[attr-defined]


# -- the draw -------------------------------------------------------------------------------------


def test_stratified_is_proportional_over_band_and_hardware() -> None:
    everybody = fleet(1000)
    drawn = draw(cohort(), inside=everybody, already=frozenset(), percent=0.1, seed="s")
    assert len(drawn.exposed) == 100
    whole, chosen = Counter(c.stratum for c in everybody), Counter(c.stratum for c in drawn.exposed)
    for stratum, n in whole.items():
        assert abs(chosen[stratum] - n / 10) < 1
    bands = Counter(c.band for c in drawn.exposed)
    assert all(abs(bands[b] - 20) <= 1 for b in range(5))


def test_many_small_strata_do_not_starve_a_band() -> None:
    everybody = fleet(1000, site=40)
    drawn = draw(
        cohort(spread=["site"]), inside=everybody, already=frozenset(), percent=0.1, seed="s"
    )
    bands = Counter(c.band for c in drawn.exposed)
    assert len(drawn.exposed) == 100
    assert all(abs(bands[b] - 20) <= 1 for b in range(5))


def test_every_device_has_the_same_chance() -> None:
    everybody = fleet(60)
    hits: Counter[str] = Counter()
    for run in range(2000):
        hits.update(ids(choose(cohort(), everybody, 6, f"run {run}")))
    shares = np.array([hits[c.device.id] / 2000 for c in everybody])
    # Binomial with p = 0.1: standard deviation 0.0067; 4.5 of them, 60 devices.
    assert np.abs(shares - 0.1).max() < 0.0302


@pytest.mark.parametrize(("n", "lot"), [(0, 0), (1, 7), (13, 99), (100, 2**63)])
def test_portions_add_up_and_stay_within_one(n: int, lot: int) -> None:
    sizes = {("a", i): size for i, size in enumerate([1, 5, 0, 40, 3, 51, 7, 1])}
    found = portions(sizes, n, lot)
    assert sum(found.values()) == n
    whole = sum(sizes.values())
    assert all(abs(found[key] - n * size / whole) < 1 for key, size in sizes.items())
    assert portions({}, 3, 1) == {}


def test_hybrid_drops_the_worst_and_takes_half_from_the_top() -> None:
    everybody = fleet(1000)
    worst = ids(sorted(everybody, key=lambda c: c.score or 0)[:100])
    drawn = draw(cohort("hybrid"), inside=everybody, already=frozenset(), percent=0.1, seed="s")
    bands = Counter(c.band for c in drawn.exposed)
    assert not ids(drawn.exposed) & worst
    assert bands[4] == 50
    # 100, 200, 200, 200 devices are left of the other bands, in proportion.
    assert [bands[b] for b in range(4)] == pytest.approx([50 / 7, 100 / 7, 100 / 7, 100 / 7], abs=1)


def test_hybrid_takes_everybody_in_the_end() -> None:
    everybody = fleet(200)
    first = draw(cohort("hybrid"), inside=everybody, already=frozenset(), percent=0.95, seed="s")
    assert len(first.exposed) == 190
    last = draw(
        cohort("hybrid"), inside=everybody, already=frozenset(ids(first.exposed)), percent=1,
        seed="t",
    )  # fmt: skip
    assert ids(first.exposed) | ids(last.exposed) == ids(everybody)


def test_best_first_takes_the_best_and_says_from_which_score_it_is_valid() -> None:
    everybody = fleet(1000)
    best = sorted(everybody, key=lambda c: -(c.score or 0))[:50]
    drawn = draw(
        cohort("best_first"), inside=everybody, already=frozenset(), percent=0.05, seed="s"
    )
    assert ids(drawn.exposed) == ids(best)
    assert drawn.valid_from == best[-1].score


def test_best_first_is_for_the_first_wave_alone_and_the_second_holds_every_band() -> None:
    everybody = fleet(1000)
    first = draw(
        cohort("best_first"), inside=everybody, already=frozenset(), percent=0.05, seed="s"
    )
    second = draw(
        cohort("best_first"), inside=everybody, already=frozenset(ids(first.exposed)),
        percent=0.07, seed="t", first=False, every_band=True,
    )  # fmt: skip
    bands = Counter(c.band for c in second.exposed)
    assert second.valid_from is None
    assert all(bands[b] >= 20 for b in range(5))
    assert not ids(first.exposed) & ids(second.exposed)


def test_a_small_band_keeps_half_of_itself_as_control_and_is_named() -> None:
    everybody = [c for c in fleet(1000) if c.band > 0] + [c for c in fleet(1000) if c.band == 0][:9]
    drawn = draw(
        rest(), inside=everybody, already=frozenset(), percent=0.05, seed="t", first=False,
        every_band=True,
    )  # fmt: skip
    assert Counter(c.band for c in drawn.exposed)[0] == 5
    assert any("band 0" in warning for warning in drawn.warnings)


def test_caps_hold_for_a_site_that_lies_in_wait() -> None:
    everybody = fleet(1000, site=3, batch=50)
    capped = cohort(caps={"site": "40%", "batch": "3%"}, limit=100)
    chosen = assign([capped, rest()], everybody, "s")["canary"]
    sites = Counter(c.device.labels["site"] for c in chosen)
    batches = Counter(c.device.labels["batch"] for c in chosen)
    assert len(chosen) == 100
    assert max(sites.values()) <= 40
    assert max(batches.values()) <= 3


def test_a_cap_that_leaves_places_empty_says_so() -> None:
    everybody = fleet(1000, site=2)
    drawn = draw(
        cohort(caps={"site": "10%"}), inside=everybody, already=frozenset(), percent=0.1, seed="s"
    )
    assert len(drawn.exposed) == 20
    assert drawn.warnings == ("caps left 80 of 100 places empty",)


def test_the_same_seed_gives_the_same_members_whatever_the_order() -> None:
    everybody = fleet(500, site=5)
    kinds = [cohort("hybrid", limit=80, spread=["site"], caps={"site": "30%"}), rest()]
    one = assign(kinds, everybody, "seed")
    two = assign(kinds, everybody[::-1], "seed")
    assert {k: ids(v) for k, v in one.items()} == {k: ids(v) for k, v in two.items()}
    other = assign(kinds, everybody, "another seed")
    assert ids(one["canary"]) != ids(other["canary"])


def test_a_later_score_moves_no_drawn_member() -> None:
    everybody = fleet(300)
    kinds = [cohort("best_first", limit=20), rest()]
    before = assign(kinds, everybody, "seed")
    drawn = dict.fromkeys(ids(before["canary"]), "canary")
    upside_down = [
        Candidate(device=c.device, score=100 - (c.score or 0), band=4 - c.band) for c in everybody
    ]
    after = assign(kinds, upside_down, "seed", drawn)
    assert ids(after["canary"]) == set(drawn)


def test_every_device_is_in_exactly_one_cohort() -> None:
    unscored = [Candidate(device=c.device, score=None, band=-1) for c in fleet(40, seed=9)]
    named = [
        Candidate(device=Device(id=f"u-{i}", fleet="f", labels={}, status="active"), score=None,
                  band=-1)
        for i in range(len(unscored))
    ]  # fmt: skip
    everybody = fleet(300) + named
    kinds = [
        Cohort.model_validate({"name": "a", "select": {"score": {"min": 90}}, "limit": 7}),
        Cohort.model_validate({"name": "b", "select": {"score": {"min": 50}}}),
        rest(),
    ]
    found = assign(kinds, everybody, "s")
    assert sum(len(members) for members in found.values()) == len(everybody)
    assert ids(named) <= ids(found["general"])
    assert all((c.score or 0) >= 90 for c in found["a"])


def test_halves_are_disjoint_and_whole() -> None:
    one, other = halves(fleet(41), "s")
    assert len(one) == 21
    assert len(other) == 20
    assert not ids(one) & ids(other)


# -- controls -------------------------------------------------------------------------------------


def matched(kind: Cohort, percent: float, everybody: list[Candidate], **more: object):  # type: ignore[no-untyped-def]
    drawn = draw(kind, inside=everybody, already=frozenset(), percent=percent, seed="s")
    taken = ids(drawn.exposed)
    found = controls.match(
        kind, drawn.exposed, [c for c in everybody if c.device.id not in taken], "s",
        engine=ENGINE, best_first=drawn.valid_from is not None, **more,
    )  # fmt: skip
    return drawn, found


@pytest.mark.parametrize("mode", ["stratified", "hybrid", "best_first"])
def test_controls_are_of_the_same_strata_up_to_five_each(mode: str) -> None:
    everybody = fleet(2000)
    drawn, found = matched(cohort(mode), 0.05, everybody)
    one, zero = Counter(c.stratum for c in drawn.exposed), Counter(c.stratum for c in found.chosen)
    assert not ids(drawn.exposed) & ids(found.chosen)
    assert set(zero) == set(one)
    assert all(zero[s] <= 5 * n for s, n in one.items())
    assert found == matched(cohort(mode), 0.05, everybody[::-1])[1]


def test_hybrid_controls_have_the_same_floor() -> None:
    everybody = fleet(1000)
    drawn, found = matched(cohort("hybrid"), 0.1, everybody)
    floor = min(c.score for c in drawn.exposed)
    assert found.floor == floor
    assert min(c.score for c in found.chosen) >= floor


def test_no_control_below_a_declared_floor_ever() -> None:
    """All of the best are updated: comparing them with the others would hide a doubled rate."""
    everybody = fleet(500)
    kind = cohort("best_first", score={"min": 90})
    inside = assign([kind, rest()], everybody, "s")["canary"]
    drawn = draw(kind, inside=inside, already=frozenset(), percent=1, seed="s")
    free = [c for c in everybody if c.device.id not in ids(drawn.exposed)]
    found = controls.match(kind, drawn.exposed, free, "s", engine=ENGINE, best_first=True)
    assert found.chosen == ()
    assert found.warnings == (
        "no control with a score of 90 or more is left: judged by absolute budgets only",
    )


def test_best_first_controls_are_the_next_best_of_their_band() -> None:
    everybody = fleet(1000)
    _, found = matched(cohort("best_first"), 0.02, everybody)
    rank = {c.device.id: i for i, c in enumerate(sorted(everybody, key=lambda c: -(c.score or 0)))}
    assert len(found.chosen) == 100
    assert max(rank[c.device.id] for c in found.chosen) < 160


def test_the_cap_of_controls_cuts_every_stratum_alike() -> None:
    everybody = fleet(3000)
    drawn = draw(cohort(), inside=everybody, already=frozenset(), percent=0.1, seed="s")
    free = [c for c in everybody if c.device.id not in ids(drawn.exposed)]
    small = Engine(controls_cap=300)
    found = controls.match(cohort(), drawn.exposed, free, "s", engine=small)
    bands = Counter(c.band for c in found.chosen)
    assert len(found.chosen) == 300
    assert all(abs(bands[b] - 60) <= 2 for b in range(5))


def test_labels_hold_for_the_controls_too_and_else_it_is_said() -> None:
    everybody = fleet(1000, ring=4)
    kind = cohort(labels={"ring": "ring-1"})
    inside = assign([kind, rest()], everybody, "s")["canary"]
    half = draw(kind, inside=inside, already=frozenset(), percent=0.2, seed="s")
    free = [c for c in everybody if c.device.id not in ids(half.exposed)]
    found = controls.match(kind, half.exposed, free, "s", engine=ENGINE)
    assert all(c.device.labels["ring"] == "ring-1" for c in found.chosen)
    assert not found.warnings
    whole = draw(kind, inside=inside, already=frozenset(), percent=1, seed="s")
    free = [c for c in everybody if c.device.id not in ids(whole.exposed)]
    found = controls.match(kind, whole.exposed, free, "s", engine=ENGINE)
    assert found.chosen
    assert "own rule" in found.warnings[0]


def test_controls_of_an_earlier_wave_are_taken_over_only_where_there_are_too_few() -> None:
    everybody = fleet(1000)
    _, first = matched(cohort(), 0.02, everybody)
    serving = frozenset(ids(first.chosen))
    drawn, second = matched(cohort(), 0.05, everybody, serving=serving)
    assert not ids(second.chosen) & serving
    drawn, third = matched(cohort(), 0.5, everybody, serving=frozenset(ids(everybody)))
    one, zero = Counter(c.stratum for c in drawn.exposed), Counter(c.stratum for c in third.chosen)
    assert all(zero[s] <= n for s, n in one.items())


def test_a_thin_band_is_warned_about() -> None:
    everybody = [c for c in fleet(600) if c.band != 1] + [c for c in fleet(600) if c.band == 1][:8]
    _, found = matched(cohort(), 0.1, everybody)
    assert any(w.startswith("band 1") and "fewer than 5" in w for w in found.warnings)


# -- holdout --------------------------------------------------------------------------------------


def test_a_holdout_is_a_fair_share_and_depends_on_the_seed() -> None:
    names = [f"d-{i}" for i in range(20_000)]
    held = [name for name in names if holdout.chosen("seed", name, 0.05)]
    assert abs(len(held) - 1000) < 4.5 * math.sqrt(20_000 * 0.05 * 0.95)
    assert held != [name for name in names if holdout.chosen("other", name, 0.05)]
    assert not any(holdout.chosen("seed", name, 0.0) for name in names)
    assert all(holdout.chosen("seed", name, 1.0) for name in names)
