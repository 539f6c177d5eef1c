"""Reads the machine and the probes of apps: one interval's samples, counters and exposure.

A probe is a file `DIR/probes/*.json`: {"counters": {...}, "exposure": {...}, "columns": {...},
"facts": {...}}. Counters and exposure are totals since the app started; what is reported is their
growth (a total that fell counts from zero: the app was restarted). Columns are gauges of now; facts
are preconditions: true, false or null. A probe that cannot be read says nothing; names and values
that the protocol would refuse are left out here.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from device_agent.agent import HealthSampled
from device_agent.protocol import MAX_METRICS, MAX_SAFE_INTEGER, METRIC

_MAX_PROBE_BYTES = 64 * 1024
_PROBE_FRESH = 300.0  # seconds; older gauges and facts are nobody's word any more
_FACT_FRESH = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Probed:
    counters: dict[str, float] = field(default_factory=dict)
    exposure: dict[str, float] = field(default_factory=dict)
    columns: dict[str, float] = field(default_factory=dict)
    facts: dict[str, bool | None] = field(default_factory=dict)


class Sampler:
    def __init__(self, probes: Path, interval: float) -> None:
        self._probes = probes
        self._interval = interval
        self._machine = Machine()
        self._totals: dict[tuple[str, str], float] = {}
        self._components: dict[str, str] | None = None
        self._began = 0.0
        self._monotonic = 0.0

    def begin(self, components: Mapping[str, str], now: float) -> None:
        """A new interval under these digests."""
        self._components, self._began, self._monotonic = dict(components), now, time.monotonic()

    def due(self) -> bool:
        return self._components is None or time.monotonic() - self._monotonic >= self._interval

    def sample(self, components: Mapping[str, str], now: float) -> HealthSampled | None:
        """The interval that ends now; None for the first call. The next one begins."""
        before, began = self._components, self._began
        seconds = time.monotonic() - self._monotonic
        self.begin(components, now)
        probed = self._read(now)
        counters = {
            name: int(grown)
            for name, grown in self._growth("counter", probed.counters).items()
            if METRIC.fullmatch(name) and 0 <= grown <= MAX_SAFE_INTEGER
        }
        exposure = self._growth("exposure", probed.exposure)
        if before is None or seconds <= 0:
            return None
        exposure.setdefault("device_hour", seconds / 3600)
        columns = self._machine.gauges() | probed.columns
        return HealthSampled(
            components=before,
            t0=began,
            dt=seconds,
            columns={name: (value,) for name, value in list(columns.items())[:MAX_METRICS]},
            counters=dict(list(counters.items())[:MAX_METRICS]),
            exposure=dict(list(exposure.items())[:MAX_METRICS]),
        )

    def facts(self, now: float) -> dict[str, bool | None]:
        """Preconditions by the probes' fresh word."""
        return self._read(now).facts

    def _growth(self, kind: str, totals: Mapping[str, float]) -> dict[str, float]:
        grown = {}
        for name, total in totals.items():
            last = self._totals.get((kind, name))
            self._totals[kind, name] = total
            if last is None:
                continue  # its past is nobody's interval
            grown[name] = total - last if total >= last else total
        return grown

    def _read(self, now: float) -> Probed:
        found = Probed()
        files = sorted(self._probes.glob("*.json")) if self._probes.is_dir() else []
        for path in files[:64]:
            try:
                age = now - path.stat().st_mtime
                if path.stat().st_size > _MAX_PROBE_BYTES:
                    continue
                body = json.loads(path.read_bytes())
            except (OSError, ValueError, RecursionError):
                continue
            if isinstance(body, dict):
                _take(body, age, found)
        return found


def _take(body: Mapping[str, Any], age: float, found: Probed) -> None:
    found.counters.update(_numbers(body.get("counters"), least=0.0))
    found.exposure.update(_numbers(body.get("exposure"), least=0.0))
    if abs(age) <= _PROBE_FRESH:
        found.columns.update(_numbers(body.get("columns")))
    facts = body.get("facts")
    if isinstance(facts, dict) and abs(age) <= _FACT_FRESH:
        found.facts.update({str(k)[:64]: v for k, v in facts.items() if v in (True, False, None)})


def _numbers(table: object, *, least: float = -math.inf) -> dict[str, float]:
    if not isinstance(table, dict):
        return {}
    return {
        name: float(value)
        for name, value in table.items()
        if METRIC.fullmatch(name)
        and isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) <= MAX_SAFE_INTEGER  # NaN and infinities compare false or fail here
        and value >= least
    }


class Machine:
    """Gauges of the machine itself, in percent and MiB.

    On Linux /proc is read as it is: psutil would cost another MiB for the same four numbers, and
    serves the other systems.
    """

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc
        self._busy, self._all = 0, 0  # clock ticks at the last look

    def gauges(self) -> dict[str, float]:
        try:
            found = self._linux()
        except (OSError, ValueError, IndexError, KeyError):
            found = _elsewhere()
        pressure = _pressure()
        return found if pressure is None else found | {"memory_pressure_percent": pressure}

    def _linux(self) -> dict[str, float]:
        lines = (self._proc / "meminfo").read_text().splitlines()
        memory = {line.split(":")[0]: int(line.split()[1]) for line in lines if line[:3] == "Mem"}
        ticks = [int(n) for n in (self._proc / "stat").read_text().split("\n", 1)[0].split()[1:9]]
        idle = ticks[3] + ticks[4]  # idle and waiting for a disk
        busy, everything = sum(ticks) - idle, sum(ticks)
        passed, worked = everything - self._all, busy - self._busy
        self._busy, self._all = busy, everything
        disk = os.statvfs("/")
        used = disk.f_blocks - disk.f_bfree
        return {
            "cpu_percent": round(100 * worked / passed, 1) if passed > 0 else 0.0,
            "memory_percent": round(100 * (1 - memory["MemAvailable"] / memory["MemTotal"]), 1),
            "disk_percent": round(100 * used / max(1, used + disk.f_bavail), 1),
            "load_1m": os.getloadavg()[0],
        }


def _elsewhere() -> dict[str, float]:
    import psutil

    return {
        "cpu_percent": psutil.cpu_percent(),
        "memory_percent": psutil.virtual_memory().percent,
        "disk_percent": psutil.disk_usage("/").percent,
        "load_1m": psutil.getloadavg()[0],
    }


def _pressure() -> float | None:
    """Share of the last 10 s in which something waited for memory (/proc/pressure)."""
    try:
        first = Path("/proc/pressure/memory").read_text().split("\n", 1)[0]
        return float(first.split("avg10=", 1)[1].split()[0])
    except (OSError, IndexError, ValueError):
        return None
