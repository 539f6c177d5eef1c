"""Says beforehand what a plan can see: which rise, with which probability, by when, wave by wave.

Pure and seeded. Devices are simulated from the fleet's own past (rates and how they scatter,
exposure a day, hardware), and judged by the gate's own evidence at every look. A wave stands alone
here: what earlier waves have seen comes on top. Shares of failures need no dice: K1 is exact.

Model: device i has rate m·g_i, g_i ~ Gamma(mean 1, variance φ) (negative binomial counts: the
moments of the fleet's past give φ), events at random times, exposure drawn from the fleet's own
devices. Bursts within a device are in φ; shocks common to all devices are not modelled (both arms
meet them alike).
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from controller.rollout.gate import Case, Outcome, StepLimits, judge, needed
from telemetry.evidence import curves, guardrails, outcome
from telemetry.evidence.levels import Sums
from telemetry.evidence.observations import ArmSums, ArmTotals, FirstEvents, MetricSeen
from telemetry.policy import UPDATE_OK, Gate, GateType, Policy, plain
from telemetry.report import Totals

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

RISES = (1.2, 1.5, 2.0, 3.0)
SHARES = (0.02, 0.05, 0.1)  # of devices that fail
LOOKS = 24  # in a wave: the gate itself looks oftener
SURE = 0.8  # the probability that a sentence asks for
_QUANTILES = 64
_FAR = 0.03  # of the limit: below it two looks are left out
_AT_ONCE = 1_500_000  # simulated devices held in memory
_IDLE = 1.5  # standard errors below which no evidence can be near its limit
_KEPT = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """One rate of a fleet's past, in the gate's unit."""

    rate: float  # events per unit of exposure
    spread: float  # φ: variance of the devices' rates ÷ rate²
    past: float  # exposure of a device before, for its own baseline
    daily: tuple[float, ...]  # quantiles over devices of exposure a day; never empty


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """What is known of a fleet before a release."""

    devices: int
    rates: Mapping[str, Baseline] = field(default_factory=dict)  # by metric; absent: never seen
    hardware: Mapping[str, float] = field(default_factory=dict)  # name → share of the fleet


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedWave:
    exposed: int  # new devices of this wave
    control: int
    limits: StepLimits  # wave index, soaks in seconds, margins


@dataclass(frozen=True, slots=True, kw_only=True)
class Chance:
    """That a harm of this size is rolled back in the wave: by its soak, by its longest soak."""

    size: float  # a ratio of rates, or a share of devices that fail
    by_soak: float
    by_max: float
    hours: float | None  # after so many, SURE of the runs have rolled back; None: never


@dataclass(frozen=True, slots=True, kw_only=True)
class GatePower:
    metric: str
    chances: tuple[Chance, ...]
    proves: float | None  # that a harmless release passes this gate by the longest soak
    sentence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WavePower:
    wave: int
    exposed: int
    gates: tuple[GatePower, ...]

    @property
    def sentences(self) -> tuple[str, ...]:
        return tuple(gate.sentence for gate in self.gates)


def history(
    totals: Totals, policy: Policy, days: float, hardware: Mapping[str, float] | None = None
) -> History:
    """The fleet's past from its sums over `days`; devices that were never heard are not in it."""
    rates = {}
    for gate in policy.of(GateType.RATE):
        found = _baseline(totals, gate, days)
        if found is not None:
            rates[gate.metric] = found
    return History(devices=len(totals.devices), rates=rates, hardware=dict(hardware or {}))


def power(
    policy: Policy,
    waves: Sequence[PlannedWave],
    past: History,
    rises: Sequence[float] = RISES,
    runs: int = 200,
    seed: int = 1,
) -> tuple[WavePower, ...]:
    """What each wave can see; the same arguments give the same figures, the second time at once."""
    given = [plain(policy), [plain(wave) for wave in waves], plain(past), list(rises), runs, seed]
    key = json.dumps(given, sort_keys=True)
    if key not in _known:
        _known[key] = tuple(_wave(policy, wave, past, rises, runs, seed) for wave in waves)
        while len(_known) > _KEPT:
            _known.popitem(last=False)
    return _known[key]


_known: OrderedDict[str, tuple[WavePower, ...]] = OrderedDict()


def _wave(
    policy: Policy,
    wave: PlannedWave,
    past: History,
    rises: Sequence[float],
    runs: int,
    seed: int,
) -> WavePower:
    gates = [_of_failures(policy, wave)]
    for place, gate in enumerate(policy.of(GateType.RATE)):
        if gate.dry_run:
            continue
        dice = np.random.default_rng([seed, wave.limits.wave, place])
        gates.append(_of_rate(policy, gate, wave, past, rises, runs, dice))
    return WavePower(wave=wave.limits.wave, exposed=wave.exposed, gates=tuple(gates))


# -- failures: exact ------------------------------------------------------------------------------


def _of_failures(policy: Policy, wave: PlannedWave) -> GatePower:
    engine, n = policy.engine, wave.exposed
    weight, others = _standing(policy, wave, UPDATE_OK)
    limit = (1 / engine.alpha - others) / weight if weight > 0 else math.inf
    budget = engine.failed_budget
    enough = next((s for s in range(n + 1) if outcome.harm(engine, s, n, budget) >= limit), n + 1)
    found = []
    for share in SHARES:
        seen = 1 - outcome.at_most(enough - 1, n, share) if enough <= n else 0.0
        found.append(Chance(size=share, by_soak=seen, by_max=seen, hours=None))
    need = needed(policy, wave.limits)
    margin = wave.limits.margins.get("failed") or _of(engine.failed_margins, wave.limits.wave)
    if n < need["failed"]:
        sentence = (
            f"{n:,} devices cannot prove failed < {margin * 100:.3g} %: {need['failed']:,} are "
            "needed without a failure"
        )
    else:
        first = next((c for c in found if c.by_max >= SURE), found[-1])
        sentence = (
            f"with {n:,} devices, {first.size * 100:.3g} % failures are rolled back with "
            f"{first.by_max * 100:.0f} % probability ({enough} failures are enough)"
        )
    return GatePower(metric=UPDATE_OK, chances=tuple(found), proves=None, sentence=sentence)


def _standing(policy: Policy, wave: PlannedWave, metric: str) -> tuple[float, float]:
    """(the gate's weight, w·E of all other guardrails) of a wave in which nothing happens."""
    clean = (Outcome(wave=wave.limits.wave, hardware="", started=wave.exposed),)
    numbers = judge(Case(policy=policy, step=wave.limits, outcomes=clean)).numbers["guardrails"]
    others = sum(g["weight"] * (g["harm"] or 0.0) for name, g in numbers.items() if name != metric)
    return float(numbers[metric]["weight"]), float(others)


# -- rates: simulated -----------------------------------------------------------------------------


def _of_rate(
    policy: Policy,
    gate: Gate,
    wave: PlannedWave,
    past: History,
    rises: Sequence[float],
    runs: int,
    dice: np.random.Generator,
) -> GatePower:
    known = past.rates.get(gate.metric)
    shown = gate.metric.replace("_", " ")
    if known is None or wave.exposed == 0:
        why = "no history of it: the fleet's own rate decides" if known is None else "nobody new"
        return GatePower(metric=gate.metric, chances=(), proves=None, sentence=f"{shown}: {why}")
    soak = wave.limits.min_soak / 3600
    longest = max(soak, (wave.limits.max_soak or wave.limits.min_soak) / 3600)
    if longest <= 0:
        sentence = f"{shown}: without a soak nothing can be seen"
        return GatePower(metric=gate.metric, chances=(), proves=None, sentence=sentence)
    looks = _looks(soak, longest)
    weight, others = _standing(policy, wave, gate.metric)
    limit = (1 / policy.engine.alpha - others) / weight if weight > 0 else math.inf
    sizes = sorted({1.0, *rises})
    hours: dict[float, list[float]] = {size: [] for size in sizes}
    proven = 0
    step = max(1, min(runs, _AT_ONCE // (wave.exposed + wave.control)))
    for first in range(0, runs, step):
        some = min(step, runs - first)
        for size, batch in _batches(policy, gate, wave, past, known, sizes, looks, some, dice):
            for run in range(some):
                hours[size].append(_crossing(policy, gate, batch, run, limit))
                if size == 1.0:
                    proven += _passes(policy, gate, wave, batch, run)
    chances = tuple(_chance(size, hours[size], soak) for size in sorted(rises))
    proves = proven / runs
    return GatePower(
        metric=gate.metric,
        chances=chances,
        proves=proves,
        sentence=_sentence(shown, wave, chances, soak, longest, proves),
    )


@dataclass(frozen=True, slots=True)
class _Batch:
    """Simulated runs of one rise. Axes: run, look, hardware; curves also the grid."""

    names: tuple[str, ...]
    hours: Floats
    size: tuple[Ints, Ints]  # devices by hardware: exposed, control
    curve: Floats
    first: tuple[Floats, Floats]
    events: tuple[Floats, Floats]
    exposure: tuple[Floats, Floats]
    at_risk: tuple[Floats, Floats]
    capped: tuple[Floats, Floats]
    expected: tuple[Floats, Floats]
    capped2: tuple[Floats, Floats]
    cross: tuple[Floats, Floats]
    expected2: tuple[Floats, Floats]

    def seen(self, gate: Gate, run: int, look: int) -> MetricSeen:
        at = (run, look)
        firsts, repeats, totals = [], [], []
        for h, name in enumerate(self.names):
            d1, d0 = (int(f[at][h]) for f in self.first)
            n1, n0 = (int(size[h]) for size in self.size)
            if d1 or d0:
                firsts.append(
                    FirstEvents(
                        wave=0, hardware=name, band=0, d1=d1, d0=d0, y1=n1, y0=n0,
                        curve=tuple(self.curve[at][h].tolist()),
                    )
                )  # fmt: skip
            sums = [self._sums(arm, at, h) for arm in (0, 1)]
            repeats.append(ArmSums(wave=0, hardware=name, exposed=sums[0], control=sums[1]))
            for arm, word in enumerate(("exposed", "control")):
                n = int(self.size[arm][h])
                if n:
                    totals.append(self._total(arm, word, at, h, n, name, sums[arm]))
        return MetricSeen(
            metric=gate.metric, firsts=tuple(firsts), repeats=tuple(repeats), totals=tuple(totals)
        )

    def _sums(self, arm: int, at: tuple[int, int], h: int) -> Sums:
        return Sums(
            n=float(self.size[arm][h]),
            y=float(self.capped[arm][at][h]),
            x=float(self.expected[arm][at][h]),
            yy=float(self.capped2[arm][at][h]),
            xy=float(self.cross[arm][at][h]),
            xx=float(self.expected2[arm][at][h]),
        )

    def _total(
        self, arm: int, word: str, at: tuple[int, int], h: int, n: int, name: str, sums: Sums
    ) -> ArmTotals:
        exposure = float(self.exposure[arm][at][h])
        return ArmTotals(
            wave=0, hardware=name, arm=word, devices=n, first=int(self.first[arm][at][h]),
            events=int(self.events[arm][at][h]), exposure=exposure,
            at_risk=float(self.at_risk[arm][at][h]),
            budget_sums=Sums(n=n, y=sums.y, x=exposure, yy=sums.yy),
        )  # fmt: skip

    def idle(self, run: int, look: int) -> bool:
        """Is the evidence of harm certainly far from its limit? It spares most of the work."""
        at = (run, look)
        n1, n0 = (float(size.sum()) for size in self.size)
        if n0 <= 0:
            return False
        pairs = [(*(float(arm[at].sum()) for arm in table), n1, n0)
                 for table in (self.first, self.events)]  # fmt: skip
        for h in range(len(self.names)):
            one, zero = float(self.first[0][at][h]), float(self.first[1][at][h])
            pairs.append((one, zero, float(self.size[0][h]), float(self.size[1][h])))
        return not any(_more(*pair) for pair in pairs)


def _more(one: float, zero: float, n1: float, n0: float) -> bool:
    """Are there so many more in the exposed arm that the evidence may be near its limit?

    In standard errors of a share: where controls are few, few events too many weigh as much.
    """
    share = n1 / max(n1 + n0, 1.0)
    usual = (one + zero) * share
    return one - usual > _IDLE * math.sqrt(max(usual * (1 - share), 0.05))


def _batches(
    policy: Policy,
    gate: Gate,
    wave: PlannedWave,
    past: History,
    known: Baseline,
    sizes: Sequence[float],
    looks: Floats,
    runs: int,
    dice: np.random.Generator,
) -> Iterator[tuple[float, _Batch]]:
    """The same devices and controls under each rise, from no rise upwards."""
    names = tuple(sorted(past.hardware)) or ("",)
    shares = [past.hardware[name] for name in names] if past.hardware else [1.0]
    arms = [
        _Arm.made(n, names, shares, known, looks, runs, dice) for n in (wave.exposed, wave.control)
    ]
    control = arms[1].told(policy, known, looks)
    reached, one = 1.0, arms[0]
    for size in sizes:
        one = one.risen(known, size - reached, looks, dice)
        reached = size
        exposed = one.told(policy, known, looks)
        yield (
            size,
            _Batch(
                names=names,
                hours=looks,
                size=(one.sizes, arms[1].sizes),
                curve=_curves(policy, exposed["new"], control["new"], one.sizes, arms[1].sizes),
                **{name: (exposed[name], control[name]) for name in exposed if name != "new"},
            ),
        )


@dataclass(frozen=True, slots=True)
class _Arm:
    """Devices of one arm in all runs, flat: run after run. `kind`: hardware by place."""

    runs: int
    sizes: Ints
    kind: Ints  # of each device
    risk: Floats  # g·h: how much more than usual each device meets, in exposure a day
    daily: Floats
    expected: Floats  # a day, by its own past
    device: Ints  # of each event
    time: Floats  # hours

    @staticmethod
    def made(
        n: int,
        names: Sequence[str],
        shares: Sequence[float],
        known: Baseline,
        looks: Floats,
        runs: int,
        dice: np.random.Generator,
    ) -> _Arm:
        sizes = _split(n, shares)
        kind = np.tile(np.repeat(np.arange(len(names)), sizes), runs)
        count = runs * n
        daily = dice.choice(np.array(known.daily), count)
        shape = 1 / known.spread if known.spread > 1e-9 else math.inf
        own = dice.gamma(shape, 1 / shape, count) if math.isfinite(shape) else np.ones(count)
        before = dice.poisson(own * known.rate * known.past)
        prior = 0.5
        expected = daily * (before + prior) / (known.past + prior / known.rate)
        empty = _Arm(runs, sizes, kind, own * daily, daily, expected, _none(), np.zeros(0))
        return empty.risen(known, 1.0, looks, dice)

    def risen(self, known: Baseline, more: float, looks: Floats, dice: np.random.Generator) -> _Arm:
        """With the events that a rise adds; those that were there stay."""
        if more <= 0:
            return self
        longest = float(looks[-1])
        events = dice.poisson(self.risk * (more * known.rate * longest / 24))
        device = np.repeat(np.arange(events.size), events)
        time = dice.uniform(0, longest, device.size)
        return _Arm(
            self.runs, self.sizes, self.kind, self.risk, self.daily, self.expected,
            np.concatenate([self.device, device]), np.concatenate([self.time, time]),
        )  # fmt: skip

    def told(self, policy: Policy, known: Baseline, looks: Floats) -> dict[str, Floats]:
        """What the ledger would have counted at each look; arrays (run, look, hardware)."""
        engine, n = policy.engine, int(self.sizes.sum())
        kinds, shown = len(self.sizes), len(looks)
        devices = max(self.runs * n, 1)
        cell = (np.arange(self.runs * n) // max(n, 1)) * kinds + self.kind
        many = self.runs * kinds

        def by(values: Floats, at: Ints) -> Floats:
            sums: Floats = np.bincount(at, weights=values, minlength=many).astype(np.float64)
            return sums.reshape(self.runs, kinds)

        exposure, expected = by(self.daily, cell), by(self.expected, cell)
        expected2 = by(self.expected**2, cell)
        first = np.full(devices, np.inf)
        np.minimum.at(first, self.device, self.time)
        busy = np.flatnonzero(np.isfinite(first))
        place = np.full(devices, -1)
        place[busy] = np.arange(busy.size)
        bins = np.searchsorted(looks, self.time)
        counts = np.bincount(
            place[self.device] * shown + bins, minlength=busy.size * shown
        ).reshape(busy.size, shown)
        so_far = np.cumsum(counts, axis=1).astype(np.float64)
        days = looks / 24
        cap = (
            engine.repeat_cap + engine.repeat_cap_per * np.ceil(np.outer(self.expected[busy], days))
            if busy.size
            else so_far
        )
        capped = np.minimum(so_far, cap)
        at, when = cell[busy] if busy.size else _none(), np.searchsorted(looks, first[busy])
        one: dict[str, list[Floats]] = {
            k: [] for k in ("first", "new", "events", "exposure", "at_risk", "capped", "expected",
                            "capped2", "cross", "expected2")
        }  # fmt: skip
        for k, day in enumerate(days):
            had = (when <= k).astype(np.float64)
            lost = np.maximum(0.0, day - first[busy] / 24) * self.daily[busy] * had
            own = self.expected[busy] * day
            one["first"].append(by(had, at))
            one["new"].append(by((when == k).astype(np.float64), at))
            one["events"].append(by(so_far[:, k], at))
            one["exposure"].append(exposure * day)
            one["at_risk"].append(exposure * day - by(lost, at))
            one["capped"].append(by(capped[:, k], at))
            one["expected"].append(expected * day)
            one["capped2"].append(by(capped[:, k] ** 2, at))
            one["cross"].append(by(capped[:, k] * own, at))
            one["expected2"].append(expected2 * day * day)
        return {name: np.stack(parts, axis=1) for name, parts in one.items()}


def _curves(policy: Policy, new1: Floats, new0: Floats, n1: Ints, n0: Ints) -> Floats:
    """ℓ of first events after each look, each look a tick; shape (run, look, hardware, grid)."""
    grid = curves.ratio_grid(policy.engine)
    y1 = n1 - np.cumsum(new1, axis=1) + new1
    y0 = n0 - np.cumsum(new0, axis=1) + new0
    w = np.divide(y1, y1 + y0, out=np.zeros_like(y1), where=(y1 + y0) > 0)
    ell = new1[..., None] * np.log(grid) - (new1 + new0)[..., None] * np.log1p(
        w[..., None] * (grid - 1)
    )
    result: Floats = np.cumsum(ell, axis=1)
    return result


def _crossing(policy: Policy, gate: Gate, batch: _Batch, run: int, limit: float) -> float:
    """Hours until the evidence of harm reaches its limit; ∞ when it never does."""
    looks, next_look = len(batch.hours), 0
    for look, hour in enumerate(batch.hours):
        if look < next_look or batch.idle(run, look):
            continue
        harm = guardrails.rate_harm(policy.engine, gate, batch.seen(gate, run, look))
        if harm >= limit:
            return float(hour)
        if harm < limit * _FAR:  # it cannot be reached at once
            next_look = min(look + 3, looks - 1)
    return math.inf


def _passes(policy: Policy, gate: Gate, wave: PlannedWave, batch: _Batch, run: int) -> bool:
    margin = margin_of(policy, gate, wave.limits)
    seen = batch.seen(gate, run, len(batch.hours) - 1)
    safe = guardrails.rate(policy.engine, gate, seen, margin).safe
    return safe is not None and safe >= 1 / policy.engine.beta


def margin_of(policy: Policy, gate: Gate, limits: StepLimits) -> float:
    return float(needed(policy, limits)["gates"][gate.metric]["ratio"])


# -- parts ----------------------------------------------------------------------------------------


def _baseline(totals: Totals, gate: Gate, days: float) -> Baseline | None:
    counts, exposure = totals.counters.get(gate.metric), totals.exposure.get(gate.unit)
    if counts is None or exposure is None or days <= 0:
        return None
    use = np.isfinite(counts) & np.isfinite(exposure) & (exposure > 0) & (counts >= 0)
    n, h = counts[use], exposure[use]
    if n.size == 0 or n.sum() <= 0:
        return None
    rate = float(n.sum() / h.sum())
    expected = rate * h
    scatter = float(((n - expected) ** 2).sum() - expected.sum())
    spread = max(0.0, scatter / float((expected**2).sum()))
    daily = np.quantile(h / days, (np.arange(_QUANTILES) + 0.5) / _QUANTILES)
    daily *= float(h.mean()) / days / float(daily.mean())
    return Baseline(
        rate=rate, spread=min(spread, 100.0), past=float(h.mean()), daily=tuple(daily.tolist())
    )


def _looks(soak: float, longest: float) -> Floats:
    """Hours: evenly, and one of them at the soak itself."""
    even = np.linspace(longest / LOOKS, longest, LOOKS)
    even[int(np.argmin(np.abs(even - soak)))] = soak
    even[-1] = longest
    return np.unique(even)


def _chance(size: float, hours: Sequence[float], soak: float) -> Chance:
    when = np.array(hours)
    sure = float(np.quantile(when, SURE, method="higher"))
    return Chance(
        size=size,
        by_soak=float((when <= soak + 1e-9).mean()),
        by_max=float(np.isfinite(when).mean()),
        hours=sure if math.isfinite(sure) else None,
    )


def _sentence(
    shown: str,
    wave: PlannedWave,
    chances: Sequence[Chance],
    soak: float,
    longest: float,
    proves: float,
) -> str:
    good = next((c for c in chances if c.by_max >= SURE), None)
    if good is None:
        best = chances[-1]
        words = (
            f"with {wave.exposed:,} devices and {longest:g} h, even a {best.size:g}× rise of "
            f"{shown} is seen with {best.by_max * 100:.0f} % probability only"
        )
    else:
        hours = soak if good.by_soak >= SURE else longest
        chance = good.by_soak if good.by_soak >= SURE else good.by_max
        words = (
            f"with {wave.exposed:,} devices and {hours:g} h, a {good.size:g}× rise of {shown} is "
            f"seen with {chance * 100:.0f} % probability"
        )
    sure = f"{proves * 100:.0f} % probability"
    return f"{words}; a good release is proven within {longest:g} h with {sure}"


def _split(n: int, shares: Sequence[float]) -> Ints:
    whole = math.fsum(shares)
    edges = np.floor(n * np.cumsum([0.0, *shares]) / whole + 0.5)
    return np.diff(edges).astype(np.int64)


def _of(values: tuple[float, ...], wave: int) -> float:
    return values[min(max(wave, 0), len(values) - 1)]


def _none() -> Ints:
    return np.zeros(0, dtype=np.int64)
