"""A simulated vehicle: what it does follows from what is installed in its active slots.

`behaviour.json` of each active slot is read from the disk at every start and every switch: swap the
contents of two artifacts, and the behaviour swaps. Pure but for reading those files; chance is a
stable function of (seed, device, what it is asked about), so that a run can be told again.

A bundle's behaviour, every field optional:
    {"boot": "ok" | "fail" | {"fail": SHARE},        self-tests and start, by device
     "silent": false | true | {"share": SHARE},      no network at all while this slot is active
     "events": {"disengagement": {"per_device_hour": 0.4}},
     "levels": {"cabin_cpu": {"mean": 50, "sd": 6}},
     "exposure": {"device_hour": 1, "km": 60},        per simulated hour of driving
     "fault": {"after_hours": X, "events": {"disengagement": {"ratio": 6}}}}

Rules: of several components, events and exposures add up where they differ in name; the worst boot
and the deepest silence win. A file that cannot be read or does not fit boots badly: BehaviourError.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from device_agent.agent import HealthSampled
from device_agent.protocol import METRIC, Health

_MAX_BYTES = 64 * 1024
_MAX_RATE = 1e6
DAY = 86_400.0


class BehaviourError(ValueError):
    """A behaviour.json that cannot be followed; the message names the field."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    after_hours: float = 0.0  # of driving since the switch
    ratios: Mapping[str, float] = field(default_factory=dict)  # event → times as often


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    boot_fails: float = 0.0  # share of devices
    silent: float = 0.0  # share of devices
    events: Mapping[str, float] = field(default_factory=dict)  # per hour of driving
    levels: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # mean, sd
    exposure: Mapping[str, float] = field(default_factory=lambda: {"device_hour": 1.0})
    faults: tuple[Fault, ...] = ()

    def ratio(self, event: str, hours: float) -> float:
        """How much more often the event happens after so many hours of driving."""
        found = [f.ratios.get(event, 1.0) for f in self.faults if hours >= f.after_hours]
        return math.prod(found)


def parse(data: object) -> Behaviour:
    """Raises BehaviourError."""
    table = _table(data, "behaviour")
    known = {"boot", "silent", "events", "levels", "exposure", "fault"}
    unknown = sorted(set(table) - known)
    if unknown:
        raise BehaviourError(f"{unknown[0]}: unknown; known: {', '.join(sorted(known))}")
    exposure = {
        _name(unit): _number(amount, f"exposure.{unit}")
        for unit, amount in _table(table.get("exposure", {}), "exposure").items()
    }
    return Behaviour(
        boot_fails=_boot(table.get("boot", "ok")),
        silent=_silent(table.get("silent", False)),
        events={
            _name(name): _number(
                _table(rate, f"events.{name}").get("per_device_hour"), f"events.{name}"
            )
            for name, rate in _table(table.get("events", {}), "events").items()
        },
        levels={
            _name(name): _level(name, level)
            for name, level in _table(table.get("levels", {}), "levels").items()
        },
        exposure=exposure or {"device_hour": 1.0},
        faults=(_fault(table["fault"]),) if "fault" in table else (),
    )


def load(slot: Path) -> Behaviour:
    """What the contents of a slot make the device do; a slot without the file drives plainly."""
    path = slot / "behaviour.json"
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise BehaviourError(f"{path}: larger than {_MAX_BYTES} bytes")
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        return Behaviour()
    except (OSError, ValueError, RecursionError) as error:
        raise BehaviourError(f"{path}: {error}") from error
    return parse(data)


def together(parts: Iterable[Behaviour]) -> Behaviour:
    """The behaviour of all components of one device."""
    parts = list(parts)
    if not parts:
        return Behaviour()
    events: dict[str, float] = {}
    for part in parts:
        for name, rate in part.events.items():
            events[name] = events.get(name, 0.0) + rate
    return Behaviour(
        boot_fails=max(part.boot_fails for part in parts),
        silent=max(part.silent for part in parts),
        events=events,
        levels={name: level for part in parts for name, level in part.levels.items()},
        exposure={unit: amount for part in parts for unit, amount in part.exposure.items()},
        faults=tuple(fault for part in parts for fault in part.faults),
    )


def share(*names: object) -> float:
    """A stable number in [0, 1) for these names."""
    text = "\0".join(str(name) for name in names)
    return int.from_bytes(blake2b(text.encode(), digest_size=7).digest()) / 2**56


@dataclass(frozen=True, slots=True, kw_only=True)
class Driver:
    """Who sits behind the wheel: some are careful, the others differ."""

    careful: float = 0.4  # share of devices whose events come at the behaviour's own rate
    least: float = 3.5  # the others: between `least` and `most` times as often
    most: float = 9.0

    def factor(self, seed: str, device: str) -> float:
        if share(seed, "careful", device) < self.careful:
            return 1.0
        spread = share(seed, "spread", device)
        times: float = (self.most / self.least) ** spread
        return self.least * times


class Vehicle:
    """Drives `pace` hours a second, and counts what happens on the way."""

    def __init__(
        self, device: str, *, seed: str, pace: float, driver: Driver | None = None
    ) -> None:
        self.device = device
        self._seed = seed
        self._pace = pace
        self.factor = (driver or Driver()).factor(seed, device)
        self._chance = random.Random(f"{seed}/{device}")  # noqa: S311 - a simulation, no secret
        self._behaviour = Behaviour()
        self._installed: tuple[str, ...] = ()
        self._hours = 0.0  # driven since the switch
        self.broken = ""  # why the installed behaviour cannot be followed

    def switched(self, slots: Mapping[str, Path], digests: Mapping[str, str]) -> None:
        """Another set is active, or the device starts: read what it does from the disk."""
        installed = tuple(f"{c}={d}" for c, d in sorted(digests.items()))
        if installed != self._installed:
            self._hours = 0.0
        self._installed = installed
        self.broken = ""
        try:
            self._behaviour = together(load(slot) for _, slot in sorted(slots.items()))
        except BehaviourError as error:
            self.broken, self._behaviour = str(error), Behaviour()

    @property
    def silent(self) -> bool:
        """No network at all while this set is active."""
        return self._hit("silent", self._behaviour.silent)

    def boots(self) -> tuple[bool, str]:
        """(does the active set start and pass its self-tests, what it says)."""
        if self.broken:
            return False, self.broken
        if self._hit("boot", self._behaviour.boot_fails):
            return False, "kernel panic: the simulated image does not boot"
        return True, ""

    def drive(self, running: Mapping[str, str], began: float, seconds: float) -> HealthSampled:
        """What happened in an interval."""
        hours = self._pace * seconds
        self._hours += hours
        behaviour = self._behaviour
        counters = {
            event: poisson(
                self._chance, rate * self.factor * hours * behaviour.ratio(event, self._hours)
            )
            for event, rate in behaviour.events.items()
        }
        columns = {
            name: (self._chance.gauss(mean, spread),)
            for name, (mean, spread) in behaviour.levels.items()
        }
        return HealthSampled(
            components=dict(running),
            t0=began,
            dt=seconds,
            columns=columns,
            counters=counters,
            exposure={unit: amount * hours for unit, amount in behaviour.exposure.items()},
        )

    def past(self, running: Mapping[str, str], days: int, until: float, boot: str) -> list[Health]:
        """Recorded history: one message a day, as this driver would have driven."""
        chance = random.Random(f"{self._seed}/{self.device}/past")  # noqa: S311 - no secret
        behaviour = self._behaviour
        messages = []
        for day in range(days):
            hours = chance.uniform(8.0, 14.0)
            messages.append(
                Health(
                    boot=boot,
                    boot_count=0,
                    seq=day + 1,
                    components=dict(running),
                    t0=until - (days - day) * DAY,
                    dt=DAY,
                    counters={
                        event: poisson(chance, rate * self.factor * hours)
                        for event, rate in behaviour.events.items()
                    },
                    exposure={unit: n * hours for unit, n in behaviour.exposure.items()},
                )
            )
        return messages

    def _hit(self, what: str, of: float) -> bool:
        return share(self._seed, what, self.device, *self._installed) < of


def poisson(chance: random.Random, mean: float) -> int:
    """A Poisson number; by its normal shape where that is indistinguishable."""
    if mean <= 0:
        return 0
    if mean > 60:
        return max(0, round(chance.gauss(mean, math.sqrt(mean))))
    limit, product, count = math.exp(-mean), chance.random(), 0
    while product > limit:
        product *= chance.random()
        count += 1
    return count


# -- reading behaviour.json -----------------------------------------------------------------------


def _table(data: object, where: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise BehaviourError(f"{where}: an object is expected")
    return data


def _name(name: str) -> str:
    if not METRIC.fullmatch(name):
        raise BehaviourError(f"{name[:64]!r} is no metric name ({METRIC.pattern})")
    return name


def _number(value: object, where: str, *, most: float = _MAX_RATE) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BehaviourError(f"{where}: a number is expected")
    if not 0 <= value <= most:  # NaN and infinities fail here
        raise BehaviourError(f"{where}: 0 to {most:g} is expected")
    return float(value)


def _boot(value: object) -> float:
    if value in ("ok", "fail"):
        return float(value == "fail")
    if isinstance(value, dict):
        return _number(value.get("fail"), "boot.fail", most=1.0)
    raise BehaviourError('boot: "ok", "fail" or {"fail": SHARE} is expected')


def _silent(value: object) -> float:
    if isinstance(value, bool):
        return float(value)
    if isinstance(value, dict):
        return _number(value.get("share"), "silent.share", most=1.0)
    raise BehaviourError('silent: true, false or {"share": SHARE} is expected')


def _level(name: str, data: object) -> tuple[float, float]:
    table = _table(data, f"levels.{name}")
    mean = _number(table.get("mean"), f"levels.{name}.mean")
    return mean, _number(table.get("sd", 0), f"levels.{name}.sd")


def _fault(data: object) -> Fault:
    table = _table(data, "fault")
    ratios = {
        _name(name): _number(_table(entry, f"fault.{name}").get("ratio"), f"fault.{name}.ratio")
        for name, entry in _table(table.get("events", {}), "fault.events").items()
    }
    hours = _number(table.get("after_hours", 0), "fault.after_hours")
    return Fault(after_hours=hours, ratios=ratios)
