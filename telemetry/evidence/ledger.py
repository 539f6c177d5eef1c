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

from telemetry.evidence.levels import Sums
from telemetry.evidence.observations import (
    ArmSeen,
    ArmSums,
    ArmTotals,
    EventTick,
    MetricSeen,
    Observations,
    merge,
)
from telemetry.policy import UPDATE_OK, Gate, GateType, Policy
from telemetry.report import HealthRow

__all__ = ["CONTROL", "EXPOSED", "Enrolment", "Ledger", "Observations", "merge"]

EXPOSED = "exposed"
CONTROL = "control"

CLOCK_BELIEF = 7 * 86_400.0  # seconds a device's clock may lag behind the arrival
TICK = 300.0
_RECENT = 64  # rows per device that a late enrolment or censoring can still move
_SKETCH = 2_000  # pre-period messages kept per level, chosen by hash
_NEVER = 1 << 62


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
    """Sums over messages; `sign` −1 takes a message out again."""

    hours: float = 0.0
    counters: dict[str, int] = field(default_factory=dict)
    exposure: dict[str, float] = field(default_factory=dict)
    levels: dict[str, list[float]] = field(default_factory=dict)  # [n, Σ winsorised]

    def add(self, row: HealthRow, levels: Mapping[str, tuple[float, float]], sign: int = 1) -> None:
        self.hours += sign * _hours(row)
        for name, count in row.counters.items():
            self.counters[name] = self.counters.get(name, 0) + sign * count
        for unit, amount in row.exposure.items():
            self.exposure[unit] = self.exposure.get(unit, 0.0) + sign * amount
        for name, (n, total) in levels.items():
            kept = self.levels.setdefault(name, [0.0, 0.0])
            kept[0] += sign * n
            kept[1] += sign * total

    def merged(self, other: _Amounts) -> None:
        self.hours += other.hours
        for name, count in other.counters.items():
            self.counters[name] = self.counters.get(name, 0) + count
        for unit, amount in other.exposure.items():
            self.exposure[unit] = self.exposure.get(unit, 0.0) + amount
        for name, (n, total) in other.levels.items():
            kept = self.levels.setdefault(name, [0.0, 0.0])
            kept[0] += n
            kept[1] += total

    def of(self, unit: str) -> float:
        """Exposure in a unit; device hours are known even to devices that do not report them."""
        if unit == "device_hour" and unit not in self.exposure:
            return max(0.0, self.hours)
        return max(0.0, self.exposure.get(unit, 0.0))


@dataclass(slots=True)
class _Unit:
    enrolment: Enrolment
    until: float
    now: _Amounts = field(default_factory=_Amounts)
    past: _Amounts = field(default_factory=_Amounts)
    events: dict[str, dict[int, int]] = field(default_factory=dict)  # metric → tick → count
    tail: deque[HealthRow] = field(default_factory=lambda: deque(maxlen=_RECENT))


@dataclass(slots=True)
class _Shape:
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
        self._shapes: dict[str, _Shape] | None = None
        self._origin: int | None = None
        self._present: npt.NDArray[np.bool_] = np.zeros((64, 64), dtype=np.bool_)
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
        index = len(self._units)
        self._units.append(unit)
        self._by_device.setdefault(enrolment.device, []).append(index)
        self._room(index)
        self._take_past(unit)
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

    def _count(self, index: int, row: HealthRow, sign: int = 1) -> None:
        self._begin()
        unit = self._units[index]
        unit.now.add(row, self._levels(row), sign)
        tick = self._unit_tick(unit, row)
        for gate in self._counted:
            count = row.counters.get(gate.metric, 0)
            if count > 0:
                at = unit.events.setdefault(gate.metric, {})
                at[tick] = at.get(tick, 0) + sign * count
        if sign > 0:
            unit.tail.append(row)
            self._reach(tick)
            self._present[index, tick - self._start] = True

    def _censor(self, device: str, at: float, only: tuple[str, int, str | None] | None) -> None:
        for index in self._by_device.get(device, ()):
            unit = self._units[index]
            e = unit.enrolment
            if at >= unit.until or (only is not None and (e.arm, e.wave, e.attempt) != only):
                continue
            unit.until = at
            late = [row for row in unit.tail if _time(row) >= at]
            for row in late:
                unit.tail.remove(row)
                self._count(index, row, -1)
            kept = {self._unit_tick(unit, row) for row in unit.tail}
            for tick in {self._unit_tick(unit, row) for row in late} - kept:
                self._present[index, tick - self._start] = False
            self._cached = None

    def _remember(self, row: HealthRow, sign: int) -> None:
        """Into (or out of) the device's own past, and that of its later enrolments."""
        at = _time(row)
        levels = self._levels(row)
        days = self._past.setdefault(row.device, {})
        days.setdefault(int(at // 86_400), _Amounts()).add(row, levels, sign)
        oldest = int(at // 86_400 - self.policy.engine.baseline_days - 1)
        for day in [day for day in days if day < oldest]:
            del days[day]
        if sign > 0:
            self._sample(row)
            for index in self._by_device.get(row.device, ()):
                if at < self._units[index].enrolment.since:
                    self._units[index].past.add(row, levels)

    def _take_past(self, unit: _Unit) -> None:
        since = unit.enrolment.since
        oldest = int((since - self.policy.engine.baseline_days * 86_400) // 86_400)
        for day, amounts in self._past.get(unit.enrolment.device, {}).items():
            if oldest <= day <= int(since // 86_400):
                unit.past.merged(amounts)
        for row in self._recent.get(unit.enrolment.device, ()):
            if _time(row) >= since:
                unit.past.add(row, self._levels(row), -1)

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
            self._shapes[gate.metric] = _shape(values, engine.winsor, engine.skew_limit)
        if any(shape.logged for shape in self._shapes.values()):
            # What was folded before was not read as logarithms: the past of those levels is void.
            pasts = [amounts for days in self._past.values() for amounts in days.values()]
            for amounts in [*pasts, *(unit.past for unit in self._units)]:
                for name, shape in self._shapes.items():
                    if shape.logged:
                        amounts.levels.pop(name, None)
        if self.tick is None:
            lengths = [rows[-1].seconds for rows in self._recent.values() if rows]
            usual = float(np.median(lengths)) if lengths else TICK
            self.tick = min(TICK, max(0.5, 2.5 * usual))

    # -- ticks -------------------------------------------------------------------------------------

    def _tick_of(self, at: float) -> int:
        return int(at // (self.tick or TICK))

    def _unit_tick(self, unit: _Unit, row: HealthRow) -> int:
        # A device's clock may not place evidence before its enrolment.
        return self._tick_of(max(_time(row), unit.enrolment.since))

    @property
    def _start(self) -> int:
        return self._origin or 0

    def _room(self, index: int) -> None:
        rows = self._present.shape[0]
        if index >= rows:
            self._present = np.pad(self._present, ((0, rows), (0, 0)))

    def _reach(self, tick: int) -> None:
        """Room for this tick in the table of presence."""
        if self._origin is None:
            self._origin = tick
        columns = self._present.shape[1]
        before = max(0, self._origin - tick)
        after = max(0, tick - self._origin - columns + 1)
        if before or after:
            grown = (0, 0), (before, max(after, columns) if after else 0)
            self._present = np.pad(self._present, grown)
            self._origin -= before

    # -- observing ---------------------------------------------------------------------------------

    def _observe(self) -> Observations:
        metrics: dict[str, MetricSeen] = {}
        for gate in self._counted:
            metrics[gate.metric] = MetricSeen(
                metric=gate.metric,
                ticks=self._event_ticks(gate),
                repeats=self._repeats(gate) if gate.type is GateType.RATE else (),
                totals=self._totals(gate),
            )
        for gate in self._level_gates:
            shape = (self._shapes or {}).get(gate.metric)
            metrics[gate.metric] = MetricSeen(
                metric=gate.metric,
                levels=self._level_sums(gate),
                logged=shape is not None and shape.logged,
            )
        return Observations(arms=self._arms(), metrics=metrics)

    def _firsts(self, metric: str) -> npt.NDArray[np.int64]:
        """Tick of each unit's first event; `_NEVER` without one. Shape (units,)."""
        firsts = np.full(len(self._units), _NEVER, dtype=np.int64)
        for index, unit in enumerate(self._units):
            ticks = [tick for tick, n in unit.events.get(metric, {}).items() if n > 0]
            if ticks:
                firsts[index] = min(ticks)
        return firsts

    def _event_ticks(self, gate: Gate) -> tuple[EventTick, ...]:
        firsts = self._firsts(gate.metric)
        strata: dict[tuple[int, str, int], list[int]] = {}
        for index, unit in enumerate(self._units):
            e = unit.enrolment
            strata.setdefault((e.wave, e.hardware, e.band), []).append(index)
        found = []
        for (wave, hardware, band), members in sorted(strata.items()):
            inside = np.array(members)
            first = firsts[inside]
            exposed = np.array([self._units[i].enrolment.arm == EXPOSED for i in members])
            for tick in np.unique(first[first < _NEVER]):
                risk = self._present[inside, int(tick) - self._start] & (first >= tick)
                fell = first == tick
                found.append(
                    EventTick(
                        wave=wave,
                        hardware=hardware,
                        band=band,
                        tick=int(tick),
                        d1=int((fell & exposed).sum()),
                        d0=int((fell & ~exposed).sum()),
                        y1=int((risk & exposed).sum()),
                        y0=int((risk & ~exposed).sum()),
                    )
                )
        return tuple(found)

    def _totals(self, gate: Gate) -> tuple[ArmTotals, ...]:
        firsts = self._firsts(gate.metric)
        budget = gate.budget_rate()
        rate, unit = budget if budget is not None else (0.0, gate.unit)
        found: dict[tuple[int, str, str], ArmTotals] = {}
        for index, one in enumerate(self._units):
            e = one.enrolment
            events = max(0, sum(one.events.get(gate.metric, {}).values()))
            exposure = one.now.of(unit)
            part = ArmTotals(
                wave=e.wave,
                hardware=e.hardware,
                arm=e.arm,
                devices=int(one.now.hours > 0),
                first=int(firsts[index] < _NEVER),
                events=events,
                exposure=one.now.of(gate.unit),
                at_risk=exposure * self._share_at_risk(index, int(firsts[index])),
                budget_sums=_vote(self._capped(events, exposure * rate), exposure),
            )
            key = (e.wave, e.hardware, e.arm)
            found[key] = part if key not in found else _added(found[key], part)
        return tuple(found[key] for key in sorted(found))

    def _share_at_risk(self, index: int, first: int) -> float:
        """Share of a unit's reported time up to its first event (reports are evenly long)."""
        if first >= _NEVER:
            return 1.0
        present = self._present[index]
        everything = int(present.sum())
        return int(present[: first - self._start + 1].sum()) / everything if everything else 1.0

    def _capped(self, events: int, expected: float) -> float:
        engine = self.policy.engine
        return float(min(events, engine.repeat_cap + engine.repeat_cap_per * math.ceil(expected)))

    def _repeats(self, gate: Gate) -> tuple[ArmSums, ...]:
        usual = self._usual_rate(gate)
        prior = self.policy.engine.repeat_prior
        found: dict[tuple[int, str], dict[str, Sums]] = {}
        for one in self._units:
            hours = one.now.of(gate.unit)
            if hours <= 0:
                continue
            before = max(0, one.past.counters.get(gate.metric, 0))
            expected = hours * (before + prior) / (one.past.of(gate.unit) + prior / usual)
            events = max(0, sum(one.events.get(gate.metric, {}).values()))
            _gather(found, one.enrolment, _vote(self._capped(events, expected), expected))
        return _arm_sums(found)

    def _usual_rate(self, gate: Gate) -> float:
        """The fleet's own rate: the enrolled devices' past, else the controls' present."""
        for amounts in (
            [unit.past for unit in self._units],
            [unit.now for unit in self._units if unit.enrolment.arm == CONTROL],
            [unit.now for unit in self._units],
        ):
            events = sum(max(0, one.counters.get(gate.metric, 0)) for one in amounts)
            exposure = math.fsum(one.of(gate.unit) for one in amounts)
            if events > 0 and exposure > 0:
                return events / exposure
        return 1.0

    def _level_sums(self, gate: Gate) -> tuple[ArmSums, ...]:
        least = self.policy.engine.level_min_hours
        rows: list[tuple[Enrolment, float, float | None]] = []
        for one in self._units:
            n, total = one.now.levels.get(gate.metric, (0.0, 0.0))
            if n <= 0 or one.now.hours < least:
                continue
            before, sum_before = one.past.levels.get(gate.metric, (0.0, 0.0))
            past = sum_before / before if before > 0 else None
            rows.append((one.enrolment, total / n, past))
        usual: dict[tuple[int, str], list[float]] = {}
        for e, _, x in rows:
            if x is not None:
                usual.setdefault((e.wave, e.hardware), []).append(x)
        found: dict[tuple[int, str], dict[str, Sums]] = {}
        for e, y, x in rows:
            same = usual.get((e.wave, e.hardware), [])
            # Without a past of its own a device is taken for its stratum's usual one.
            x = x if x is not None else (math.fsum(same) / len(same) if same else 0.0)
            _gather(found, e, _vote(y, x))
        return _arm_sums(found)

    def _arms(self) -> tuple[ArmSeen, ...]:
        found: dict[tuple[int, str, str], list[float]] = {}
        for one in self._units:
            e = one.enrolment
            kept = found.setdefault((e.wave, e.hardware, e.arm), [0, 0, 0.0])
            kept[0] += 1
            kept[1] += one.now.hours > 0
            kept[2] += max(0.0, one.now.hours)
        return tuple(
            ArmSeen(
                wave=wave,
                hardware=hardware,
                arm=arm,
                enrolled=int(kept[0]),
                reporting=int(kept[1]),
                hours=float(kept[2]),
            )
            for (wave, hardware, arm), kept in sorted(found.items())
        )


def _time(row: HealthRow) -> float:
    """When it happened: the end of the interval by the device's clock, where that is believable."""
    own = row.t0 + row.seconds
    late = row.received_at - own
    return own if 0 <= late <= CLOCK_BELIEF else row.received_at


def _hours(row: HealthRow) -> float:
    return row.exposure.get("device_hour", row.seconds / 3600)


def _shape(values: npt.NDArray[np.float64], cut: float, skew_limit: float) -> _Shape:
    if values.size < 20:
        return _Shape()
    low, high = (float(v) for v in np.quantile(values, [cut, 1 - cut]))
    spread = float(values.std())
    skew = float(((values - values.mean()) ** 3).mean()) / spread**3 if spread > 0 else 0.0
    return _Shape(low=low, high=high, logged=skew > skew_limit and low > 0)


def _vote(y: float, x: float) -> Sums:
    return Sums(n=1.0, y=y, x=x, yy=y * y, xy=x * y, xx=x * x)


def _gather(found: dict[tuple[int, str], dict[str, Sums]], e: Enrolment, sums: Sums) -> None:
    arms = found.setdefault((e.wave, e.hardware), {})
    arms[e.arm] = arms.get(e.arm, Sums()) + sums


def _arm_sums(found: dict[tuple[int, str], dict[str, Sums]]) -> tuple[ArmSums, ...]:
    return tuple(
        ArmSums(
            wave=wave,
            hardware=hardware,
            exposed=arms.get(EXPOSED, Sums()),
            control=arms.get(CONTROL, Sums()),
        )
        for (wave, hardware), arms in sorted(found.items())
    )


def _added(a: ArmTotals, b: ArmTotals) -> ArmTotals:
    return replace(
        a,
        devices=a.devices + b.devices,
        first=a.first + b.first,
        events=a.events + b.events,
        exposure=a.exposure + b.exposure,
        at_risk=a.at_risk + b.at_risk,
        budget_sums=a.budget_sums + b.budget_sums,
    )
