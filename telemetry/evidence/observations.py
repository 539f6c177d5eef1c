"""What the ledger hands to the gate: counts and sums, no devices; small enough to store.

Frozen data with a JSON round trip, so that a recorded decision can be judged again. Everything
here adds: two shards' observations of different devices merge by `merge`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from telemetry.evidence.levels import Sums
from telemetry.policy import built, plain


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstEvents:
    """First events of one stratum over all its ticks: their K2 curve, and the counts beside it.

    `curve` is ℓ on `curves.ratio_grid`, each tick against its own risk set; () says nothing.
    """

    wave: int
    hardware: str
    band: int
    d1: int  # updated devices with a first event
    d0: int
    y1: int  # updated devices that were ever at risk
    y0: int
    curve: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmSums:
    """One metric in one (wave, hardware): both arms' sums."""

    wave: int
    hardware: str
    exposed: Sums
    control: Sums


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmTotals:
    """One metric in one arm of (wave, hardware), as people want to read it."""

    wave: int
    hardware: str
    arm: str  # exposed | control
    devices: int  # that reported
    first: int  # devices with at least one event
    events: int  # all of them
    exposure: float  # in the gate's unit
    at_risk: float  # exposure in the budget's unit, up to the first event
    budget_sums: Sums  # y = capped events, x = exposure in the budget's unit


@dataclass(frozen=True, slots=True, kw_only=True)
class BandSums:
    """One metric in one stratum of the draw: y = capped events, x = exposure in its unit."""

    wave: int
    hardware: str
    band: int  # score quintile 0–4; −1: unscored
    exposed: Sums
    control: Sums


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricSeen:
    metric: str
    firsts: tuple[FirstEvents, ...] = ()
    repeats: tuple[ArmSums, ...] = ()
    late: tuple[ArmSums, ...] = ()  # the repeats of units that have been enrolled for a while
    levels: tuple[ArmSums, ...] = ()
    totals: tuple[ArmTotals, ...] = ()
    bands: tuple[BandSums, ...] = ()
    logged: bool = False  # levels were taken as logarithms


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmSeen:
    """How many devices of one arm are enrolled, and how many of them reported."""

    wave: int
    hardware: str
    arm: str
    enrolled: int
    reporting: int
    hours: float  # device hours reported


@dataclass(frozen=True, slots=True, kw_only=True)
class Observations:
    arms: tuple[ArmSeen, ...] = ()
    metrics: Mapping[str, MetricSeen] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = plain(self)
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Observations:
        """Raises ValueError for what `to_json` cannot have written."""
        observations: Observations = built(cls, data, "observations")
        return observations

    def metric(self, name: str) -> MetricSeen:
        return self.metrics.get(name, MetricSeen(metric=name))


def merge(parts: Iterable[Observations]) -> Observations:
    """Observations of different devices, added: shards that saw the same strata."""
    parts = list(parts)
    names = dict.fromkeys(name for part in parts for name in part.metrics)
    return Observations(
        arms=_arms([arm for part in parts for arm in part.arms]),
        metrics={name: _metric(name, [part.metric(name) for part in parts]) for name in names},
    )


def _metric(name: str, parts: list[MetricSeen]) -> MetricSeen:
    return MetricSeen(
        metric=name,
        firsts=_firsts([first for part in parts for first in part.firsts]),
        repeats=_sums([sums for part in parts for sums in part.repeats]),
        late=_sums([sums for part in parts for sums in part.late]),
        levels=_sums([sums for part in parts for sums in part.levels]),
        totals=_totals([total for part in parts for total in part.totals]),
        bands=_bands([band for part in parts for band in part.bands]),
        logged=any(part.logged for part in parts),
    )


def _arms(arms: list[ArmSeen]) -> tuple[ArmSeen, ...]:
    found: dict[tuple[int, str, str], ArmSeen] = {}
    for arm in arms:
        key = (arm.wave, arm.hardware, arm.arm)
        old = found.get(key)
        found[key] = (
            arm
            if old is None
            else ArmSeen(
                wave=arm.wave,
                hardware=arm.hardware,
                arm=arm.arm,
                enrolled=old.enrolled + arm.enrolled,
                reporting=old.reporting + arm.reporting,
                hours=old.hours + arm.hours,
            )
        )
    return tuple(found[key] for key in sorted(found))


def _firsts(parts: list[FirstEvents]) -> tuple[FirstEvents, ...]:
    """A shard's devices are a stratum of their own at every tick: the curves add."""
    found: dict[tuple[int, str, int], FirstEvents] = {}
    for part in parts:
        key = (part.wave, part.hardware, part.band)
        found[key] = part if key not in found else _both(found[key], part)
    return tuple(found[key] for key in sorted(found))


def _both(a: FirstEvents, b: FirstEvents) -> FirstEvents:
    return replace(
        a,
        d1=a.d1 + b.d1,
        d0=a.d0 + b.d0,
        y1=a.y1 + b.y1,
        y0=a.y0 + b.y0,
        curve=_added(a.curve, b.curve),
    )


def _added(a: tuple[float, ...], b: tuple[float, ...]) -> tuple[float, ...]:
    if not a or not b:
        return a or b
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _sums(parts: list[ArmSums]) -> tuple[ArmSums, ...]:
    found: dict[tuple[int, str], ArmSums] = {}
    for part in parts:
        key = (part.wave, part.hardware)
        old = found.get(key)
        found[key] = (
            part
            if old is None
            else ArmSums(
                wave=part.wave,
                hardware=part.hardware,
                exposed=old.exposed + part.exposed,
                control=old.control + part.control,
            )
        )
    return tuple(found[key] for key in sorted(found))


def _bands(parts: list[BandSums]) -> tuple[BandSums, ...]:
    found: dict[tuple[int, str, int], BandSums] = {}
    for part in parts:
        key = (part.wave, part.hardware, part.band)
        old = found.get(key)
        found[key] = (
            part
            if old is None
            else replace(
                part, exposed=old.exposed + part.exposed, control=old.control + part.control
            )
        )
    return tuple(found[key] for key in sorted(found))


def _totals(parts: list[ArmTotals]) -> tuple[ArmTotals, ...]:
    found: dict[tuple[int, str, str], ArmTotals] = {}
    for part in parts:
        key = (part.wave, part.hardware, part.arm)
        old = found.get(key)
        found[key] = (
            part
            if old is None
            else ArmTotals(
                wave=part.wave,
                hardware=part.hardware,
                arm=part.arm,
                devices=old.devices + part.devices,
                first=old.first + part.first,
                events=old.events + part.events,
                exposure=old.exposure + part.exposure,
                at_risk=old.at_risk + part.at_risk,
                budget_sums=old.budget_sums + part.budget_sums,
            )
        )
    return tuple(found[key] for key in sorted(found))
