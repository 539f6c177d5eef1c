"""Score: a whole fleet at once, the draw of a cohort out of it, and reading what both need.

Ten factors, all devices scored. The draw is the production one, stratified over score band and
hardware, out of columns; a step makes them of its devices' objects first, which is measured beside
it. Loading is what a process does that knows nothing yet: from real SQLite to the
columns that the score reads. The floors of the same run: the score's arithmetic as one numpy
expression without parts, and a bare scan of the same rows.
"""

from __future__ import annotations

import contextlib
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from bench.report import Options, Row
from controller.rollout.cohort import Candidate, choose_of_many
from controller.rollout.model import Device
from controller.rollout.pool import Pool
from telemetry.policy import Factor, ScoreSpec
from telemetry.report import Totals
from telemetry.score import bands, score
from telemetry.score_days import ScoreDays
from telemetry.store import bulk, checkpoints, tables
from telemetry.store.database import open_engine, writing
from telemetry.store.reports import Store
from telemetry.store.tables import create_schema
from telemetry.sums import Layout

DEVICES, FACTORS, DRAWN = 1_000_000, 10, 10_000
_PIECE = 1_000  # rows
NOW = 1_800_000_000.0


def run(options: Options) -> list[Row]:
    n, runs = options.devices or DEVICES, options.runs or 5
    dice = np.random.default_rng(options.seed)
    names = [f"factor_{i}" for i in range(FACTORS)]
    factors = tuple(
        Factor(metric=name, per="device_hour", good=0.0, bad=2.0, weight=10.0) for name in names
    )
    spec = ScoreSpec(factors=factors, min_exposure=1.0)
    totals = Totals(
        devices=[f"car-{i:07d}" for i in range(n)],
        counters={name: dice.poisson(50, n).astype(np.float64) for name in names},
        exposure={"device_hour": dice.uniform(20, 200, n)},
        levels={},
    )
    rows = [
        Row(
            name=f"score of {n:,} devices × {FACTORS} factors",
            value=_median(lambda: score(totals, spec), runs),
            unit="ms",
            limit=200.0 if n == DEVICES else None,
            peer="promise",
        ),
        Row(
            name="the arithmetic alone",
            value=_median(lambda: _bare(totals, names), runs),
            unit="ms",
        ),
    ]
    found = score(totals, spec)
    rows.append(Row(name="its bands", value=_median(lambda: bands(found), runs), unit="ms"))
    rows += _drawing(totals, found.value, bands(found), n, runs)
    rows += _loading(spec, n, runs)
    return rows


def _bare(totals: Totals, names: list[str]) -> object:
    hours = totals.exposure["device_hour"]
    return 100 - sum(10 * np.clip(totals.counters[name] / hours / 2.0, 0, 1) for name in names)


def _drawing(totals: Totals, value: object, band: object, n: int, runs: int) -> list[Row]:
    pool = [
        Candidate(
            device=Device(id=d, fleet="cars", labels={"hardware": f"hw{i % 3}"}, status="active"),
            score=v,
            band=b,
        )
        for i, (d, v, b) in enumerate(
            zip(totals.devices, np.asarray(value).tolist(), np.asarray(band).tolist(), strict=True)
        )
    ]
    wanted, columns = min(DRAWN, n // 10), Pool.of(pool)
    return [
        Row(
            name=f"stratified cohort of {wanted:,} out of {n:,}",
            value=_median(lambda: choose_of_many(columns, wanted, "5e" * 32), runs),
            unit="ms",
            limit=100.0 if n == DEVICES else None,
            peer="promise",
        ),
        Row(
            name=f"columns of {n:,} devices' objects, once a draw",
            value=_median(lambda: Pool.of(pool), 1),
            unit="ms",
        ),
    ]


def _loading(spec: ScoreSpec, n: int, runs: int) -> list[Row]:
    """A fleet that grew by a hundredth since its window began, and counted all the time."""
    layout = Layout.of([f.metric for f in spec.factors], ["device_hour"], ())
    begun = NOW - spec.window.total_seconds()
    with tempfile.TemporaryDirectory(prefix="bellwether-bench-") as folder:
        file = Path(folder) / "telemetry.db"
        engine = open_engine(f"sqlite:///{file}")
        create_schema(engine)
        for devices, at in ((range(n // 100, n), begun), (range(n), NOW)):
            with writing(engine) as conn:
                bulk.upsert(conn, tables.layouts, [(layout.id, layout.text)])
                for first in range(devices.start, devices.stop, _PIECE):
                    bulk.upsert(conn, tables.sums, _rows(devices, first, layout, at))
            if at == begun:
                checkpoints.take(engine, begun)
        store = Store(engine)

        def load() -> Totals:
            (totals,) = ScoreDays(store).read(spec, NOW)
            return totals

        loaded = load()
        if len(loaded.devices) != n or loaded.counters["factor_0"][-1] != NOW - begun:
            raise AssertionError(f"read {len(loaded.devices)} of {n} devices, or wrong sums")
        took, bare = _median(load, runs), _median(lambda: _scan(file), runs)
        engine.dispose()
    name = f"loading {n:,} devices × {FACTORS} factors, window of {spec.window.days} days"
    limit = 2_000.0 if n == DEVICES else None
    return [
        Row(name=name, value=took, unit="ms", limit=limit, peer="promise"),
        Row(name="a bare scan of the same rows", value=bare, unit="ms"),
    ]


def _rows(devices: range, first: int, layout: Layout, at: float) -> list[bulk.Row]:
    sums = np.full(layout.width, at).tobytes()
    return [
        (f"car-{i:07d}", layout.id, sums) for i in range(first, min(first + _PIECE, devices.stop))
    ]


def _scan(file: Path) -> None:
    """The bytes as they stand, as the driver gives them."""
    with contextlib.closing(sqlite3.connect(file)) as bare:
        for table in (tables.sums, tables.checkpoints):
            cursor = bare.execute(f"SELECT * FROM {table.name}")  # noqa: S608
            while cursor.fetchmany(_PIECE):
                pass


def _median(work: Callable[[], object], runs: int) -> float:
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        work()
        times.append((time.perf_counter() - began) * 1_000)
    return statistics.median(times)
