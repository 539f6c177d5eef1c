"""Decides who serves as control: by the rule that drew the exposed, with the same floor.

Pure. Drawn at the same moment with the same seed, stratum by stratum (score band × hardware), from
devices that are not updated; up to five per exposed device, 5,000 in all (`engine`). Comparing the
best cars with any others hides a doubled rate completely: there is no fallback to that.

Rules, in order:

1. The cohort's own labels, score bounds and floor hold for its controls too; a hybrid draw's floor
   is the lowest score that it drew.
2. best_first draws its controls best first: the nearest ones below, in the same band.
3. Who serves an earlier wave stays there, so that a late fault is seen; it is taken over only
   where a stratum has fewer controls than exposed devices. Strata of waves stay disjoint.
4. A cohort chosen by labels that is updated whole has no control of its own rule: devices of the
   same band and hardware, above the floor, take its place, and the draw says so.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from controller.manifests.kinds import Cohort, Mode
from controller.rollout.cohort import Candidate, Stratum, matches, portions, rank
from telemetry.policy import Engine


@dataclass(frozen=True, slots=True, kw_only=True)
class Controls:
    chosen: tuple[Candidate, ...]
    floor: float | None  # no control has a lower score
    warnings: tuple[str, ...] = ()


def match(
    cohort: Cohort,
    exposed: Sequence[Candidate],
    free: Sequence[Candidate],
    seed: str,
    *,
    engine: Engine,
    inside: frozenset[str] = frozenset(),
    serving: frozenset[str] = frozenset(),
    best_first: bool = False,
) -> Controls:
    """Controls for these exposed devices out of `free` (not updated, not being updated).

    `inside`: ids of the cohort's own devices; `serving`: ids that are controls of earlier waves.
    """
    floor = _floor(cohort, exposed, best_first)
    able = [c for c in free if floor is None or (c.score is not None and c.score >= floor)]
    own: dict[Stratum, list[Candidate]] = defaultdict(list)
    others: dict[Stratum, list[Candidate]] = defaultdict(list)
    for c in able:
        same_rule = c.device.id in inside or matches(cohort, c)
        (own if same_rule else others)[c.stratum].append(c)
    wanted = Counter(c.stratum for c in exposed)
    pools: dict[Stratum, list[Candidate]] = {}
    strangers: list[Stratum] = []
    for stratum, n in wanted.items():
        pools[stratum] = _ordered(own[stratum], n, engine, seed, serving, best_first)
        if not pools[stratum] and others[stratum]:
            pools[stratum] = _ordered(others[stratum], n, engine, seed, serving, best_first)
            strangers.append(stratum)
    sizes = {stratum: len(pool) for stratum, pool in pools.items() if pool}
    total = min(sum(sizes.values()), engine.controls_cap)
    quota = portions(sizes, total, rank(seed, "controls"))
    chosen = [c for stratum in sorted(sizes, key=repr) for c in pools[stratum][: quota[stratum]]]
    bands = {c.band for c in exposed}
    if not best_first:  # a band of the cohort from which nobody was drawn is as thin as can be
        bands |= {int(str(stratum[0])) for stratum, pool in own.items() if pool}
    return Controls(
        chosen=tuple(chosen),
        floor=floor,
        warnings=tuple(_warnings(exposed, chosen, sorted(bands), strangers, floor, engine)),
    )


def _floor(cohort: Cohort, exposed: Sequence[Candidate], best_first: bool) -> float | None:
    bounds = cohort.select.score if cohort.select else None
    declared = bounds.min if bounds else None
    hybrid = cohort.select is not None and cohort.select.mode is Mode.HYBRID
    if best_first or not hybrid or any(c.score is None for c in exposed):
        return declared
    return min((c.score for c in exposed if c.score is not None), default=declared)


def _ordered(
    pool: Iterable[Candidate],
    n: int,
    engine: Engine,
    seed: str,
    serving: frozenset[str],
    best_first: bool,
) -> list[Candidate]:
    """The stratum's controls, first choice first, as many as it may have."""

    def place(c: Candidate) -> tuple[float, int]:
        below = -c.score if best_first and c.score is not None else 0.0
        return below, rank(f"{seed}/control", c.device.id)

    order = sorted(pool, key=place)
    fresh = [c for c in order if c.device.id not in serving]
    lent = [c for c in order if c.device.id in serving]
    fresh = fresh[: n * engine.controls_per_device]
    return fresh + lent[: max(0, n - len(fresh))]


def _warnings(
    exposed: Sequence[Candidate],
    control: Sequence[Candidate],
    bands: Sequence[int],
    strangers: Sequence[Stratum],
    floor: float | None,
    engine: Engine,
) -> Iterable[str]:
    if exposed and not control:
        above = f" with a score of {floor:g} or more" if floor is not None else ""
        yield f"no control{above} is left: judged by absolute budgets only"
        return
    one, zero = Counter(c.band for c in exposed), Counter(c.band for c in control)
    thin = [_band(b) for b in bands if min(one[b], zero[b]) < engine.band_floor]
    if thin:
        yield f"{', '.join(thin)}: fewer than {engine.band_floor} devices in an arm"
    if strangers:
        shown = ", ".join(f"{_band(int(str(s[0])))} {s[1]}".strip() for s in sorted(strangers)[:4])
        yield (
            f"no control of the cohort's own rule is left in {shown}: compared with other devices "
            "of the same score band and hardware"
        )


def _band(band: int) -> str:
    return f"band {band}" if band >= 0 else "unscored"


def weights(candidates: Iterable[Candidate]) -> dict[str, int]:
    """`band/hardware` → devices of the eligible fleet: what a fleet-level number is weighted by."""
    return dict(sorted(Counter(f"{c.band}/{c.device.hardware}" for c in candidates).items()))
