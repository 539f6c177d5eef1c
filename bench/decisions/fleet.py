"""FLEET-10K: ten thousand devices whose every hour is drawn before anybody knows who is updated.

Potential outcomes: an hour holds what each device does without the release, and what the release
would add. Every method meets the same hours with its own installs, so that methods are compared on
the same luck. Definition: `docs/decisions/0022-the-benchmark-of-decisions.md`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

DEVICES = 10_000
HOURS = 240
HARDWARE = ("A", "B", "C")
SHARE = (0.6, 0.3, 0.1)
FACTOR = (1.0, 1.3, 2.0)
BASE_RATE = 0.01  # incidents per online hour
STOP = 0.4  # of messages per incident: geometric, mean 2.5
BASELINE_HOURS = 168
INSTALL_FAILS = 0.002
FALLS_SILENT = 0.0005  # per hour, for good, in both arms
SILENT_AFTER = 6  # hours until it is declared
BASELINE_NOISE = 1.6  # of a device's own mean temperature


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    name: str
    words: str
    rate: float = 1.0  # incidents × this on updated devices
    after: int = 0  # hours after the install from which it holds
    boot: float = 0.0  # more reported boot failures
    brick: float = 0.0  # silent from the activation on
    brick_hardware: str = ""  # only there
    warmer: float = 0.0


SCENARIOS = {
    one.name: one
    for one in (
        Scenario(name="S0", words="good release"),
        Scenario(name="S1", words="incidents × 1.2", rate=1.2),
        Scenario(name="S2", words="incidents × 1.5", rate=1.5),
        Scenario(name="S3", words="incidents × 2", rate=2.0),
        Scenario(name="S4", words="incidents × 5", rate=5.0),
        Scenario(name="S5a", words="boot failure +.5 %", boot=0.005),
        Scenario(name="S5b", words="boot failure +2 %", boot=0.02),
        Scenario(name="S5c", words="boot failure +5 %", boot=0.05),
        Scenario(name="S6a", words="silent brick 1 %", brick=0.01),
        Scenario(name="S6b", words="silent brick 2 %", brick=0.02),
        Scenario(name="S6c", words="silent brick 5 %", brick=0.05),
        Scenario(name="S7a", words="temperature +2", warmer=2.0),
        Scenario(name="S7b", words="temperature +5", warmer=5.0),
        Scenario(name="S8", words="incidents × 3 from 24 h on", rate=3.0, after=24),
        Scenario(name="S9", words="silent brick 1 % on B", brick=0.01, brick_hardware="B"),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """Who the devices are; arrays of shape (devices,)."""

    hardware: Ints  # index into HARDWARE
    usage: Floats
    rate: Floats  # incidents per online hour
    warmth: Floats  # mean temperature
    order: Ints  # in which they are updated
    fails: Bools  # the install or the boot fails, and is reported
    bricks: Bools
    silent_at: Floats  # hour of the background silence
    past_hours: Ints
    past_incidents: Ints
    past_messages: Ints
    past_warmth: Floats
    sample: Floats  # temperatures of the pre-period, shape (2000,)
    history: tuple[tuple[int, int, int], ...]  # failed, lost, started of the last five releases


@dataclass(frozen=True, slots=True, kw_only=True)
class Hour:
    """One hour. `messages` without the release, `more` what it adds; both shape (devices,)."""

    at: int
    online: Bools
    incidents: Ints
    messages: Ints
    more_incidents: Ints
    more_messages: Ints
    warmth: Floats  # NaN where offline


def fleet(scenario: Scenario, chance: np.random.Generator, devices: int = DEVICES) -> Fleet:
    hardware = chance.choice(len(HARDWARE), size=devices, p=SHARE)
    usage = np.clip(chance.beta(2, 3, devices), 0.05, 0.95)
    rate = BASE_RATE * np.array(FACTOR)[hardware] * chance.lognormal(-0.5, 1, devices)
    warmth = chance.normal(50, 6, devices)
    hours = chance.binomial(BASELINE_HOURS, usage)
    incidents = chance.poisson(rate * hours)
    some = chance.integers(0, devices, 2_000)
    brick = scenario.brick * np.ones(devices)
    if scenario.brick_hardware:
        brick[hardware != HARDWARE.index(scenario.brick_hardware)] = 0.0
    return Fleet(
        hardware=hardware,
        usage=usage,
        rate=rate,
        warmth=warmth,
        order=chance.permutation(devices),
        fails=chance.random(devices) < INSTALL_FAILS + scenario.boot,
        bricks=chance.random(devices) < brick,
        silent_at=chance.exponential(1 / FALLS_SILENT, devices),
        past_hours=hours,
        past_incidents=incidents,
        past_messages=_messages(incidents, chance),
        past_warmth=warmth + chance.normal(0, BASELINE_NOISE, devices),
        sample=warmth[some]
        + chance.normal(0, 3, some.size)
        + 4 * np.sin(2 * np.pi * chance.random(some.size))
        + chance.standard_t(3, some.size)
        + 40 * (chance.random(some.size) < 0.001),
        history=tuple((int(chance.binomial(devices, INSTALL_FAILS)), 0, devices) for _ in range(5)),
    )


def hours(fleet: Fleet, scenario: Scenario, chance: np.random.Generator) -> Iterator[Hour]:
    """The hours of the fleet, one after the other, for ever."""
    devices = fleet.usage.size
    shock = chance.normal(0, 0.3)
    drift = chance.normal(0, 3, devices)
    at = 0
    while True:
        day = np.sin(2 * np.pi * at / 24)
        online = chance.random(devices) < np.clip(fleet.usage * (1 + 0.6 * day), 0, 1)
        shock = 0.95 * shock + np.sqrt(1 - 0.95**2) * chance.normal(0, 0.3)
        hazard = fleet.rate * online * np.exp(shock)
        incidents = _happen(hazard, 1.0, chance)
        more = _happen(hazard, scenario.rate - 1, chance)
        drift = 0.9 * drift + np.sqrt(1 - 0.9**2) * 3 * chance.standard_normal(devices)
        here = np.flatnonzero(online)
        warmth = np.full(devices, np.nan)
        warmth[here] = (
            fleet.warmth[here]
            + drift[here]
            + 4 * day
            + chance.standard_t(3, here.size)
            + 40 * (chance.random(here.size) < 0.001)
        )
        yield Hour(
            at=at,
            online=online,
            incidents=incidents,
            messages=_messages(incidents, chance),
            more_incidents=more,
            more_messages=_messages(more, chance),
            warmth=warmth,
        )
        at += 1


def _happen(hazard: Floats, factor: float, chance: np.random.Generator) -> Ints:
    """Poisson counts with these means: their sum first, then whose they are."""
    if factor <= 0:
        return np.zeros(hazard.size, dtype=np.int64)
    up = np.cumsum(hazard)
    number = chance.poisson(up[-1] * factor)
    who = np.searchsorted(up, chance.random(number) * up[-1], side="right")
    return np.bincount(np.minimum(who, hazard.size - 1), minlength=hazard.size)


def _messages(incidents: Ints, chance: np.random.Generator) -> Ints:
    found = np.zeros(incidents.size, dtype=np.int64)
    some = np.flatnonzero(incidents)
    found[some] = incidents[some] + chance.negative_binomial(incidents[some], STOP)
    return found
