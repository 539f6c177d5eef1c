"""K3: differences of means (levels) and of repeat rates (K3r), each device against its own past.

Decides δ and its variance V from sums over devices, and turns them into evidence:

    per stratum S = Σ δ/V, I = Σ 1/V;  ℓ(d) = dS − d²I/2
    E = 2 (1 + τ²I)^−½ exp(u²/2) Φ(u),  u = τS/√(1 + τ²I)     (half-normal prior, scale τ)
    F = the same with S → −(S − M·I)

δ is first replaced by the value with the same one-sided p under Student's t with Welch's degrees of
freedom (n₁ + n₀ − 3 would be far too many where 3 devices meet 3,000 controls), and no arm counts
as more certain than the fleet's usual scatter: few devices do not claim what only many can. A
repeat rate's degrees of freedom are the devices that its events came from, not those enrolled.
K3 is *replaced* each tick: it is a cumulative estimate.

Level: y = device mean since enrolment, x = its mean before; θ = pooled within-arm slope;
δ = mean₁(y − θx) − mean₀(y − θx), V = s₁²/n₁ + s₀²/n₀.
Repeat rate: O_i capped events, Ex_i expected from the device's own baseline;
δ = log[(ΣO₁/ΣEx₁)/(ΣO₀/ΣEx₀)], V = Σ_arm Σ_i (O_i − L·Ex_i)² / (ΣO)², L = ΣO/ΣEx; an arm's part
of V is no less than max(φ, 1 + c²·ΣO²/ΣO)/ΣO, φ and c² from all arms (`_Scatter`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

from telemetry.evidence.curves import bounded
from telemetry.policy import Engine

_NORMAL = NormalDist()
_MANY = 1e4  # degrees of freedom that make Student's t a normal
_LEAN = 30.0  # devices with events from which on an arm's own scatter outweighs that of all


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """One arm of one stratum: sums over its devices. Adding two arms' sums merges them."""

    n: float = 0.0
    y: float = 0.0
    x: float = 0.0
    yy: float = 0.0
    xy: float = 0.0
    xx: float = 0.0

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            n=self.n + other.n,
            y=self.y + other.y,
            x=self.x + other.x,
            yy=self.yy + other.yy,
            xy=self.xy + other.xy,
            xx=self.xx + other.xx,
        )

    @property
    def mean(self) -> float:
        return self.y / self.n if self.n else math.nan


Pair = tuple[Sums, Sums]  # exposed, control


@dataclass(frozen=True, slots=True, kw_only=True)
class Normal:
    """A normal log-likelihood: ℓ(d) = d·s − d²·i/2. Strata add."""

    s: float = 0.0
    i: float = 0.0

    def __add__(self, other: Normal) -> Normal:
        return Normal(s=self.s + other.s, i=self.i + other.i)

    @property
    def estimate(self) -> float:
        return self.s / self.i if self.i > 0 else math.nan


def level(pairs: Iterable[Pair], rule: Rule | None = None) -> Normal:
    """The level difference exposed − control; each pair is one stratum.

    `rule`: how δ and V become one stratum's share (default: δ corrected, for evidence).
    """
    pairs = [pair for pair in pairs if min(arm.n for arm in pair) >= 2]
    slope = _slope(pairs)
    usual = _usual_spread(pairs, slope)
    total = Normal()
    for one, zero in pairs:
        delta = (one.y - slope * one.x) / one.n - (zero.y - slope * zero.x) / zero.n
        total += (rule or _normal)(
            delta, *_welch([_part(_spread(arm, slope), usual, arm) for arm in (one, zero)])
        )
    return total


def repeat(pairs: Iterable[Pair], min_events: float, rule: Rule | None = None) -> Normal:
    """The log ratio of repeat rates; y = capped events, x = expected events per device.

    Few events are skewed: z is the signed root of the Poisson deviance of the two counts given
    their sum, divided by their dispersion, instead of δ/√V (McCullagh & Nelder 1989, 2.3, 12.6).
    """
    total = Normal()
    for one, zero, variance, df in _scattered(pairs, min_events):
        z = _root_deviance(one, zero) / math.sqrt(_dispersion(one, zero, variance))
        total += (rule or _normal)(z * math.sqrt(variance), variance, df)
    return total


def repeat_safe(pairs: Iterable[Pair], margin: float, min_events: float) -> tuple[float, bool]:
    """F against "the log ratio of repeat rates is `margin` or more", betting on none; and whether
    any stratum had events enough to speak.

        log F = Σ −D·z − D²/2,  z ~ N(0, 1) at the margin, N(−D, 1) without a rise

    z is the root deviance of the events from how they would be shared out at the margin, D that of
    the events as they would be shared out without a rise. Of all bets on "no more than none" it
    grows fastest in the worst case (Grünwald, de Heide & Koolen 2024). Few events of the updated
    devices are no lack of evidence here: they are what a safe release shows, where the margin
    would have shared out at least `min_events` to each arm.
    """
    log, speaks = 0.0, False
    for one, zero, variance, df in _scattered(pairs, min_events, margin):
        spread = math.sqrt(_dispersion(one, zero, variance))
        z = normal_of_t(_root_deviance(one, zero, margin) / spread, df)
        events, share = one.y + zero.y, _share(one, zero, 0.0)
        none = _deviance(events * share, events * (1 - share), _share(one, zero, margin))
        d = math.sqrt(none) / spread
        log += -d * z - 0.5 * d * d
        speaks = True
    return bounded(log), speaks


def _scattered(
    pairs: Iterable[Pair], min_events: float, margin: float | None = None
) -> Iterator[tuple[Sums, Sums, float, float]]:
    """The strata that have events enough: (exposed, control, variance of δ, degrees of freedom).

    With a margin neither arm need have had them: of their sum, each would have at the margin. Who
    chose strata by how the events are shared out would choose the evidence.
    """
    enough = []
    for one, zero in pairs:
        # One device alone says nothing of how devices differ.
        if min(one.x, zero.x) <= 0 or min(one.n, zero.n) < 2 or min(one.y, zero.y) <= 0:
            continue
        least = min(one.y, zero.y)
        if margin is not None:
            share = _share(one, zero, margin)
            least = (one.y + zero.y) * min(share, 1 - share)
        if least >= min_events:
            enough.append((one, zero))
    usual = _Scatter.of([arm for pair in enough for arm in pair])
    for one, zero in enough:
        yield one, zero, *_welch([_scatter(arm, usual) for arm in (one, zero)])


def _dispersion(one: Sums, zero: Sums, variance: float) -> float:
    return variance / (1 / one.y + 1 / zero.y)


class _Scatter(NamedTuple):
    """How the counts of all arms together scatter, beyond Poisson: by their size, and by its
    square, as where a device's rate itself comes and goes (negative binomial)."""

    wide: float  # variance ÷ mean, at least 1
    coming: float  # squared coefficient of variation of a device's rate

    @classmethod
    def of(cls, arms: Sequence[Sums]) -> _Scatter:
        events = math.fsum(arm.y for arm in arms)
        if not events:
            return cls(1.0, 0.0)
        found = math.fsum(_clustered(arm) * arm.y * arm.y for arm in arms)
        # An arm's only device lies on the arm's own rate, whatever it did: it says nothing.
        told = math.fsum(arm.yy - arm.yy * arm.yy / (arm.y * arm.y) for arm in arms if arm.y > 0)
        return cls(max(1.0, found / events), max(0.0, found - events) / told if told > 0 else 0.0)

    def least(self, arm: Sums) -> float:
        """Variance ÷ mean of this arm's count."""
        return max(self.wide, 1 + self.coming * arm.yy / arm.y)


def _scatter(arm: Sums, usual: _Scatter) -> tuple[float, float]:
    """(variance of log ΣO, its degrees of freedom).

    The arm's own scatter, leaning on that of all arms while few devices have spoken, and never
    below it. Only what exceeds Poisson's 1/ΣO is estimated, so only that part has few degrees of
    freedom (Satterthwaite): where no device had a second event the binomial is exact. How much it
    exceeds is itself known to √(2/n) of n devices only.
    """
    own, devices, least = _clustered(arm) * arm.y, _contributors(arm), usual.least(arm)
    lean = _LEAN / (devices + _LEAN)
    variance = max(least, lean * least + (1 - lean) * own) / arm.y
    unsure = math.sqrt(2 / devices) / arm.y if devices > 0 else variance
    estimated = min(variance, max(variance - 1 / arm.y, unsure))
    return variance, min(_MANY, devices * (variance / estimated) ** 2)


def _contributors(arm: Sums) -> float:
    """How many devices as frequent as each other would scatter like these: (ΣO)²/ΣO² (Kish 1965).

    Events of two devices are two observations, however many events and however many silent
    devices beside them: in a heavy-tailed fleet nothing else keeps 10 devices from claiming much.
    """
    return arm.y * arm.y / arm.yy if arm.yy > 0 else 0.0


def _root_deviance(one: Sums, zero: Sums, rise: float = 0.0) -> float:
    """Signed root of the deviance from how both arms' events would be shared out at this rise."""
    share = _share(one, zero, rise)
    root = math.sqrt(_deviance(one.y, zero.y, share))
    return math.copysign(root, one.y - (one.y + zero.y) * share)


def _share(one: Sums, zero: Sums, rise: float) -> float:
    """Of both arms' events, those of the exposed one that are expected at this log ratio."""
    expected = one.x * math.exp(rise)
    return expected / (expected + zero.x)


def _deviance(one: float, zero: float, share: float) -> float:
    """2 Σ O log(O/E) of two counts of which this share is expected in the first."""
    events = one + zero
    parts = one * math.log(one / (events * share)) + zero * math.log(zero / (events * (1 - share)))
    return max(0.0, 2 * parts)


def harm(normal: Normal, scale: float) -> float:
    """E against "no increase"; 1.0 without information."""
    return _evidence(normal.s, normal.i, scale)


def harm_at(normal: Normal, rise: float) -> float:
    """E that bets on one increase: the likelihood ratio of `rise` to none; 1.0 without information.

    Of all bets on increases of at least `rise` the one that grows fastest in the worst case
    (Grünwald, de Heide & Koolen 2024); a mixture pays half a nat or more for not knowing.
    """
    if not (math.isfinite(normal.s) and math.isfinite(normal.i)):
        return math.nan
    return bounded(rise * normal.s - 0.5 * rise * rise * normal.i)


def safe(normal: Normal, margin: float, scale: float) -> float:
    """F against "an increase of `margin` or more"."""
    return _evidence(-(normal.s - margin * normal.i), normal.i, scale)


def band(normal: Normal, scale: float, level: float = 0.05) -> tuple[float, float]:
    """Always-valid band of d: a normal mixture of scale τ around 0."""
    if not normal.i > 0:
        return -math.inf, math.inf
    spread = 1 + scale * scale * normal.i
    mixed = -0.5 * math.log(spread) + 0.5 * (scale * normal.s) ** 2 / spread
    peak = 0.5 * normal.s**2 / normal.i
    reach = math.sqrt(max(0.0, 2 * (math.log(1 / level) + peak - mixed) / normal.i))
    return normal.estimate - reach, normal.estimate + reach


def dispersion(sums: Sums) -> float:
    """How much wider than Poisson the counts scatter between devices; at least 1."""
    return max(1.0, _clustered(sums) * sums.y) if sums.y > 0 else 1.0


def normal_of_t(t: float, df: float) -> float:
    """The normal value with the same one-sided p as t under Student's t with df degrees."""
    if not math.isfinite(t) or df <= 0:
        return math.nan
    if df >= _MANY:
        return t
    tail = student_tail(abs(t), df)
    z = -_NORMAL.inv_cdf(tail) if tail > 1e-300 else 37.0
    return math.copysign(max(0.0, z), t)


def student_tail(t: float, df: float) -> float:
    """P(T > t) for t ≥ 0: half the regularised incomplete beta I(df/(df + t²); df/2, ½)."""
    return 0.5 * _incomplete_beta(df / 2, 0.5, df / (df + t * t))


def _evidence(s: float, i: float, scale: float) -> float:
    if not (math.isfinite(s) and math.isfinite(i)):
        return math.nan
    spread = 1 + scale * scale * i
    u = scale * s / math.sqrt(spread)
    return bounded(math.log(2) - 0.5 * math.log(spread) + 0.5 * u * u + _log_phi(u))


def _log_phi(u: float) -> float:
    if u > -30:
        return math.log(0.5 * math.erfc(-u / math.sqrt(2)))
    return -0.5 * u * u - math.log(-u) - 0.5 * math.log(2 * math.pi)


def _part(own: float, usual: float, arm: Sums) -> tuple[float, float]:
    """(variance of an arm's mean, its degrees of freedom): never below the fleet's usual scatter,
    which many devices have measured."""
    return max(own, usual) / arm.n, arm.n - 1 if own > usual else _MANY


def _welch(parts: list[tuple[float, float]]) -> tuple[float, float]:
    """Variance and Welch's degrees of freedom of a difference."""
    variance = math.fsum(v for v, _ in parts)
    squares = math.fsum(v * v / max(free, 1.0) for v, free in parts)
    return variance, variance**2 / squares if squares > 0 else 0.0


def _normal(delta: float, variance: float, df: float) -> Normal:
    if not (variance > 0 and math.isfinite(variance) and math.isfinite(delta)) or df <= 0:
        return Normal()
    sigma = math.sqrt(variance)
    return Normal(s=normal_of_t(delta / sigma, df) / sigma, i=1 / variance)


def widened(delta: float, variance: float, df: float) -> Normal:
    """δ as it is, with the variance at which it has its p under t: an estimate to be shown."""
    if not (variance > 0 and math.isfinite(variance) and math.isfinite(delta)) or df <= 0:
        return Normal()
    t = delta / math.sqrt(variance)
    z = normal_of_t(t, df)
    more = (t / z) ** 2 if abs(z) > 1e-6 else 1.0
    return Normal(s=delta / (variance * more), i=1 / (variance * more))


Rule = Callable[[float, float, float], Normal]  # δ, V, degrees of freedom


def _usual_spread(pairs: list[Pair], slope: float) -> float:
    """Variance between devices within their arm, over all arms: two devices that happen to agree
    are not more certain than their fleet."""
    arms = [arm for pair in pairs for arm in pair]
    free = math.fsum(arm.n - 1 for arm in arms)
    return math.fsum(_spread(a, slope) * (a.n - 1) for a in arms) / free if free > 0 else 0.0


def _slope(pairs: list[Pair]) -> float:
    xy = xx = 0.0
    for arm in (arm for pair in pairs for arm in pair):
        if arm.n >= 2:
            xy += arm.xy - arm.x * arm.y / arm.n
            xx += arm.xx - arm.x * arm.x / arm.n
    return xy / xx if xx > 1e-12 else 0.0


def _spread(arm: Sums, slope: float) -> float:
    """Sample variance of y − slope·x."""
    squares = arm.yy - 2 * slope * arm.xy + slope * slope * arm.xx
    total = arm.y - slope * arm.x
    return max(0.0, squares - total * total / arm.n) / (arm.n - 1)


def _clustered(arm: Sums) -> float:
    rate = arm.y / arm.x
    return max(0.0, arm.yy - 2 * rate * arm.xy + rate * rate * arm.xx) / (arm.y * arm.y)


def scale_of(engine: Engine, margin: float) -> float:
    """τ of a level: its margin in the second wave."""
    loosening = engine.level_loosening
    return margin * loosening[min(1, len(loosening) - 1)]


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """Regularised I_x(a, b) by Lentz' continued fraction (Numerical Recipes, 6.4)."""
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    )
    if x > (a + 1) / (a + b + 2):
        return 1 - front * _fraction(b, a, 1 - x) / b
    return front * _fraction(a, b, x) / a


def _fraction(a: float, b: float, x: float) -> float:
    tiny = 1e-300
    c, d = 1.0, 1 / _away(1 - (a + b) * x / (a + 1), tiny)
    value = d
    for m in range(1, 400):
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / _away(1 + numerator * d, tiny)
            c = _away(1 + numerator / c, tiny)
            value *= d * c
        if abs(d * c - 1) < 1e-14:
            break
    return value


def _away(value: float, tiny: float) -> float:
    return value if abs(value) > tiny else tiny
