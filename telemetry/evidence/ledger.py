"""Folds health messages into what the gate may count: who was at risk, when, and what happened.

Decides which message is evidence of which arm. Pure and incremental: rows may come in any order,
repeatedly snapshot, never the clock. It does not judge. Rules, in order:

1. A message belongs to an exposed device only with its attempt id and the target's digests.
2. It belongs to a control from its draw until it is censored (updated, moved, retired).
3. Anything else is the device's own past: the baseline of its later enrolments (≤ 14 days).
4. Its time is the end of its interval by the device's clock, never after its arrival; a clock
   that is far off is not believed. Late data thus meets the risk set of its own time.
5. A device is at risk in the ticks in which it reported, up to its first event of that metric.
6. One bounded vote per device everywhere: first events, capped counts, device means.
"""

from __future__ import annotations

import heapq
import math
import zlib
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from telemetry.evidence.observations import Observations, merge
from telemetry.evidence.tally import Rollup, Tally, observe
from telemetry.policy import UPDATE_OK, GateType, Policy
from telemetry.report import HealthRow

__all__ = ["CONTROL", "EXPOSED", "Enrolment", "Ledger", "Observations", "merge"]

EXPOSED = "exposed"
CONTROL = "control"

CLOCK_BELIEF = 7 * 86_400.0  # seconds a device's clock may lag behind the arrival
TICK = 300.0
_RECENT = 16  # rows per device that a late enrolment or censoring can still move
_SKETCH = 2_000  # pre-period messages kept per level, chosen by hash
_BULK = 4_096  # messages folded at once
_LEVEL = ("n", "sum")
_NOTHING = (0.0, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Enrolment:
    """Who counts from when till when, in which arm of which stratum."""

    device: str
    arm: str  # exposed | control
    wave: int
    hardware: str
    band: int
    since: float
    until: float | None = None
    attempt: str | None = None
    digests: Mapping[str, str] = field(default_factory=dict)  # component → digest it must run


@dataclass(slots=True)
class _Amounts:
    """A day of a device's own past: sums over messages by column name (`Tally.past`)."""

    sums: dict[str, float] = field(default_factory=dict)

    def add(self, parts: Mapping[str, float], sign: int = 1) -> None:
        for name, amount in parts.items():
            self.sums[name] = self.sums.get(name, 0.0) + sign * amount


@dataclass(slots=True)
class _Unit:
    enrolment: Enrolment
    until: float
    tail: deque[HealthRow] = field(default_factory=lambda: deque(maxlen=_RECENT))


@dataclass(slots=True)
class Shape:
    """How a level's messages are read: winsorised at the fleet's own past, perhaps as logs."""

    low: float = -math.inf
    high: float = math.inf
    logged: bool = False

    def of(self, value: float) -> float:
        value = min(max(value, self.low), self.high)
        return math.log(max(value, 1e-12)) if self.logged else value


class Ledger:
    """The evidence of one rollout. `tick` seconds; None: 2.5 × the usual length of a message."""

    def __init__(self, policy: Policy, *, tick: float | None = None) -> None:
        self.policy = policy
        self.tick = tick
        self._counted = tuple(
            gate
            for gate in policy.of(GateType.RATE, GateType.EVENT, GateType.PROPORTION)
            if gate.metric != UPDATE_OK
        )
        self._level_gates = policy.of(GateType.MEAN)
        self._units: list[_Unit] = []
        self._by_device: dict[str, list[int]] = {}
        self._past: dict[str, dict[int, _Amounts]] = {}  # device → day → sums
        self._recent: dict[str, deque[HealthRow]] = {}
        self._sketch: dict[str, list[tuple[int, float]]] = {}
        self._shapes: dict[str, Shape] | None = None
        units = {gate.unit for gate in self._counted}
        units |= {budget[1] for gate in self._counted if (budget := gate.budget_rate())}
        self._exposures = tuple(sorted(units - {"device_hour"}))
        self._tally = Tally(policy.engine, self._counted, self._level_gates)
        self._arrived: list[tuple[int, HealthRow]] = []
        self._cached: Observations | None = None

    # -- what the loop tells -----------------------------------------------------------------------

    def enrol(self, enrolment: Enrolment) -> None:
        """A device begins to count. The same enrolment twice is one."""
        known = [self._units[i].enrolment for i in self._by_device.get(enrolment.device, ())]
        same = (enrolment.arm, enrolment.wave, enrolment.attempt)
        if any((e.arm, e.wave, e.attempt) == same for e in known):
            if enrolment.until is not None:
                self._censor(enrolment.device, enrolment.until, same)
            return
        until = math.inf if enrolment.until is None else enrolment.until
        unit = _Unit(enrolment=replace(enrolment, until=None), until=until)
        index = self._tally.enrol(
            enrolment.wave, enrolment.hardware, enrolment.band, enrolment.arm == EXPOSED
        )
        self._units.append(unit)
        self._by_device.setdefault(enrolment.device, []).append(index)
        self._take_past(index)
        recent = self._recent.get(enrolment.device, deque())
        for row in list(recent):
            if self._belongs(unit, row):
                recent.remove(row)
                self._remember(row, -1)
                self._count(index, row)
        self._cached = None

    def censor(self, device: str, at: float) -> None:
        """From this instant on the device counts in no arm: updated, moved, retired, replaced."""
        self._censor(device, at, None)

    def add(self, rows: Iterable[HealthRow]) -> None:
        """Fold accepted messages. Each is given once (the store refuses repeats)."""
        for row in rows:
            self._cached = None
            found = False
            for index in self._by_device.get(row.device, ()):
                if self._belongs(self._units[index], row):
                    self._count(index, row)
                    found = True
            if not found:
                self._remember(row, 1)
                self._recent.setdefault(row.device, deque(maxlen=_RECENT)).append(row)

    def snapshot(self) -> Observations:
        """Counts and sums as they stand; the same object until something changes."""
        if self._cached is None:
            self._cached = self._observe()
        return self._cached

    # -- which message belongs where ---------------------------------------------------------------

    def _belongs(self, unit: _Unit, row: HealthRow) -> bool:
        wanted = unit.enrolment
        at = _time(row)
        if at >= unit.until:
            return False
        if any(row.components.get(c) != digest for c, digest in wanted.digests.items()):
            return False
        if wanted.arm == EXPOSED:
            return row.attempt is not None and row.attempt == wanted.attempt
        return at >= wanted.since

    def _count(self, index: int, row: HealthRow) -> None:
        self._begin()
        self._units[index].tail.append(row)
        self._arrived.append((index, row))
        if len(self._arrived) >= _BULK:
            self._fold()

    def _fold(self) -> None:
        if self._arrived:
            self._tally.fold(self._rollup(self._arrived))
            self._arrived = []

    def _rollup(self, rows: list[tuple[int, HealthRow]], sign: int = 1) -> Rollup:
        ticks = [self._unit_tick(self._units[index], row) for index, row in rows]
        levels = [self._levels(row) for _, row in rows]
        return Rollup(
            unit=np.array([index for index, _ in rows], dtype=np.int64),
            tick=np.array(ticks, dtype=np.int64),
            hours=np.array([_hours(row) for _, row in rows]),
            counts={
                gate.metric: np.array(
                    [row.counters.get(gate.metric, 0) for _, row in rows], dtype=np.int64
                )
                for gate in self._counted
            },
            exposure={
                unit: np.array([row.exposure.get(unit, 0.0) for _, row in rows])
                for unit in self._exposures
            },
            levels={
                gate.metric: (
                    np.array([found.get(gate.metric, _NOTHING)[0] for found in levels]),
                    np.array([found.get(gate.metric, _NOTHING)[1] for found in levels]),
                )
                for gate in self._level_gates
            },
            sign=sign,
        )

    def _censor(self, device: str, at: float, only: tuple[str, int, str | None] | None) -> None:
        for index in self._by_device.get(device, ()):
            unit = self._units[index]
            e = unit.enrolment
            if at >= unit.until or (only is not None and (e.arm, e.wave, e.attempt) != only):
                continue
            unit.until = at
            late = [row for row in unit.tail if _time(row) >= at]
            if late:
                self._fold()
                self._tally.fold(self._rollup([(index, row) for row in late], -1))
            for row in late:
                unit.tail.remove(row)
            kept = {self._unit_tick(unit, row) for row in unit.tail}
            for tick in {self._unit_tick(unit, row) for row in late} - kept:
                self._tally.absent(index, tick)
            self._cached = None

    def _remember(self, row: HealthRow, sign: int) -> None:
        """Into (or out of) the device's own past, and that of its later enrolments."""
        at = _time(row)
        parts = self._parts(row)
        days = self._past.setdefault(row.device, {})
        days.setdefault(int(at // 86_400), _Amounts()).add(parts, sign)
        oldest = int(at // 86_400 - self.policy.engine.baseline_days - 1)
        for day in [day for day in days if day < oldest]:
            del days[day]
        if sign > 0:
            self._sample(row)
            for index in self._by_device.get(row.device, ()):
                if at < self._units[index].enrolment.since:
                    self._into_past(index, parts)

    def _take_past(self, index: int) -> None:
        e = self._units[index].enrolment
        oldest = int((e.since - self.policy.engine.baseline_days * 86_400) // 86_400)
        for day, amounts in self._past.get(e.device, {}).items():
            if oldest <= day <= int(e.since // 86_400):
                self._into_past(index, amounts.sums)
        for row in self._recent.get(e.device, ()):
            if _time(row) >= e.since:
                self._into_past(index, self._parts(row), -1)

    def _into_past(self, index: int, parts: Mapping[str, float], sign: int = 1) -> None:
        for name, amount in parts.items():
            self._tally.past(name)[index] += sign * amount

    def _parts(self, row: HealthRow) -> dict[str, float]:
        """What one message adds to each column of the past."""
        parts = {"messages": 1.0, "hours": _hours(row)}
        for unit in self._exposures:
            if amount := row.exposure.get(unit):
                parts[f"exposure {unit}"] = amount
        for gate in self._counted:
            if count := row.counters.get(gate.metric):
                parts[f"events {gate.metric}"] = float(count)
                parts[f"eventful {gate.metric}"] = 1.0
        for name, (n, total) in self._levels(row).items():
            parts[f"n {name}"] = n
            parts[f"sum {name}"] = total
        return parts

    # -- levels ------------------------------------------------------------------------------------

    def _levels(self, row: HealthRow) -> dict[str, tuple[float, float]]:
        """(n, n × the message's mean as it is read) of the gated levels."""
        found = {}
        for gate in self._level_gates:
            level = row.levels.get(gate.metric)
            if level is not None and level.n > 0:
                mean = level.total / level.n
                if self._shapes is not None:
                    mean = self._shapes[gate.metric].of(mean)
                found[gate.metric] = (float(level.n), level.n * mean)
        return found

    def _sample(self, row: HealthRow) -> None:
        if self._shapes is not None:
            return
        for gate in self._level_gates:
            level = row.levels.get(gate.metric)
            if level is None or level.n <= 0:
                continue
            lot = zlib.crc32(f"{row.device}/{row.boot}/{row.seq}".encode())
            kept = self._sketch.setdefault(gate.metric, [])
            heapq.heappush(kept, (-lot, level.total / level.n))
            if len(kept) > _SKETCH:
                heapq.heappop(kept)

    def _begin(self) -> None:
        """At the first counted message the pre-period is over: its limits and the tick are fixed.

        Not at the first enrolment: after a restart the devices are enrolled before any row is read.
        """
        if self._shapes is not None:
            return
        engine = self.policy.engine
        self._shapes = {}
        for gate in self._level_gates:
            values = np.array([value for _, value in self._sketch.get(gate.metric, [])])
            self._shapes[gate.metric] = shape_of(values, engine.winsor, engine.skew_limit)
        if any(shape.logged for shape in self._shapes.values()):
            # What was folded before was not read as logarithms: the past of those levels is void.
            void = [
                f"{part} {name}" for name, s in self._shapes.items() if s.logged for part in _LEVEL
            ]
            for column in void:
                self._tally.past(column)[:] = 0.0
                for days in self._past.values():
                    for amounts in days.values():
                        amounts.sums.pop(column, None)
        if self.tick is None:
            lengths = [rows[-1].seconds for rows in self._recent.values() if rows]
            usual = float(np.median(lengths)) if lengths else TICK
            self.tick = min(TICK, max(0.5, 2.5 * usual))
        self._tally.late_ticks = max(1, round(engine.late_hours * 3600 / self.tick))

    # -- ticks -------------------------------------------------------------------------------------

    def _tick_of(self, at: float) -> int:
        return int(at // (self.tick or TICK))

    def _unit_tick(self, unit: _Unit, row: HealthRow) -> int:
        # A device's clock may not place evidence before its enrolment.
        return self._tick_of(max(_time(row), unit.enrolment.since))

    # -- observing ---------------------------------------------------------------------------------

    def _observe(self) -> Observations:
        self._fold()
        logged = {name for name, shape in (self._shapes or {}).items() if shape.logged}
        return observe(self._tally, self._counted, self._level_gates, logged)


def _time(row: HealthRow) -> float:
    """When it happened: the end of the interval by the device's clock, where that is believable."""
    own = row.t0 + row.seconds
    late = row.received_at - own
    return own if 0 <= late <= CLOCK_BELIEF else row.received_at


def _hours(row: HealthRow) -> float:
    return row.exposure.get("device_hour", row.seconds / 3600)


def shape_of(values: npt.NDArray[np.float64], cut: float, skew_limit: float) -> Shape:
    """The limits of a level from its pre-period means, shape (n,); fewer than 20 set none."""
    if values.size < 20:
        return Shape()
    low, high = (float(v) for v in np.quantile(values, [cut, 1 - cut]))
    spread = float(values.std())
    skew = float(((values - values.mean()) ** 3).mean()) / spread**3 if spread > 0 else 0.0
    return Shape(low=low, high=high, logged=skew > skew_limit and low > 0)
