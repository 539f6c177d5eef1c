"""What others do: hawkBit, AWS IoT jobs, Argo Rollouts, Kayenta, and two message-level tests.

Fixed soak of 24 h a wave, no state of waiting; the thresholds are the usual ones, not tuned for
this fleet. Sources and what is approximated: `docs/decisions/0022-the-benchmark-of-decisions.md`.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import numpy as np

from bench.decisions.fleet import Fleet, Floats, Hour, Scenario
from bench.decisions.plan import SOAK, WAVES, Rollout
from telemetry.evidence import first_events
from telemetry.policy import Engine

TIME_OUT = 12  # hours until a job without an answer counts as timed out
_ENGINE = Engine()


class Rival(Rollout):
    """Stops at the first word against the release, else moves on after its soak."""

    def __init__(self, fleet: Fleet, scenario: Scenario) -> None:
        super().__init__(fleet, scenario)
        self.forget()

    def forget(self) -> None:
        """A new wave is judged from its own beginning."""

    @abstractmethod
    def stops(self, hour: Hour) -> bool:
        """Does this hour roll the release back?"""

    def judge(self, hour: Hour) -> None:
        if self.stops(hour):
            self.end("rolled_back", hour.at)
        elif hour.at - self.opened[-1] + 1 >= SOAK:
            if self.wave == len(WAVES) - 1:
                # Fully rolled out, and nothing watches it any more.
                self.state = "done"
            else:
                self.widen(hour.at)
                self.forget()

    def group(self) -> tuple[int, int]:
        """Places of this wave's devices in the order: from, until."""
        return (WAVES[self.wave - 1] if self.wave else 0), WAVES[self.wave]


class HawkBit(Rival):
    """Error condition: the share of a group's devices that reported a failure."""

    share = 0.5

    def stops(self, hour: Hour) -> bool:
        low, high = self.group()
        here = (self.place >= low) & (self.place < high)
        return int((self.failed() & here).sum()) > self.share * (high - low)


class Aws(Rival):
    """abortConfig ALL: failed and timed out ÷ executed, from 20 executed on."""

    share = 0.05

    def stops(self, hour: Hour) -> bool:
        failed = int(self.failed().sum())
        timed_out = int((self.bricked() & (hour.at - self.installed >= TIME_OUT)).sum())
        fine = int((self.started & ~self.fleet.fails & ~self.fleet.bricks).sum())
        executed = failed + timed_out + fine
        return executed >= 20 and failed + timed_out >= self.share * executed


class _Watching(Rival):
    """Compares the messages of updated devices with those of all others."""

    def arms(self, hour: Hour) -> tuple[tuple[int, int], tuple[int, int], Floats, Floats]:
        """(messages, devices reporting) updated and not, their temperatures."""
        reports, _, messages, warmth = self.seen(hour)
        new = self.running(hour.at) & reports
        old = reports & ~self.started
        return (
            (int(messages[new].sum()), int(new.sum())),
            (int(messages[old].sum()), int(old.sum())),
            warmth[new],
            warmth[old],
        )


class Argo(_Watching):
    """Hourly: ratio of message rates > 1.5 or 3 degrees more; more than three failures abort."""

    def forget(self) -> None:
        self.failures = 0

    def stops(self, hour: Hour) -> bool:
        (m1, n1), (m0, n0), warm, usual = self.arms(hour)
        if n1 == 0 or n0 == 0:
            return False
        louder = m1 / n1 > 1.5 * max(m0, 1) / n0
        self.failures += louder or float(warm.mean() - usual.mean()) > 3
        return self.failures > 3


class Kayenta(_Watching):
    """Mann–Whitney of hourly cohort means, level .98, tolerance .25, as NetflixACAJudge."""

    hourly = True

    def forget(self) -> None:
        self.points: list[tuple[float, float, float, float]] = []

    def stops(self, hour: Hour) -> bool:
        (m1, n1), (m0, n0), warm, usual = self.arms(hour)
        if n1 and n0:
            self.points.append((m1 / n1, m0 / n0, float(warm.mean()), float(usual.mean())))
        due = len(self.points) >= 8 if self.hourly else hour.at - self.opened[-1] + 1 == SOAK
        if not due or not self.points:
            return False
        rate1, rate0, warm1, warm0 = np.array(self.points).T
        return _higher(rate1, rate0) or _higher(warm1, warm0)


class KayentaOnce(Kayenta):
    hourly = False


class PerMessageZ(_Watching):
    """One-sided tests of 5 % on all messages so far, looked at every hour."""

    def forget(self) -> None:
        self.sums = np.zeros(10)

    def stops(self, hour: Hour) -> bool:
        new, old, warm, usual = self.arms(hour)
        parts = [float(v) for v in (*new, *old)]
        for one in (warm, usual):
            parts += [one.size, one.sum(), (one * one).sum()]
        self.sums += np.array(parts)
        sums = self.sums.tolist()
        m1, n1, m0, n0 = sums[:4]
        k1, s1, q1, k0, s0, q0 = sums[4:]
        if min(m1 + m0, n1, n0) == 0 or min(k1, k0) < 2:
            return False
        share = n1 / (n1 + n0)
        z = (m1 - (m1 + m0) * share) / math.sqrt((m1 + m0) * share * (1 - share))
        spread = (q1 - s1 * s1 / k1) / (k1 - 1) / k1 + (q0 - s0 * s0 / k0) / (k0 - 1) / k0
        t = (s1 / k1 - s0 / k0) / math.sqrt(spread)
        return bool(max(z, t) > 1.645)


class PerMessagePoisson(_Watching):
    """Sequential test of two Poisson rates on all messages (Lindon & Malek 2022), α = 5 %."""

    def forget(self) -> None:
        self.curve = first_events.flat(_ENGINE)

    def stops(self, hour: Hour) -> bool:
        (m1, n1), (m0, n0), _, _ = self.arms(hour)
        if n1 and n0 and m1 + m0:
            # As if each message were a device: the method knows no devices.
            many = 1e6
            tick = [(m1, m0, many * n1, many * n0)]
            self.curve = self.curve + first_events.curve(_ENGINE, tick)
        return first_events.harm(_ENGINE, self.curve) >= 20


def _higher(one: Floats, zero: Floats) -> bool:
    """Is the shift's 98 % interval above a quarter of the Hodges–Lehmann estimate?"""
    gaps = np.sort(np.subtract.outer(one, zero).ravel())
    m, n = one.size, zero.size
    k = int(m * n / 2 - 2.326 * math.sqrt(m * n * (m + n + 1) / 12))
    return bool(k > 0 and gaps[k - 1] > 0.25 * abs(float(np.median(gaps))))


def _named(base: type[Rival], called: str, **settings: float) -> type[Rival]:
    return type(called, (base,), {"name": called, **settings})


RIVALS: dict[str, type[Rival]] = {
    kind.name: kind
    for kind in (
        _named(HawkBit, "hawkbit-50", share=0.50),
        _named(HawkBit, "hawkbit-5", share=0.05),
        _named(HawkBit, "hawkbit-2", share=0.02),
        _named(Aws, "aws-5", share=0.05),
        _named(Aws, "aws-2", share=0.02),
        _named(Argo, "argo"),
        _named(Kayenta, "kayenta-hourly"),
        _named(KayentaOnce, "kayenta-daily"),
        _named(PerMessageZ, "message-z"),
        _named(PerMessagePoisson, "message-poisson"),
    )
}
