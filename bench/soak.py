"""Soak: a steady load for a while, and what the memory of the ingest process does meanwhile.

Devices report at a rate that the process has to spare, with duplicates and hostile messages among
them. Its resident memory is read once a second; in the first half pools fill and caches warm, in
the second half it must not grow. Afterwards the counts must equal what was published.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

from bench import servers
from bench.ingest import check, fresh
from bench.load import Plan, arguments
from bench.report import Options, Row

RATE = 2_000.0  # messages a second
SECONDS = 60.0
GROWTH = 2.0  # MiB a minute: what allocators do by themselves
_MIB = 1 << 20


def run(options: Options) -> list[Row]:
    seconds, devices = options.seconds or SECONDS, options.devices or 1_000
    messages = max(int(RATE * seconds), 3 * devices)
    plan = fresh(Plan(seed=options.seed, devices=devices, messages=messages))
    with tempfile.TemporaryDirectory(prefix="bellwether-bench-") as folder:
        root = Path(folder)
        with servers.database(options.database) as database:
            engine = servers.plant(root / "state", database, plan.names)
            with (
                servers.broker(root) as port,
                servers.ingest(root / "state", port, database, engine) as child,
            ):
                at, rss = _watch(psutil.Process(child.pid), port, plan)
            check(engine, plan)
            engine.dispose()
    return _rows(at, rss, messages)


def _watch(process: psutil.Process, port: int, plan: Plan) -> tuple[list[float], list[float]]:
    """(seconds since the begin, resident MiB), once a second until the last ack is out."""
    at: list[float] = []
    rss: list[float] = []
    words = arguments(port, plan, await_ack=True, rate=RATE)
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as load:
        assert load.stdin is not None and load.stdout is not None  # noqa: S101, PT018
        load.stdout.readline()
        load.stdin.write("go\n")
        load.stdin.flush()
        began = time.monotonic()
        while load.poll() is None:
            at.append(time.monotonic() - began)
            rss.append(process.memory_info().rss / _MIB)
            time.sleep(1.0)
        if not json.loads(load.stdout.read() or "{}").get("acked"):
            raise RuntimeError("the load did not get through")
    return at, rss


def _rows(at: list[float], rss: list[float], messages: int) -> list[Row]:
    half = len(rss) // 2
    slope = 60 * float(np.polyfit(at[half:], rss[half:], 1)[0])
    every = max(1, len(rss) // 12)
    course = " ".join(f"{value:.0f}" for value in rss[::every])
    return [
        Row(name="rss", value=float(np.median(rss[half:])), unit="MiB", more={"course": course}),
        Row(
            name="growth in the second half",
            value=slope,
            unit="MiB/min",
            limit=GROWTH,
            peer="what allocators do by themselves",
        ),
        Row(name="load", value=messages / at[-1], unit="messages/s"),
        Row(name="correct", value=1, unit="", limit=1, better="higher"),
    ]
