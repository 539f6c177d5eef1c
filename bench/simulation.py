"""Histories told per minute, and the promises that they broke: `bellwether bench simulation`.

Seed S with R runs tells the histories S, S+1, … S+R−1, over `jobs` processes. A seed that breaks a
promise is printed with the command that tells it again; with `--runs 1` its whole trace is printed.
`--seconds` ends it after that time, with what was told until then.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.report import Options, Row
from bench.world import history
from bench.world.databases import Databases, memory_directory
from bench.world.history import Outcome

HISTORIES_PER_MINUTE = 1_000.0  # on two cores
DEFAULT_RUNS = 1_000
_LOT = 10  # histories handed to a process at once


def run(options: Options) -> list[Row]:
    runs = options.runs or DEFAULT_RUNS
    seeds = list(range(options.seed, options.seed + runs))
    began = time.perf_counter()
    told: list[Outcome] = []
    cpu = 0.0
    for outcomes, seconds in _tell(seeds, min(options.jobs, runs)):
        told += outcomes
        cpu += seconds
        for one in outcomes:
            if one.findings:
                _print_broken(one)
        if options.seconds is not None and time.perf_counter() - began > options.seconds:
            break
    runs = len(told)
    seconds = time.perf_counter() - began
    if runs == 1:
        print("\n".join(told[0].lines), file=sys.stderr)
    broken = sorted((one.seed for one in told if one.findings), key=int)
    more = {"seeds": f"{seeds[0]}–{max(int(one.seed) for one in told)}", "processes": options.jobs}
    return [
        Row(
            name="histories",
            value=60 * runs / seconds,
            unit="a minute",
            limit=HISTORIES_PER_MINUTE,
            better="higher",
            peer="the promise, on 2 cores",
            more=more,
        ),
        Row(
            name="histories that broke a promise",
            value=len(broken),
            unit=f"of {runs}",
            limit=0.0,
            peer="none",
            more={"broken": " ".join(broken[:20])},
        ),
        Row(name="processor time", value=1_000 * cpu / runs, unit="ms a history"),
        Row(name="devices", value=_mean([one.devices for one in told]), unit="a history"),
        Row(name="port calls", value=_mean([one.points for one in told]), unit="a history"),
        Row(name="deaths", value=_mean([one.deaths for one in told]), unit="a history"),
        Row(name="told time", value=_mean([one.virtual for one in told]), unit="s a history"),
    ]


def _tell(seeds: Sequence[int], jobs: int) -> Iterator[tuple[list[Outcome], float]]:
    lots = [list(seeds[i : i + _LOT]) for i in range(0, len(seeds), _LOT)]
    with memory_directory() as root:
        if jobs == 1:
            _prepare(root)
            yield from map(_lot, lots)
            return
        context = multiprocessing.get_context("spawn")
        with context.Pool(jobs, initializer=_prepare, initargs=(root,)) as pool:
            yield from pool.imap_unordered(_lot, lots)


_ours: list[Databases] = []  # of this process


def _prepare(root: Path) -> None:
    _ours[:] = [Databases(root / str(os.getpid()))]
    gc.freeze()  # modules and statements stay: the collector need not look at them again
    gc.disable()  # the rubbish of a lot of histories is small: it is collected after each lot


def _lot(seeds: Sequence[int]) -> tuple[list[Outcome], float]:
    """(what came of them, seconds of processor time)."""
    began = time.process_time()
    told = []
    for seed in seeds:
        try:
            told.append(history.run(_ours[0], str(seed)))
        except Exception as error:  # noqa: BLE001 - whatever it is, its seed must be told
            told.append(history.defect(str(seed), error))
    gc.collect()
    return told, time.process_time() - began


def _print_broken(one: Outcome) -> None:
    print(f"seed {one.seed} broke {len(one.findings)} promises:", file=sys.stderr)
    for finding in one.findings[:5]:
        print(f"  {finding}", file=sys.stderr)
    print(
        f"  tell it again: bellwether bench simulation --seed {one.seed} --runs 1", file=sys.stderr
    )


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / max(1, len(numbers))
