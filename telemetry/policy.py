"""The HealthPolicy's types: what is measured, how much harm is too much, how sure we must be.

Only frozen data and its JSON form. `controller.manifests` builds it from text, `telemetry.score`
and `telemetry.evidence` read it, `controller.rollout.gate` decides by it. Every number of the
design has a field here with its default, so that no threshold hides in code.

Units: shares are 0…1, times are seconds unless the name or type says otherwise. A rate's unit is
written `device_hour`, `km`, `1000km`, `1000h`; `unit_of` takes it apart.
"""

from __future__ import annotations

import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from datetime import timedelta
from enum import StrEnum
from functools import cache
from typing import Any

UPDATE_OK = "update_ok"  # the proportion that the loop counts itself: installed, booted, confirmed

_PER = re.compile(r"(\d+(?:\.\d+)?)?([a-z][a-z0-9_]*)")
_HOURS = frozenset({"h", "hour", "hours", "device_hour", "device_hours"})


class GateType(StrEnum):
    PROPORTION = "proportion"  # a share of devices: update_ok
    RATE = "rate"  # events per exposure, compared by device
    EVENT = "event"  # so grave that a few devices are enough: a tripwire
    MEAN = "mean"  # a level: temperature, latency, CPU


class Direction(StrEnum):
    """Which way harm lies."""

    INCREASE = "increase"
    DECREASE = "decrease"


class NoData(StrEnum):
    """What missing data means. Never a pass."""

    INCONCLUSIVE = "inconclusive"


class Preset(StrEnum):
    LINEAR = "linear"
    PIF = "pif"
    TESLA_2021 = "tesla-2021"
    REGRESSION = "regression"  # pif with multipliers fitted to the fleet's own `target` events


@dataclass(frozen=True, slots=True, kw_only=True)
class Margin:
    """The harm that must be refuted before a wave widens."""

    ratio: float | None = None  # exposed ÷ control; > 1
    absolute: float | None = None  # exposed − control in the metric's units; or a share; > 0

    def __post_init__(self) -> None:
        _require(self.ratio is None or _finite(self.ratio) > 1, "margin.ratio must be above 1")
        _require(
            self.absolute is None or _finite(self.absolute) > 0, "margin.absolute must be above 0"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """One guardrail of the policy."""

    metric: str
    type: GateType
    per: str | None = None  # rate: exposure unit, e.g. device_hour, 1000km
    direction: Direction = Direction.INCREASE
    margin: Margin = field(default_factory=Margin)
    budget: Mapping[str, float] = field(default_factory=dict)  # {per_1000h: 40}, {share: 0.02}
    tripwire_devices: int | None = None  # event: this many distinct devices roll back
    dry_run: bool = False  # judged and shown, never acted on

    def __post_init__(self) -> None:
        _require(bool(self.metric), "a gate needs a metric")
        for name, value in self.budget.items():
            _require(_finite(value) > 0, f"budget.{name} must be above 0")
            _require(
                name == "share" or name.startswith("per_"),
                f"budget.{name}: write per_<amount><unit>, e.g. per_1000h or per_1000km, or share",
            )
        _require(
            self.tripwire_devices is None or self.tripwire_devices >= 1,
            "tripwire.devices must be 1 or more",
        )
        if self.per is not None:
            unit_of(self.per)

    @property
    def unit(self) -> str:
        """The exposure unit of a rate: device_hour where none is declared."""
        return unit_of(self.per or "device_hour")[1]

    @property
    def scale(self) -> float:
        """How much of the unit a shown rate refers to: 1000 for `1000km`."""
        return unit_of(self.per or "device_hour")[0]

    def budget_rate(self) -> tuple[float, str] | None:
        """(events per one unit, unit) of the declared absolute budget, if there is one."""
        for name, value in self.budget.items():
            if name.startswith("per_"):
                amount, unit = unit_of(name.removeprefix("per_"))
                return value / amount, unit
        return None

    @property
    def budget_share(self) -> float | None:
        return self.budget.get("share")


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """How the error budget α is shared out. Normalised over the guardrails that are judged."""

    outcome: float = 0.20
    lost: float = 0.10
    silence: float = 0.20
    events: float = 0.25  # shared by the rate gates
    levels: float = 0.25  # shared by the mean gates

    def __post_init__(self) -> None:
        values = (self.outcome, self.lost, self.silence, self.events, self.levels)
        _require(all(_finite(v) >= 0 for v in values), "weights must be 0 or more")
        _require(0 < sum(values) <= 1 + 1e-9, "weights must sum to at most 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """Every number of the decision engine (docs: decisions)."""

    # of a guardrail's evidence: all hardware together; the rest: each by itself
    pooled_share: float = 0.6  # shares of devices: one bricked hardware is the usual fault
    pooled_rate: float = 0.8  # rates and levels
    alpha: float = 0.05  # P(ever rolling back a harmless release) ≤ alpha
    beta: float = 0.10  # P(widening a wave whose harm reaches the margin) ≤ beta
    weights: Weights = field(default_factory=Weights)

    # K1, shares of devices
    failed_budget: float = 0.005  # p0 when neither rollout nor history says otherwise
    lost_budget: float = 0.001  # p0 of "last word ACTIVATING"
    history_bound: float = 0.80  # p0 ≥ this upper bound of the last releases' failures
    history_releases: int = 5
    history_started: int = 1_000  # devices from which the fleet's own past replaces the budgets
    history_floor: float = 0.0003  # no budget below this, however clean the past
    quick_share: float = 0.5  # of an outcome's evidence: the exact count of early failures
    share_points: int = 160
    share_low: float = 1e-4
    share_high: float = 0.95
    share_prior: float = math.log(6)  # half-normal scale of log(p/p0)

    # K2 first events and K3r repeat rate
    ratio_points: int = 121
    ratio_low: float = 0.05
    ratio_high: float = 20.0
    ratio_prior: float = math.log(2)  # half-normal scale of log(ratio)
    first_weight: float = 0.2  # of a rate's evidence: first events
    late_weight: float = 0.2  # … repeat rate of devices enrolled for `late_hours`; the rest: of all
    late_hours: float = 24.0
    first_share_limit: float = 0.20  # above: `safe` listens to the repeat rate alone
    repeat_prior: float = 0.5  # pseudo-events of a device's own baseline
    repeat_cap: int = 2  # a device's events count up to cap + cap_per × ⌈expected⌉
    repeat_cap_per: int = 3
    repeat_min_events: int = 10  # per arm
    safe_min_events: int = 10  # of each arm, were the release at its margin
    repeat_own_events: int = 40  # per arm, from which on a hardware's repeats are compared alone
    modest_ratio: float = 1.5  # of a repeat rate: the rise that half of its evidence bets on
    modest_weight: float = 0.5
    sparse_share: float = 0.20  # of messages with an event: up to here a message counts once
    baseline_days: float = 14.0  # own pre-period, at most

    # K3 levels
    winsor: float = 0.001  # share cut at each end, by pre-period limits
    skew_limit: float = 2.0  # above: logarithm first
    level_min_hours: float = 2.0  # devices with less are left out

    # margins of wave 1, 2, 3 and later: they loosen early because the blast radius is small
    ratio_margins: tuple[float, ...] = (4.0, 2.0, 1.5)
    failed_margins: tuple[float, ...] = (0.08, 0.04, 0.025)
    lost_margins: tuple[float, ...] = (0.10, 0.06, 0.05)  # failed or lost
    level_loosening: tuple[float, ...] = (2.5, 1.5, 1.0)  # × the gate's own margin

    # silence
    silent_heartbeats: float = 6.0
    silent_quantile: float = 0.999  # of the device's own gaps
    silent_cap_hours: float = 24.0
    late_heartbeats: float = 2.0  # a tick closes after these

    # controls and soak
    controls_per_device: int = 5
    controls_cap: int = 5_000
    min_soak_hours: float = 24.0
    max_soak_hours: float = 72.0
    band_floor: int = 5  # devices per arm below which a score band is warned about
    sample_ratio_level: float = 0.001  # p-value below which arms report unevenly: `invalid`

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            value = getattr(self, name)
            _require(0 < _finite(value) <= 0.5, f"engine.{name} must be in (0, 0.5]")
        for name in ("failed_budget", "lost_budget", "first_share_limit"):
            value = getattr(self, name)
            _require(0 < _finite(value) < 1, f"engine.{name} must be in (0, 1)")
        _require(_finite(self.modest_ratio) > 1, "engine.modest_ratio must be above 1")
        _require(0 <= _finite(self.modest_weight) <= 1, "engine.modest_weight must be in [0, 1]")
        for name in ("ratio_margins", "failed_margins", "lost_margins", "level_loosening"):
            values = getattr(self, name)
            _require(
                len(values) > 0 and all(_finite(v) > 0 for v in values),
                f"engine.{name} must list positive numbers",
            )
        _require(all(r > 1 for r in self.ratio_margins), "engine.ratioMargins must be above 1")
        _require(
            self.share_points >= 20 and 0 < self.share_low < self.share_high < 1,
            "engine: the grid of shares must have 20 points or more inside (0, 1)",
        )
        _require(
            self.ratio_points >= 21 and 0 < self.ratio_low < 1 < self.ratio_high,
            "engine: the grid of ratios must have 21 points or more around 1",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor:
    """One part of the device score. `linear`: no penalty at `good`, all of `weight` at `bad`."""

    metric: str
    per: str = "device_hour"
    good: float = 0.0
    bad: float = 1.0
    weight: float = 1.0
    multiplier: float | None = None  # pif: the risk grows by this factor per unit of x
    cap: float | None = None  # pif: x counts up to here

    def __post_init__(self) -> None:
        unit_of(self.per)
        for name in ("good", "bad", "weight"):
            _finite(getattr(self, name))
        _require(self.good != self.bad, f"score factor {self.metric}: good and bad are equal")
        _require(self.weight >= 0, f"score factor {self.metric}: weight must be 0 or more")
        for name in ("multiplier", "cap"):
            value = getattr(self, name)
            _require(
                value is None or _finite(value) > 0,
                f"score factor {self.metric}: {name} must be above 0",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreSpec:
    preset: Preset = Preset.LINEAR
    window: timedelta = timedelta(days=30)
    min_exposure: float = 20.0  # device hours; a device with less is unscored, never "100"
    factors: tuple[Factor, ...] = ()
    target: str | None = None  # regression: the counter whose rate the factors shall predict


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """A HealthPolicy as the evidence and the gate read it."""

    name: str
    score: ScoreSpec = field(default_factory=ScoreSpec)
    gates: tuple[Gate, ...] = ()
    engine: Engine = field(default_factory=Engine)
    no_data: NoData = NoData.INCONCLUSIVE

    def __post_init__(self) -> None:
        names = [gate.metric for gate in self.gates]
        _require(len(set(names)) == len(names), f"policy {self.name}: a metric is gated twice")

    def of(self, *kinds: GateType) -> tuple[Gate, ...]:
        return tuple(gate for gate in self.gates if gate.type in kinds)

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = plain(self)
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Policy:
        """Raises ValueError for what `to_json` cannot have written."""
        policy: Policy = built(cls, data, "policy")
        return policy


def unit_of(per: str) -> tuple[float, str]:
    """`1000km` → (1000, "km"); `device_hour`, `h` → (1, "device_hour"); raises ValueError."""
    match = _PER.fullmatch(per)
    amount = float(match.group(1) or 1) if match else 0.0
    if match is None or not math.isfinite(amount) or amount <= 0:
        raise ValueError(f"{per!r} is no unit of exposure: write device_hour, km, 1000km, 1000h")
    unit = match.group(2)
    return amount, "device_hour" if unit in _HOURS else unit


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(f"{value} is not a number to decide by")
    return value


def _require(met: bool, message: str) -> None:
    if not met:
        raise ValueError(message)


# -- dataclasses ⇄ JSON: observations and cases use the same two functions -----------------------


def plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, StrEnum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value


@cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def built(hint: Any, data: Any, where: str) -> Any:
    """JSON → the annotated type; raises ValueError that names the place."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        if data is None and type(None) in typing.get_args(hint):
            return None
        inner = [arg for arg in typing.get_args(hint) if arg is not type(None)]
        return built(inner[0], data, where)
    if origin is tuple:
        if not isinstance(data, list):
            raise ValueError(f"{where}: a list is expected")
        item = typing.get_args(hint)[0]
        return tuple(built(item, part, f"{where}[{i}]") for i, part in enumerate(data))
    if is_dataclass(hint):
        return _built_dataclass(hint, data, where)
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(data, Mapping):
            raise ValueError(f"{where}: an object is expected")
        item = typing.get_args(hint)[1]
        return {str(key): built(item, part, f"{where}.{key}") for key, part in data.items()}
    return _scalar(hint, data, where)


def _built_dataclass(cls: Any, data: Any, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise ValueError(f"{where}: an object is expected")
    hints = _hints(cls)
    unknown = set(data) - set(hints)
    if unknown:
        raise ValueError(f"{where}: unknown field {sorted(unknown)[0]!r}")
    values = {name: built(hints[name], data[name], f"{where}.{name}") for name in data}
    try:
        return cls(**values)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from None


def _scalar(hint: Any, data: Any, where: str) -> Any:
    if hint is Any:
        return data
    if hint is timedelta or hint is float:
        if isinstance(data, bool) or not isinstance(data, int | float) or not math.isfinite(data):
            raise ValueError(f"{where}: a number is expected")
        return timedelta(seconds=data) if hint is timedelta else float(data)
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return hint(data)
    if not isinstance(data, hint) or (hint is int and isinstance(data, bool)):
        raise ValueError(f"{where}: {hint.__name__} is expected")
    return data
