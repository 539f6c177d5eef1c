"""Columns of votes: what each enrolled unit has contributed, folded in bulk and summed by stratum.

A unit is one enrolment of a device: one arm, one wave. A fold costs what arrived; an observation
costs one pass of numpy over the units and a curve for each stratum that changed. Rules:

1. A unit is at risk of a metric's first event in each tick in which it reported, up to that event.
2. The risk set of a tick is kept as two counts per stratum (updated, control), so that late data
   meets the risk set of its own time, in whatever order it arrives.
3. One bounded vote per unit: first events, capped repeats, means.

It does not decide which message belongs to whom (`ledger`), nor what follows (`gate`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from telemetry.evidence.grouping import Grouping
from telemetry.evidence.levels import Sums
from telemetry.evidence.observations import (
    ArmSeen,
    ArmSums,
    ArmTotals,
    BandSums,
    FirstEvents,
    MetricSeen,
    Observations,
)
from telemetry.evidence.risk_sets import NEVER, Firsts
from telemetry.evidence.shocks import LEVEL_PRIOR, RATE_PRIOR, Shocks
from telemetry.policy import Engine, Gate, GateType

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollup:
    """Messages of enrolled units in columns, shape (n,). `sign` −1 takes them out again."""

    unit: Ints
    tick: Ints
    hours: Floats
    counts: Mapping[str, Ints] = field(default_factory=dict)
    exposure: Mapping[str, Floats] = field(default_factory=dict)  # units but device_hour
    levels: Mapping[str, tuple[Floats, Floats]] = field(default_factory=dict)  # n, Σ
    sign: int = 1


class Tally:
    def __init__(self, engine: Engine, counted: Sequence[Gate], levels: Sequence[Gate]) -> None:
        self._engine = engine
        self._metrics = tuple(gate.metric for gate in counted)
        self._level_names = tuple(gate.metric for gate in levels)
        self.units = 0
        self._cells: dict[tuple[int, str], int] = {}
        self._strata: dict[tuple[int, str, int], int] = {}
        self._cell = np.zeros(64, dtype=np.int64)
        self._stratum = np.zeros(64, dtype=np.int64)
        self._exposed = np.zeros(64, dtype=np.bool_)
        self._seen = np.zeros(64, dtype=np.int64)  # ticks in which the unit reported
        self._since = np.full(64, NEVER, dtype=np.int64)  # its first tick
        self.late_ticks = NEVER  # after so many its votes are also counted by themselves
        self._now: dict[str, Floats] = {}
        self._past: dict[str, Floats] = {}
        self._present: npt.NDArray[np.bool_] = np.zeros((64, 64), dtype=np.bool_)
        self._start: int | None = None  # the tick of the first column
        self._firsts = {metric: Firsts(engine) for metric in self._metrics}
        self._shocks = {name: Shocks() for name in (*self._metrics, *self._level_names)}
        self._units = {gate.metric: gate.unit for gate in counted}
        self._groupings: dict[str, Grouping] = {}

    # -- who counts --------------------------------------------------------------------------------

    def enrol(self, wave: int, hardware: str, band: int, exposed: bool) -> int:
        """The new unit's number."""
        unit = self.units
        self._room(unit + 1)
        self.units += 1
        self._cell[unit] = self._cells.setdefault((wave, hardware), len(self._cells))
        key = (wave, hardware, band)
        self._stratum[unit] = self._strata.setdefault(key, len(self._strata))
        self._exposed[unit] = exposed
        return unit

    def enrol_all(self, wave: int, hardware: Sequence[str], band: int, exposed: bool) -> Ints:
        """The numbers of new units of one wave, one for each entry of `hardware`."""
        units = [self.enrol(wave, kind, band, exposed) for kind in hardware]
        return np.array(units, dtype=np.int64)

    def now(self, name: str) -> Floats:
        return self._column(self._now, name)

    def past(self, name: str) -> Floats:
        return self._column(self._past, name)

    # -- folding -----------------------------------------------------------------------------------

    def fold(self, rollup: Rollup) -> None:
        """Count messages in; late ones meet the risk set of their own tick."""
        if rollup.unit.size == 0:
            return
        sign = rollup.sign
        self._add(self.now("hours"), rollup.unit, sign * rollup.hours)
        for name, amount in rollup.exposure.items():
            self._add(self.now(f"exposure {name}"), rollup.unit, sign * amount)
        for name, (n, total) in rollup.levels.items():
            self._add(self.now(f"n {name}"), rollup.unit, sign * n)
            self._add(self.now(f"sum {name}"), rollup.unit, sign * total)
        if sign > 0:
            self._appear(rollup.unit, rollup.tick)
        self._befall(rollup)
        for name, count in rollup.counts.items():
            some = np.flatnonzero(count > 0)
            late = rollup.tick - self._since[rollup.unit] >= self.late_ticks
            if late.any():
                self._add_late(name, rollup, count, late)
            if some.size:
                unit, number = rollup.unit[some], count[some]
                self._add(self.now(f"events {name}"), unit, sign * number)
                self._add(self.now(f"eventful {name}"), unit, np.full(some.size, float(sign)))
                self._happen(name, unit, rollup.tick[some], sign * number)

    def _add_late(
        self, name: str, rollup: Rollup, count: Ints, late: npt.NDArray[np.bool_]
    ) -> None:
        unit, sign = rollup.unit[late], rollup.sign
        exposure = self._exposure_of(name, rollup)[late]
        self._add(self.now(f"late hours {name}"), unit, sign * exposure)
        self._add(self.now(f"late events {name}"), unit, sign * count[late])
        self._add(self.now(f"late eventful {name}"), unit, sign * (count[late] > 0))

    def _exposure_of(self, name: str, rollup: Rollup) -> Floats:
        unit = self._units[name]
        return rollup.hours if unit == "device_hour" else rollup.exposure[unit]

    def _befall(self, rollup: Rollup) -> None:
        column, sign = rollup.tick - (self._start or 0), rollup.sign
        for name, (n, total) in rollup.levels.items():
            self._shocks[name].add(column, (sign * n, sign * total))
        for name, count in rollup.counts.items():
            hours = self._exposure_of(name, rollup)
            eventful = (count > 0).astype(np.float64)
            self._shocks[name].add(column, (sign * hours, sign * count, sign * eventful))

    def absent(self, unit: int, tick: int) -> None:
        """Nothing of this unit is left in this tick: it was not at risk then."""
        column = tick - (self._start or 0)
        if not self._present[unit, column]:
            return
        self._present[unit, column] = False
        self._seen[unit] -= 1
        for firsts in self._firsts.values():
            firsts.leave(unit, column, int(self._stratum[unit]), bool(self._exposed[unit]))
        for shocks in self._shocks.values():
            shocks.late(np.array([unit]), np.array([column]), -1)

    def _appear(self, unit: Ints, tick: Ints) -> None:
        self._reach(int(tick.min()), int(tick.max()))
        column = tick - (self._start or 0)
        new = ~self._present[unit, column]
        if not new.any():
            return
        width = self._present.shape[1]
        pairs = unit[new] * width + column[new]
        if (np.diff(pairs) <= 0).any():  # in no order, or twice
            pairs = np.unique(pairs)
        unit, column = pairs // width, pairs % width
        self._present[unit, column] = True
        np.add.at(self._seen, unit, 1)
        np.minimum.at(self._since, unit, column + (self._start or 0))
        for firsts in self._firsts.values():
            firsts.appear(unit, column, self._stratum[unit], self._exposed[unit])
        for shocks in self._shocks.values():
            shocks.late(unit, column, 1)

    def _happen(self, name: str, units: Ints, ticks: Ints, numbers: Ints) -> None:
        start, firsts = self._start or 0, self._firsts[name]
        for unit, tick, number in zip(
            units.tolist(), (ticks - start).tolist(), numbers.tolist(), strict=True
        ):
            firsts.happen(
                unit,
                tick,
                int(number),
                int(self._stratum[unit]),
                bool(self._exposed[unit]),
                self._present[unit],
            )

    # -- what was seen -----------------------------------------------------------------------------

    def first_events(self, metric: str) -> tuple[FirstEvents, ...]:
        firsts = self._firsts[metric]
        here = (self._seen[: self.units] > 0).astype(np.float64)
        risk = self._by_stratum(here[None])[0]
        found = []
        for (wave, hardware, band), s in sorted(self._strata.items()):
            d0, d1 = firsts.events(s)
            if d0 or d1:
                found.append(
                    FirstEvents(
                        wave=wave,
                        hardware=hardware,
                        band=band,
                        d1=d1,
                        d0=d0,
                        y1=int(risk[2 * s + 1]),
                        y0=int(risk[2 * s]),
                        curve=firsts.curve(s),
                    )
                )
        return tuple(found)

    def repeats(self, gate: Gate) -> tuple[tuple[ArmSums, ...], tuple[ArmSums, ...]]:
        """K3r: capped events against what the unit's own past makes expect; all, and the late ones.

        Late: from `late_ticks` after the unit's first report on. A fault that comes with time is
        not diluted by the quiet hours before it.
        """
        n = self.units
        what = self._vote_name(gate)
        hours, expected = self._expected(gate, what)
        usual, counted = self._usual(gate, what), 2 if what.startswith("eventful") else 1

        def common(tick: Floats, here: npt.NDArray[np.bool_]) -> float:
            return float((tick[counted] + RATE_PRIOR) / (tick[0] * usual + RATE_PRIOR))

        whole, later = self._common(gate.metric, common)
        per_hour = np.divide(expected, hours, out=np.zeros(n), where=hours > 0)
        late_hours = np.maximum(self.now(f"late hours {gate.metric}")[:n], 0.0)
        late = self.now(f"late {what}")[:n]
        return (
            self._capped(self.now(what)[:n], expected * whole, hours > 0),
            self._capped(late, late_hours * per_hour * later, late_hours > 0),
        )

    def _capped(
        self, events: Floats, expected: Floats, use: npt.NDArray[np.bool_]
    ) -> tuple[ArmSums, ...]:
        capped = np.minimum(np.maximum(events, 0.0), self._cap(expected))
        return self._sums(capped, expected, use & (expected > 0))

    def bands(self, gate: Gate) -> tuple[BandSums, ...]:
        """Capped events and exposure of each stratum of the draw, for the fleet-level number."""
        n = self.units
        what = f"events {gate.metric}"
        x, expected = self._expected(gate, what)
        y = np.minimum(np.maximum(self.now(what)[:n], 0.0), self._cap(expected))
        use = (x > 0).astype(np.float64)
        y = y * use
        sums = self._by_stratum(np.stack([use, y, x, y * y, x * y, x * x]))

        def arm(at: int) -> Sums:
            m, y, x, yy, xy, xx = sums[:, at].tolist()
            return Sums(n=m, y=y, x=x, yy=yy, xy=xy, xx=xx)

        return tuple(
            BandSums(
                wave=wave,
                hardware=hardware,
                band=band,
                exposed=arm(2 * s + 1),
                control=arm(2 * s),
            )
            for (wave, hardware, band), s in sorted(self._strata.items())
        )

    def levels(self, gate: Gate) -> tuple[ArmSums, ...]:
        """K3: the unit's mean against its own mean before; without one, its stratum's usual."""
        n = self.units
        number = self.now(f"n {gate.metric}")[:n]
        use = (number > 0) & (self.now("hours")[:n] >= self._engine.level_min_hours)
        y = np.divide(self.now(f"sum {gate.metric}")[:n], number, out=np.zeros(n), where=use)
        many = self.past(f"n {gate.metric}")[:n]
        known = use & (many > 0)
        x = np.divide(self.past(f"sum {gate.metric}")[:n], many, out=np.zeros(n), where=known)
        cell, cells = self._cell[:n], len(self._cells)
        with_past = _by(cell, known.astype(np.float64), cells)
        usual = np.divide(
            _by(cell, x * known, cells), with_past, out=np.zeros(cells), where=with_past > 0
        )
        own = np.where(known, x, usual[cell])

        def common(tick: Floats, here: npt.NDArray[np.bool_]) -> float:
            units = int(here.sum())
            if units == 0 or tick[0] <= 0:
                return 0.0
            usually = float(own[here].mean())
            return float((tick[1] / tick[0] - usually) * units / (units + LEVEL_PRIOR))

        return self._sums(y - self._common(gate.metric, common)[0], own, use)

    def totals(self, gate: Gate) -> tuple[ArmTotals, ...]:
        n, firsts = self.units, self._firsts[gate.metric]
        budget = gate.budget_rate()
        rate, unit = budget if budget is not None else (0.0, gate.unit)
        exposure = np.maximum(self._amount(self._now, unit), 0.0)
        events = np.maximum(self.now(f"events {gate.metric}")[:n], 0.0)
        share: Floats | float = 1.0
        if budget is not None:
            share = firsts.share_at_risk(self._present, self._seen[:n])
        y = np.minimum(events, self._cap(exposure * rate))
        votes = np.stack(
            [
                self.now("hours")[:n] > 0,
                firsts.has(n),
                events,
                np.maximum(self._amount(self._now, gate.unit), 0.0),
                exposure * share,
                y,
                exposure,
                y * y,
                y * exposure,
                exposure * exposure,
            ]
        ).astype(np.float64)
        return tuple(
            ArmTotals(
                wave=wave,
                hardware=hardware,
                arm=arm,
                devices=int(v[0]),
                first=int(v[1]),
                events=int(v[2]),
                exposure=v[3],
                at_risk=v[4],
                budget_sums=Sums(n=m, y=v[5], x=v[6], yy=v[7], xy=v[8], xx=v[9]),
            )
            for wave, hardware, arm, m, v in self._by_arm(votes)
        )

    def arms(self) -> tuple[ArmSeen, ...]:
        hours = np.maximum(self.now("hours")[: self.units], 0.0)
        return tuple(
            ArmSeen(
                wave=wave,
                hardware=hardware,
                arm=arm,
                enrolled=int(m),
                reporting=int(v[0]),
                hours=v[1],
            )
            for wave, hardware, arm, m, v in self._by_arm(np.stack([hours > 0, hours]))
        )

    # -- sums --------------------------------------------------------------------------------------

    def _expected(self, gate: Gate, what: str) -> tuple[Floats, Floats]:
        """(exposure, events to expect in it): the unit's own past, shrunk to the fleet's rate."""
        n, prior = self.units, self._engine.repeat_prior
        hours = np.maximum(self._amount(self._now, gate.unit), 0.0)
        before = np.maximum(self.past(what)[:n], 0.0)
        past = np.maximum(self._amount(self._past, gate.unit), 0.0)
        return hours, hours * (before + prior) / (past + prior / self._usual(gate, what))

    def _vote_name(self, gate: Gate) -> str:
        """Rare events come in bursts: a message with one counts once, however many it reports.
        Where most messages have some, the number is the news."""
        n, metric = self.units, gate.metric
        eventful, ticks = self.now(f"eventful {metric}")[:n], self._seen[:n]
        control = ~self._exposed[:n]
        before, messages = self.past(f"eventful {metric}")[:n], self.past("messages")[:n]
        many, of = float(before.sum()), float(messages.sum())
        if of <= 0:  # no past: the controls' present
            many, of = float(eventful[control].sum()), float(ticks[control].sum())
        sparse = many <= self._engine.sparse_share * of
        return f"{'eventful' if sparse else 'events'} {metric}"

    def _common(
        self, metric: str, part: Callable[[Floats, npt.NDArray[np.bool_]], float]
    ) -> tuple[Floats, Floats]:
        since = np.minimum(self._since[: self.units], NEVER // 4) - (self._start or 0)
        late_from = since + min(self.late_ticks, NEVER // 4)
        return self._shocks[metric].of(self._present, late_from, part)

    def _usual(self, gate: Gate, what: str) -> float:
        """The fleet's own rate: the enrolled units' past, else the controls' present."""
        n = self.units
        events, hours = np.maximum(self.now(what)[:n], 0), self._amount(self._now, gate.unit)
        control = ~self._exposed[:n]
        for many, of in (
            (np.maximum(self.past(what)[:n], 0), self._amount(self._past, gate.unit)),
            (events[control], hours[control]),
            (events, hours),
        ):
            number, exposure = float(many.sum()), float(of.sum())
            if number > 0 and exposure > 0:
                return number / exposure
        return 1.0

    def _cap(self, expected: Floats) -> Floats:
        engine = self._engine
        return np.asarray(engine.repeat_cap + engine.repeat_cap_per * np.ceil(expected))

    def _amount(self, columns: dict[str, Floats], unit: str) -> Floats:
        name = "hours" if unit == "device_hour" else f"exposure {unit}"
        return self._column(columns, name)[: self.units]

    def _sums(self, y: Floats, x: Floats, use: npt.NDArray[np.bool_]) -> tuple[ArmSums, ...]:
        votes = np.stack([use, y, x, y * y, x * y, x * x]) * use
        cells: dict[tuple[int, str], dict[str, Sums]] = {}
        for wave, hardware, arm, _, v in self._by_arm(votes):
            if v[0]:
                sums = Sums(n=v[0], y=v[1], x=v[2], yy=v[3], xy=v[4], xx=v[5])
                cells.setdefault((wave, hardware), {})[arm] = sums
        return tuple(
            ArmSums(
                wave=wave,
                hardware=hardware,
                exposed=arms.get("exposed", Sums()),
                control=arms.get("control", Sums()),
            )
            for (wave, hardware), arms in sorted(cells.items())
        )

    def _by_arm(self, votes: Floats) -> list[tuple[int, str, str, float, list[float]]]:
        """(wave, hardware, arm, units, sums of each row of `votes`) of the arms that exist."""
        arms = self._grouping("arms", self._cell, len(self._cells))
        units, sums = arms.sizes, arms.sums(votes)
        return [
            (wave, hardware, arm, float(units[at]), sums[:, at].tolist())
            for (wave, hardware), cell in sorted(self._cells.items())
            for arm, at in (("control", 2 * cell), ("exposed", 2 * cell + 1))
            if units[at]
        ]

    def _by_stratum(self, rows: Floats) -> Floats:
        """Sums of each row by (stratum, arm): column 2 s + exposed."""
        return self._grouping("strata", self._stratum, len(self._strata)).sums(rows)

    def _grouping(self, name: str, of: Ints, many: int) -> Grouping:
        """Units by (cell or stratum, arm); made anew when units were added."""
        n, held = self.units, self._groupings.get(name)
        if held is None or held.units != n:
            held = Grouping(of[:n] * 2 + self._exposed[:n], 2 * many)
            self._groupings[name] = held
        return held

    # -- room --------------------------------------------------------------------------------------

    def _column(self, columns: dict[str, Floats], name: str) -> Floats:
        held = columns.get(name)
        if held is None or held.size < self._cell.size:
            grown = np.zeros(self._cell.size)
            if held is not None:
                grown[: held.size] = held
            columns[name] = held = grown
        return held

    def _add(self, column: Floats, unit: Ints, amount: npt.NDArray[Any]) -> None:
        column[: self.units] += np.bincount(unit, weights=amount, minlength=self.units)

    def _room(self, units: int) -> None:
        size = self._cell.size
        if units <= size:
            return
        more = max(size, units - size)
        for name in ("_cell", "_stratum", "_exposed", "_seen"):
            setattr(self, name, np.pad(getattr(self, name), (0, more)))
        self._since = np.pad(self._since, (0, more), constant_values=NEVER)
        self._present = np.pad(self._present, ((0, more), (0, 0)))

    def _reach(self, first: int, last: int) -> None:
        """Room for these ticks; the first column moves back for data older than any before."""
        if self._start is None:
            self._start = first
        before = max(0, self._start - first)
        columns = self._present.shape[1]
        after = max(0, last - self._start - columns + 1)
        if before or after:
            grown = (before, max(after, columns) if after else 0)
            self._present = np.pad(self._present, ((0, 0), grown))
            self._start -= before
            for firsts in self._firsts.values():
                firsts.shift(before)
            for shocks in self._shocks.values():
                shocks.shift(before)


def observe(
    tally: Tally, counted: Sequence[Gate], levels: Sequence[Gate], logged: Collection[str] = ()
) -> Observations:
    """What the gate judges, as it stands."""
    metrics: dict[str, MetricSeen] = {}
    for gate in counted:
        repeats, late = tally.repeats(gate) if gate.type is GateType.RATE else ((), ())
        metrics[gate.metric] = MetricSeen(
            metric=gate.metric,
            firsts=tally.first_events(gate.metric),
            repeats=repeats,
            late=late,
            totals=tally.totals(gate),
            bands=tally.bands(gate) if gate.type is GateType.RATE else (),
        )
    for gate in levels:
        metrics[gate.metric] = MetricSeen(
            metric=gate.metric, levels=tally.levels(gate), logged=gate.metric in logged
        )
    return Observations(arms=tally.arms(), metrics=metrics)


def _by(slot: Ints, votes: npt.NDArray[Any], slots: int) -> Floats:
    result: Floats = np.bincount(slot, weights=votes, minlength=slots).astype(
        np.float64, copy=False
    )
    return result
