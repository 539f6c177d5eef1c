"""Decides who goes first: which cohort a device is in, and whom a step draws.

Pure: devices and scores in, names out; chance is a stable hash seeded after the commit, so that
the same fleet, scores and commit give the same wave tomorrow in the post-mortem, and no device can
choose to be in it.

Rules, in order:

1. Cohorts are matched in order, the first match wins; `rest` takes what is left.
2. An unscored device matches no score bound: it belongs to `rest`.
3. A `limit` keeps the best (best_first) or a stratified draw; the others go to the next match.
4. A step's percent is cumulative in its cohort; whoever is a member already counts for it.
5. `stratified` draws in proportion over score quintile × hardware (and `spread` labels);
   `best_first` by score; `hybrid` drops the worst tenth, half from the top band, half stratified.
6. Controls are drawn at the same moment with the same seed and the same floor, from devices that
   are not updated: up to five per exposed device, stratum by stratum.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TypeVar

from controller.manifests.kinds import Cohort
from controller.rollout.model import Device

CONTROLS_PER_DEVICE = 5
MOST_CONTROLS = 5_000
_TOP_BAND = 4
K = TypeVar("K")


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A device as the draw sees it. `score` None: not enough history. `band` −1: unscored."""

    device: Device
    score: float | None
    band: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    exposed: tuple[Candidate, ...]
    control: tuple[Candidate, ...]
    size: int  # the cohort's size now
    warnings: tuple[str, ...] = ()


def rank(seed: str, name: str) -> int:
    """A stable, uniform number for (seed, name)."""
    return int.from_bytes(blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest())


def assign(
    cohorts: Sequence[Cohort], candidates: Iterable[Candidate], seed: str
) -> dict[str, list[Candidate]]:
    """Cohort name → its devices now; every candidate is in exactly one."""
    left = sorted(candidates, key=lambda c: c.device.id)
    members: dict[str, list[Candidate]] = {}
    for cohort in cohorts:
        fits = [c for c in left if cohort.rest or _matches(cohort, c)]
        if cohort.limit is not None and len(fits) > cohort.limit:
            fits = _choose(cohort, fits, cohort.limit, f"{seed}/limit/{cohort.name}")
        taken = {c.device.id for c in fits}
        left = [c for c in left if c.device.id not in taken]
        members[cohort.name] = fits
    return members


def draw(
    cohort: Cohort,
    *,
    inside: Sequence[Candidate],
    everybody: Sequence[Candidate],
    already: frozenset[str],
    percent: float,
    seed: str,
    whole: int | None = None,
) -> Draw:
    """Whom a step exposes and who is its control.

    `inside` are the cohort's devices that may take the release, `everybody` all that may serve as
    control, `already` the ids exposed by earlier steps, `percent` the cumulative share 0…1.
    """
    size = len(inside) if whole is None else whole
    wanted = math.ceil(percent * size - 1e-9) - sum(c.device.id in already for c in inside)
    free = [c for c in inside if c.device.id not in already]
    exposed = _choose(cohort, free, max(0, wanted), f"{seed}/expose")
    taken = already | {c.device.id for c in exposed}
    control = controls(cohort, exposed, [c for c in everybody if c.device.id not in taken], seed)
    return Draw(
        exposed=tuple(exposed),
        control=tuple(control),
        size=size,
        warnings=tuple(_warnings(exposed, control)),
    )


def controls(
    cohort: Cohort, exposed: Sequence[Candidate], free: Sequence[Candidate], seed: str
) -> list[Candidate]:
    """Not-updated devices for comparison: per stratum, five per exposed device where there are."""
    floor = cohort.select.score.min if cohort.select and cohort.select.score else None
    pools: dict[tuple[int, str], list[Candidate]] = defaultdict(list)
    for c in free:
        if floor is None or (c.score is not None and c.score >= floor):
            pools[(c.band, c.device.hardware)].append(c)
    if not any(pools.values()):
        # The whole floor is updated: any not-yet-updated device of the same hardware is better
        # than none; the gate then compares within hardware and says so.
        for c in free:
            pools[(-2, c.device.hardware)].append(c)
        wanted = _count((-2, c.device.hardware) for c in exposed)
    else:
        wanted = _count((c.band, c.device.hardware) for c in exposed)
    chosen: list[Candidate] = []
    for stratum, n in sorted(wanted.items()):
        pool = sorted(pools[stratum], key=lambda c: rank(f"{seed}/control", c.device.id))
        chosen += pool[: n * CONTROLS_PER_DEVICE]
    return chosen[:MOST_CONTROLS]


def halves(candidates: Sequence[Candidate], seed: str) -> tuple[list[Candidate], list[Candidate]]:
    """Split at random into (first step, control): how a fix meets who ran the fault."""
    order = sorted(candidates, key=lambda c: rank(f"{seed}/halves", c.device.id))
    middle = (len(order) + 1) // 2
    return order[:middle], order[middle:]


def _matches(cohort: Cohort, candidate: Candidate) -> bool:
    select = cohort.select
    if select is None:
        return False
    if not select.labels.matches(candidate.device.labels):
        return False
    if select.score is None:
        return True
    if candidate.score is None:
        return False
    low, high = select.score.min, select.score.max
    return (low is None or candidate.score >= low) and (high is None or candidate.score <= high)


def _choose(cohort: Cohort, pool: Sequence[Candidate], n: int, seed: str) -> list[Candidate]:
    if n >= len(pool):
        return list(pool)
    mode = cohort.select.mode if cohort.select else "stratified"
    if mode == "best_first":
        return sorted(pool, key=lambda c: (-_score(c), rank(seed, c.device.id)))[:n]
    if mode == "hybrid":
        kept = sorted(pool, key=lambda c: (-_score(c), rank(seed, c.device.id)))
        kept = kept[: max(n, math.ceil(len(kept) * 0.9))]
        top = [c for c in kept if c.band == _TOP_BAND]
        first = _stratified(cohort, top, min(len(top), n // 2), seed)
        ids = {c.device.id for c in first}
        rest = [c for c in kept if c.device.id not in ids]
        return first + _stratified(cohort, rest, n - len(first), seed)
    return _stratified(cohort, pool, n, seed)


def _stratified(cohort: Cohort, pool: Sequence[Candidate], n: int, seed: str) -> list[Candidate]:
    """n of the pool, in proportion over the strata; largest remainders decide the odd ones."""
    if n <= 0:
        return []
    strata: dict[tuple[object, ...], list[Candidate]] = defaultdict(list)
    for c in pool:
        labels = tuple(c.device.labels.get(label, "") for label in cohort.spread)
        strata[(c.band, c.device.hardware, *labels)].append(c)
    shares = {key: n * len(group) / len(pool) for key, group in strata.items()}
    quota = {key: int(share) for key, share in shares.items()}
    by_remainder = sorted(strata, key=lambda key: (quota[key] - shares[key], rank(seed, repr(key))))
    for key in by_remainder[: n - sum(quota.values())]:
        quota[key] += 1
    chosen: list[Candidate] = []
    for key in sorted(strata, key=repr):
        group = sorted(strata[key], key=lambda c: rank(seed, c.device.id))
        chosen += group[: quota[key]]
    return chosen


def _warnings(exposed: Sequence[Candidate], control: Sequence[Candidate]) -> Iterable[str]:
    if exposed and not control:
        yield "no control is left: judged by absolute budgets only"
        return
    arms = _count(c.band for c in exposed), _count(c.band for c in control)
    for band in sorted(arms[0]):
        if arms[0][band] < 5 or arms[1].get(band, 0) < 5:
            yield f"band {band}: fewer than 5 devices in an arm"


def _count(keys: Iterable[K]) -> dict[K, int]:
    return dict(Counter(keys))


def _score(candidate: Candidate) -> float:
    return -math.inf if candidate.score is None else candidate.score


def scored(
    devices: Iterable[Device], scores: Mapping[str, tuple[float | None, int]]
) -> list[Candidate]:
    """Devices with their (score, band); unknown to the score: unscored."""
    return [
        Candidate(
            device=d, score=scores.get(d.id, (None, -1))[0], band=scores.get(d.id, (None, -1))[1]
        )
        for d in devices
    ]
