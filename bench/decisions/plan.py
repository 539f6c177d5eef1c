"""PLAN-4: waves of 100 / 500 / 2,500 / all but 500, and what befalls the devices in them.

Base of every method: installs at a device's first online hour, failures, bricks, silence, and who
is exposed. What a method decides, it decides in `judge`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from bench.decisions.fleet import DEVICES, SILENT_AFTER, Bools, Fleet, Floats, Hour, Ints, Scenario

WAVES = (100, 500, 2_500, DEVICES - 500)
SOAK = 24
HORIZON = 240
TAIL = 48  # hours that the last wave is watched beside the devices kept back


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What one run of one method came to."""

    method: str
    scenario: str
    seed: int
    rolled_back: bool
    held: bool  # waits for a person at the end
    caught: bool  # rolled back or held before the last wave opened
    exposed: int  # devices
    dead: int  # bricked by the release
    bad_hours: float  # device hours on the release until the rollback, else until the horizon
    hours_to_all: float  # until the last wave opened; NaN if it never did
    cause: str = ""


class Rollout(ABC):
    """One method's rollout of one release over one fleet."""

    name = ""

    def __init__(self, fleet: Fleet, scenario: Scenario) -> None:
        self.fleet, self.scenario = fleet, scenario
        devices = fleet.order.size
        self.place = np.empty(devices, dtype=np.int64)  # in the order of the update
        self.place[fleet.order] = np.arange(devices)
        self.wave = 0
        self.opened = [0]
        self.told = 0
        self.installed = np.full(devices, np.inf)  # hour
        self.state = "running"  # running | rolled_back | held | done
        self.ended = HORIZON
        self.cause = ""

    # -- what a method decides --------------------------------------------------------------------

    @abstractmethod
    def judge(self, hour: Hour) -> None:
        """Look at the hour that has passed; call what ends or widens the plan."""

    def wanted(self, at: int) -> int:
        """How many devices, in order, may have the release now."""
        return WAVES[self.wave]

    # -- the hour ----------------------------------------------------------------------------------

    def step(self, hour: Hour) -> None:
        if self.state in ("rolled_back", "done"):
            return
        self.told = self.wanted(hour.at)
        alive = hour.online & (hour.at < self.fleet.silent_at)
        now = alive & (self.place < self.told) & ~np.isfinite(self.installed)
        self.installed[now] = hour.at
        self.judge(hour)

    def widen(self, at: int) -> None:
        self.wave += 1
        self.opened.append(at + 1)

    def end(self, state: str, at: int, cause: str = "") -> None:
        self.state, self.ended, self.cause = state, at, cause

    # -- what can be seen --------------------------------------------------------------------------

    @property
    def started(self) -> Bools:
        return np.asarray(np.isfinite(self.installed), dtype=np.bool_)

    def failed(self) -> Bools:
        return self.started & self.fleet.fails

    def bricked(self) -> Bools:
        return self.started & self.fleet.bricks & ~self.fleet.fails

    def running(self, at: int) -> Bools:
        """Devices on the release that can speak."""
        fine = self.started & ~self.fleet.fails & ~self.fleet.bricks
        return np.asarray(fine & (at < self.fleet.silent_at), dtype=np.bool_)

    def harmed(self, at: int) -> Bools:
        return self.running(at) & (at - self.installed >= self.scenario.after)

    def quiet_since(self) -> Floats:
        """Hour of each device's last word; infinite while it speaks."""
        since = self.fleet.silent_at.copy()
        bricked = self.bricked()
        since[bricked] = np.minimum(since[bricked], self.installed[bricked])
        return since

    def declared_silent(self, at: int) -> Bools:
        return np.asarray(self.quiet_since() + SILENT_AFTER <= at)

    def seen(self, hour: Hour) -> tuple[Bools, Ints, Ints, Floats]:
        """(who reports, hours with an incident, messages, temperatures) under this rollout."""
        reports = hour.online & (hour.at < self.fleet.silent_at) & ~self.bricked()
        harmed = self.harmed(hour.at)
        incidents = np.where(reports, hour.incidents + hour.more_incidents * harmed, 0)
        messages = np.where(reports, hour.messages + hour.more_messages * harmed, 0)
        warmth = hour.warmth + self.scenario.warmer * harmed
        return reports, incidents, messages, warmth

    def result(self, seed: int) -> Result:
        hours = np.clip(self.ended - self.installed[self.started], 0, None)
        everybody = self.wave == len(WAVES) - 1
        return Result(
            method=self.name,
            scenario=self.scenario.name,
            seed=seed,
            rolled_back=self.state == "rolled_back",
            held=self.state == "held",
            caught=self.state in ("rolled_back", "held") and not everybody,
            exposed=int(self.started.sum()),
            dead=int(self.bricked().sum()),
            bad_hours=float(hours.sum()),
            hours_to_all=float(self.opened[-1]) if everybody else float("nan"),
            cause=self.cause,
        )
