"""FLEET-10K / PLAN-4: what each method does to good and bad releases, side by side.

`--runs N` runs of each `--scenario S0,S2` with each `--method engine,argo`, seeds `--seed` and up,
on `--jobs` processes. What a tick costs is measured with all of them, or alone: `--scenario tick`.
`--real CSV` instead: calibration on a fleet's own history (`real`).
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat

from bench.decisions import table, tick, trial
from bench.decisions.fleet import SCENARIOS
from bench.decisions.plan import Result
from bench.report import Options, Row

RUNS = 20
TICK = "tick"  # no scenario: the cost of a decision


def run(options: Options) -> list[Row]:
    """Raises ValueError for an unknown scenario or method."""
    if options.real is not None:
        from bench.decisions import real

        return real.run(options)
    chosen = _chosen(options.scenario, (*SCENARIOS, TICK), "scenario")
    methods = _chosen(options.method, trial.METHODS, "method")
    scenarios = tuple(name for name in chosen if name != TICK)
    found = table.rows(results(options, scenarios, methods))
    if TICK in chosen and trial.OURS in methods:
        found += tick.rows()
    return found


def results(
    options: Options, scenarios: tuple[str, ...], methods: tuple[str, ...]
) -> Iterator[Result]:
    runs = options.runs or RUNS
    cases = [(scenario, options.seed + k) for scenario in scenarios for k in range(runs)]
    names, seeds = [c[0] for c in cases], [c[1] for c in cases]
    if options.jobs <= 1:
        for name, seed in cases:
            yield from trial.run(name, seed, methods)
        return
    with ProcessPoolExecutor(options.jobs) as pool:
        for found in pool.map(trial.run, names, seeds, repeat(methods), chunksize=4):
            yield from found


def _chosen(text: str | None, known: tuple[str, ...], what: str) -> tuple[str, ...]:
    if text is None:
        return known
    chosen = tuple(part.strip() for part in text.split(",") if part.strip())
    for name in chosen:
        if name not in known:
            raise ValueError(f"{name}: no such {what}; one of {', '.join(known)}")
    return chosen
