"""A draw out of a large fleet keeps what a draw keeps: proportions, chances, the same tomorrow."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from controller.manifests.kinds import Cohort
from controller.rollout import pool as pools
from controller.rollout.cohort import Candidate, choose, choose_of_many, portions, rank
from controller.rollout.model import Device
from controller.rollout.pool import Pool

PINNED = ["d-00050", "d-00005", "d-00056", "d-00022", "d-00013", "d-00009"]
CANARY = Cohort.model_validate({"name": "canary", "select": {"mode": "stratified"}})


def fleet(n: int, sites: int = 1) -> list[Candidate]:
    return [
        Candidate(
            device=Device(
                id=f"d-{i:05d}",
                fleet="f",
                labels={"hardware": f"hw{i % 3}", "site": f"s{i % sites}"},
                status="active",
            ),
            score=None if i % 50 == 0 else float(i % 101),
            band=-1 if i % 50 == 0 else i % 5,
        )
        for i in range(n)
    ]


def ids(found: list[Candidate]) -> list[str]:
    return [c.device.id for c in found]


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> list[Candidate]:
    """Every pool is a large one."""
    monkeypatch.setattr("controller.rollout.cohort.MANY", 10)
    return fleet(3_000)


def test_each_stratum_gives_its_share(many: list[Candidate]) -> None:
    drawn = choose(CANARY, many, 300, "seed")
    whole, part = Counter(c.stratum for c in many), Counter(c.stratum for c in drawn)
    quota = portions(dict(whole), 300, rank("seed", "start"))
    assert part == {key: n for key, n in quota.items() if n}
    assert len(set(ids(drawn))) == len(drawn) == 300


def test_the_same_fleet_and_seed_draw_the_same_whatever_the_order(many: list[Candidate]) -> None:
    one = ids(choose(CANARY, many, 200, "seed"))
    assert ids(choose(CANARY, many[::-1], 200, "seed")) == one
    assert ids(choose(CANARY, many, 200, "another")) != one


def test_these_devices_are_drawn_today_and_in_every_later_version() -> None:
    """A draw is history: whoever changes the hash changes who was in it."""
    found = ids(choose_of_many(Pool.of(fleet(60)), 6, "0123abcd"))
    assert found == PINNED


def test_every_device_has_the_same_chance(many: list[Candidate]) -> None:
    columns, hits = Pool.of(many), Counter[str]()
    for run in range(300):
        hits.update(ids(choose_of_many(columns, 300, f"run {run}")))
    counts = np.array([hits[c.device.id] for c in many])
    # Binomial(300, 0.1): mean 30, deviation 5.2. The variance of 3,000 of them is near 27.
    assert counts.mean() == pytest.approx(30)
    assert 23 < counts.var() < 31
    assert counts.min() > 5
    assert counts.max() < 60


def test_two_seeds_draw_independently_of_each_other(many: list[Candidate]) -> None:
    columns = Pool.of(many)
    shared = []
    for run in range(60):
        one = set(ids(choose_of_many(columns, 300, f"{run}/0")))
        other = set(ids(choose_of_many(columns, 300, f"{run}/1")))
        shared.append(len(one & other))
    assert np.mean(shared) == pytest.approx(30, abs=3)


def test_ranks_are_uniform_and_their_bits_even() -> None:
    ranks = Pool.of(fleet(20_000)).ranks("seed")
    assert len(set(ranks.tolist())) == len(ranks)
    for bit in (0, 1, 31, 32, 62, 63):
        share = float(((ranks >> np.uint64(bit)) & np.uint64(1)).mean())
        assert share == pytest.approx(0.5, abs=0.02)


def test_labels_to_spread_over_are_strata_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("controller.rollout.cohort.MANY", 10)
    spread = CANARY.model_copy(update={"spread": ("site",)})
    drawn = choose(spread, fleet(3_000, sites=4), 400, "seed")
    found = Counter(c.device.labels["site"] for c in drawn)
    assert all(abs(n - 100) <= 25 for n in found.values())
    assert set(found) == {"s0", "s1", "s2", "s3"}


def test_small_fleets_are_drawn_as_they_always_were() -> None:
    """The hash of columns begins above a size that no recorded draw of today has."""
    everybody = fleet(300)
    assert len(everybody) < pools.MANY
    drawn = choose(CANARY, everybody, 30, "seed")
    lowest: dict[object, list[Candidate]] = {}
    for c in sorted(everybody, key=lambda c: rank("seed", c.device.id)):
        lowest.setdefault(c.stratum, []).append(c)
    for key, n in Counter(c.stratum for c in drawn).items():
        assert {c.device.id for c in drawn if c.stratum == key} == set(ids(lowest[key][:n]))
