"""Decides who goes first: which cohort a device is in, and whom a step draws.

Pure: devices and scores in, names out; chance is a stable hash seeded after the commit, so that
the same fleet, scores and commit give the same wave tomorrow in the post-mortem, and no device can
choose to be in it. Who serves as control is decided by `controls`.

Rules, in order:

1. Who was drawn from a cohort stays in it. The others match in order, the first match wins; `rest`
   takes what is left. An unscored device matches no score bound.
2. A `limit` keeps so many, chosen by the cohort's mode; the others go to the next match.
3. A step's percent is cumulative in its cohort; whoever is a member already counts for it.
4. `stratified`: in proportion over score quintile × hardware (× `spread` labels), every device with
   the same chance. `hybrid`: without the worst tenth, half from the top band, half in proportion
   over the other bands. `best_first`: by score, in the first wave alone; what it shows is valid for
   such scores, says so, and the next wave holds 20 devices of every band (half of a band under 40).
5. `caps`: at most this share of a draw from one value of a label (model, site, enrolment batch),
   so that a few that lie or break together do not speak for the fleet.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from controller.manifests.kinds import Cohort, Mode
from controller.rollout.model import Device
from controller.rollout.pool import MANY, Pool

TOP_BAND = 4
WORST = 0.1  # of a hybrid cohort, never drawn before all are
AFTER_BEST = 20  # devices of every band in the wave after a best_first one

Stratum = tuple[object, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A device as the draw sees it. `score` None: not enough history. `band` −1: unscored."""

    device: Device
    score: float | None
    band: int

    @property
    def stratum(self) -> tuple[int, str]:
        return self.band, self.device.hardware


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    exposed: tuple[Candidate, ...]
    size: int  # the cohort's size now
    valid_from: float | None = None  # best_first: what is seen is valid for scores from here on
    warnings: tuple[str, ...] = ()
    columns: bool = False  # ranked by the hash of columns (`pool`), not one by one


def rank(seed: str, name: str) -> int:
    """A stable, uniform number of 64 bits for (seed, name)."""
    return int.from_bytes(blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest())


def assign(
    cohorts: Sequence[Cohort],
    candidates: Iterable[Candidate],
    seed: str,
    drawn: Mapping[str, str] | None = None,
) -> dict[str, list[Candidate]]:
    """Cohort name → its devices now; every candidate is in exactly one.

    `drawn`: device → the cohort that it was drawn from; a later score does not move it.
    """
    placed = drawn or {}
    left = sorted(candidates, key=lambda c: c.device.id)
    members: dict[str, list[Candidate]] = {}
    for cohort in cohorts:
        kept = [c for c in left if placed.get(c.device.id) == cohort.name]
        fits = [
            c for c in left if c.device.id not in placed and (cohort.rest or matches(cohort, c))
        ]
        if cohort.limit is not None and len(kept) + len(fits) > cohort.limit:
            room = max(0, cohort.limit - len(kept))
            fits = choose(cohort, fits, room, f"{seed}/limit/{cohort.name}")
        members[cohort.name] = sorted(kept + fits, key=lambda c: c.device.id)
        taken = {c.device.id for c in members[cohort.name]}
        left = [c for c in left if c.device.id not in taken]
    return members


def draw(
    cohort: Cohort,
    *,
    inside: Sequence[Candidate],
    already: frozenset[str],
    percent: float,
    seed: str,
    whole: int | None = None,
    first: bool = True,
    every_band: bool = False,
) -> Draw:
    """Whom a step exposes.

    `inside` are the cohort's devices that may take the release, `already` the ids exposed by
    earlier steps, `percent` the cumulative share 0…1 of `whole` (default: those inside). `first`:
    this is the rollout's first wave; `every_band`: it follows a best_first one.
    """
    size = len(inside) if whole is None else whole
    wanted = math.ceil(percent * size - 1e-9) - sum(c.device.id in already for c in inside)
    free = [c for c in inside if c.device.id not in already]
    mode = _mode(cohort)
    if mode is Mode.BEST_FIRST and not first:
        mode = Mode.STRATIFIED
    exposed = choose(cohort, free, max(0, wanted), f"{seed}/expose", mode=mode)
    warnings: list[str] = []
    if len(exposed) < min(wanted, len(free)):
        missing = min(wanted, len(free)) - len(exposed)
        warnings.append(f"caps left {missing} of {wanted} places empty")
    if every_band and wanted > 0:
        exposed = exposed + _top_up(free, exposed, seed)
        warnings += _thin_bands(exposed)
    best = mode is Mode.BEST_FIRST and 0 < len(exposed) < len(free)
    scores = [c.score for c in exposed if c.score is not None]
    return Draw(
        exposed=tuple(exposed),
        size=size,
        valid_from=min(scores) if best and scores else None,
        warnings=tuple(warnings),
        columns=_by_columns(cohort, mode, free),
    )


def choose(
    cohort: Cohort, pool: Sequence[Candidate], n: int, seed: str, *, mode: Mode | None = None
) -> list[Candidate]:
    """n of the pool by the cohort's mode, within its caps; fewer where the caps leave none."""
    if n >= len(pool):
        return list(pool)
    mode = _mode(cohort) if mode is None else mode
    if _by_columns(cohort, mode, pool):
        return choose_of_many(Pool.of(pool, cohort.spread), n, seed)
    if mode is Mode.BEST_FIRST:
        chosen = _by_score(pool, seed)[:n]
    elif mode is Mode.HYBRID:
        chosen = _hybrid(cohort, pool, n, seed)
    else:
        chosen = _stratified(cohort, pool, n, seed)
    order = _by_score(pool, seed) if mode is Mode.BEST_FIRST else _by_rank(pool, seed)
    return _within_caps(cohort, chosen, order, n)


def _by_columns(cohort: Cohort, mode: Mode, pool: Sequence[Candidate]) -> bool:
    return mode is Mode.STRATIFIED and not cohort.caps and len(pool) > MANY


def choose_of_many(pool: Pool, n: int, seed: str) -> list[Candidate]:
    """n of a large pool, stratified: in proportion over its strata, by rank in each."""
    quota = portions(pool.sizes, n, rank(seed, "start"))
    return list(pool.first(quota, seed))


def halves(candidates: Sequence[Candidate], seed: str) -> tuple[list[Candidate], list[Candidate]]:
    """Split at random into (first step, control): how a fix meets who ran the fault."""
    order = _by_rank(candidates, f"{seed}/halves")
    middle = (len(order) + 1) // 2
    return order[:middle], order[middle:]


def portions(sizes: Mapping[Stratum, int], n: int, lot: int) -> dict[Stratum, int]:
    """n shared out in proportion to the sizes: each within 1, and so is every run of the order.

    Systematic sampling with one random start (Madow 1949): a band of many small strata gets its
    share, where rounding each by itself would leave it none. `lot` is any whole number.
    """
    total = sum(sizes.values())
    start = lot % total if total else 0
    found, reached = {}, 0
    for key in sorted(sizes, key=repr):
        before = (n * reached + start) // total if total else 0
        reached += sizes[key]
        found[key] = ((n * reached + start) // total if total else 0) - before
    return found


def matches(cohort: Cohort, candidate: Candidate) -> bool:
    """Does the cohort's own rule (labels and score) take this device? `rest` has no rule."""
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


def _mode(cohort: Cohort) -> Mode:
    return cohort.select.mode if cohort.select else Mode.STRATIFIED


def _hybrid(cohort: Cohort, pool: Sequence[Candidate], n: int, seed: str) -> list[Candidate]:
    order = _by_score(pool, seed)
    kept = order[: max(n, math.ceil(len(order) * (1 - WORST)))]
    top = [c for c in kept if c.band == TOP_BAND]
    others = [c for c in kept if c.band != TOP_BAND]
    # Where one half is too small, the other one takes its places.
    from_top = min(len(top), max(n // 2, n - len(others)))
    return _stratified(cohort, top, from_top, f"{seed}/top") + _stratified(
        cohort, others, n - from_top, seed
    )


def _stratified(cohort: Cohort, pool: Sequence[Candidate], n: int, seed: str) -> list[Candidate]:
    strata: dict[Stratum, list[Candidate]] = defaultdict(list)
    for c in pool:
        labels = tuple(c.device.labels.get(label, "") for label in cohort.spread)
        strata[(*c.stratum, *labels)].append(c)
    sizes = {key: len(group) for key, group in strata.items()}
    quota = portions(sizes, n, rank(seed, "start"))
    chosen: list[Candidate] = []
    for key in sorted(strata, key=repr):
        chosen += _by_rank(strata[key], seed)[: quota[key]]
    return chosen


def _within_caps(
    cohort: Cohort, chosen: Sequence[Candidate], order: Sequence[Candidate], n: int
) -> list[Candidate]:
    """Without what is above a cap; its place goes to its own stratum, else to who is next."""
    if not cohort.caps:
        return list(chosen)
    most = {label: max(1, math.floor(share * n + 1e-9)) for label, share in cohort.caps.items()}
    counted: Counter[tuple[str, str]] = Counter()

    def take(candidate: Candidate) -> bool:
        labels = candidate.device.labels
        keys = [(label, labels[label]) for label in most if label in labels]
        if any(counted[key] >= most[key[0]] for key in keys):
            return False
        counted.update(keys)
        return True

    place = {c.device.id: i for i, c in enumerate(order)}
    kept = [c for c in sorted(chosen, key=lambda c: place[c.device.id]) if take(c)]
    wanted = Counter(c.stratum for c in chosen)
    wanted.subtract(c.stratum for c in kept)
    inside = {c.device.id for c in chosen}
    spare = [c for c in order if c.device.id not in inside]
    for own in (True, False):
        for c in spare:
            if len(kept) >= n:
                break
            if (not own or wanted[c.stratum] > 0) and take(c):
                kept.append(c)
                wanted[c.stratum] -= 1
                inside.add(c.device.id)
        spare = [c for c in spare if c.device.id not in inside]
    return kept


def _top_up(free: Sequence[Candidate], exposed: Sequence[Candidate], seed: str) -> list[Candidate]:
    """What the wave after a best_first one lacks of every band; half of a small band is left."""
    taken = {c.device.id for c in exposed}
    bands: dict[int, list[Candidate]] = defaultdict(list)
    for c in free:
        bands[c.band].append(c)
    added: list[Candidate] = []
    for _, members in sorted(bands.items()):
        have = sum(c.device.id in taken for c in members)
        lacking = min(AFTER_BEST, math.ceil(len(members) / 2)) - have
        rest = [c for c in members if c.device.id not in taken]
        added += _by_rank(rest, f"{seed}/every-band")[: max(0, lacking)]
    return added


def _thin_bands(exposed: Sequence[Candidate]) -> list[str]:
    counted = Counter(c.band for c in exposed)
    thin = [str(band) for band in range(TOP_BAND + 1) if counted[band] < AFTER_BEST]
    if not thin:
        return []
    return [
        f"fewer than {AFTER_BEST} devices of band {', '.join(thin)} are in this cohort: the wave "
        "after a best_first one cannot show what the release does to them"
    ]


def _by_rank(pool: Iterable[Candidate], seed: str) -> list[Candidate]:
    return sorted(pool, key=lambda c: rank(seed, c.device.id))


def _by_score(pool: Iterable[Candidate], seed: str) -> list[Candidate]:
    return sorted(pool, key=lambda c: (-_score(c), rank(seed, c.device.id)))


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
