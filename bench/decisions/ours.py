"""ENGINE: the production decision (`gate.judge`) on the statistics that the ledger makes (`Tally`).

Nothing of the decision is written here: who is enrolled when, which sums reach the case, and what a
rollout does with the verdict.
"""

from __future__ import annotations

import math

import numpy as np

from bench.decisions.fleet import HARDWARE, Bools, Fleet, Hour, Scenario
from bench.decisions.plan import HORIZON, SOAK, TAIL, WAVES, Rollout
from controller.rollout import gate
from controller.rollout.gate import Case, Judgement, Outcome, Past, Silence, StepLimits, Verdict
from controller.rollout.waves import DOUBLINGS
from telemetry.evidence import first_events
from telemetry.evidence.ledger import shape_of
from telemetry.evidence.tally import Rollup, Tally, observe
from telemetry.policy import Engine, Gate, GateType, Margin, Policy, Weights

MAX_SOAK = 72
CONTROLS_CAP = 5_000
INCIDENT = Gate(metric="incident", type=GateType.RATE, margin=Margin(ratio=1.3))
WARMTH = Gate(metric="temperature", type=GateType.MEAN, margin=Margin(absolute=2.0))
POLICY = Policy(
    name="plan-4",
    gates=(Gate(metric="update_ok", type=GateType.PROPORTION), INCIDENT, WARMTH),
    engine=Engine(
        failed_margins=(0.07, 0.04, 0.013),
        ratio_margins=(1.85, 1.6, 1.3),
        first_weight=0.1,
        late_weight=0.1,
        pooled_rate=0.9,
        repeat_min_events=30,
        pooled_share=0.5,
        weights=Weights(outcome=0.27, lost=0.15, silence=0.02, events=0.47, levels=0.09),
    ),
)
CONTROLS = 6  # a device: more would leave none for the third wave
MIN_REPORTING = 0.8
RAMP = (1, 1, 1, 1)  # hours over which a wave's orders are given


class Ours(Rollout):
    name = "engine"

    def __init__(self, fleet: Fleet, scenario: Scenario, policy: Policy = POLICY) -> None:
        super().__init__(fleet, scenario)
        self.policy = policy
        self.tally = Tally(policy.engine, (INCIDENT,), (WARMTH,))
        self.tally.late_ticks = int(policy.engine.late_hours)
        devices = fleet.order.size
        self.unit = np.full(devices, -1)  # each device's present enrolment
        self.control_of = np.full(devices, -1)  # wave
        self.enrolled: Bools = np.zeros(devices, dtype=np.bool_)  # as control, and heard
        self.grown = 0  # devices that this wave took beyond its plan
        self.soaks_from = 0  # hour
        self.doublings = 0
        self.wave_of = np.full(devices, -1)
        # What was reported before a device counted is its own past, as the ledger has it.
        self.before = np.zeros((4, devices))  # hours, messages, incidents' hours, Σ temperature
        self.silent: Bools = np.zeros(devices, dtype=np.bool_)
        self.silence = {h: first_events.flat(policy.engine) for h in range(len(HARDWARE))}
        self.counts = np.zeros((len(HARDWARE), 4), dtype=np.int64)
        engine = policy.engine
        shape = shape_of(fleet.sample, engine.winsor, engine.skew_limit)
        self.low, self.high = shape.low, shape.high
        self.draw_controls()
        self.judgement: Judgement | None = None

    def wanted(self, at: int) -> int:
        before = WAVES[self.wave - 1] if self.wave else 0
        size = WAVES[self.wave] - before
        told = math.ceil(size * min(1.0, (at - self.opened[-1] + 1) / RAMP[self.wave]))
        return min(DEVICES_LAST, before + told + self.grown)

    def draw_controls(self) -> None:
        """Devices that the next waves would take last, drawn like the wave: at random."""
        size = WAVES[self.wave] - (WAVES[self.wave - 1] if self.wave else 0)
        wanted = min(CONTROLS * size, CONTROLS_CAP)
        free = (self.control_of < 0) & (self.place >= WAVES[self.wave])
        chosen = self.fleet.order[::-1][free[self.fleet.order[::-1]]][:wanted]
        self.control_of[chosen] = self.wave

    # -- the hour ----------------------------------------------------------------------------------

    def judge(self, hour: Hour) -> None:
        self.enrol(hour)
        self.fold(hour)
        self.hear(hour)
        self.judgement = gate.judge(self.case(hour))
        self.follow(self.judgement, hour.at)

    def enrol(self, hour: Hour) -> None:
        self.wave_of[self.installed == hour.at] = self.wave
        wave = self.wave_of
        new = np.flatnonzero(self.running(hour.at) & (self.installed == hour.at))
        if new.size:
            self._enrol(new, wave[new], True)
        heard = hour.online & (hour.at < self.fleet.silent_at)
        fresh = heard & (self.control_of >= 0) & ~self.enrolled & ~self.started
        who = np.flatnonzero(fresh)
        if who.size:
            self._enrol(who, self.control_of[who], False)
            self.enrolled[who] = True

    def _enrol(self, who: np.ndarray, waves: np.ndarray, exposed: bool) -> None:
        fleet, tally = self.fleet, self.tally
        for wave in np.unique(waves):
            here = who[waves == wave]
            names = [HARDWARE[h] for h in fleet.hardware[here]]
            units = tally.enrol_all(int(wave), names, 0, exposed)
            self.unit[here] = units
            since, messages, eventful, warmth = self.before[:, here]
            hours = fleet.past_hours[here] + since
            tally.past("hours")[units] = hours
            tally.past("messages")[units] = hours
            tally.past("events incident")[units] = fleet.past_messages[here] + messages
            tally.past("eventful incident")[units] = fleet.past_incidents[here] + eventful
            tally.past("n temperature")[units] = hours
            tally.past("sum temperature")[units] = (
                fleet.past_hours[here] * fleet.past_warmth[here] + warmth
            )

    def fold(self, hour: Hour) -> None:
        reports, _, messages, warmth = self.seen(hour)
        # From its install on a device that failed it is no control any more, and not exposed.
        counted = reports & (self.unit >= 0)
        counted &= np.where(self.started, self.running(hour.at), self.enrolled)
        who = np.flatnonzero(counted)
        idle = np.flatnonzero(reports & (self.unit < 0) & ~self.started)
        self.before[:, idle] += (
            np.ones(idle.size),
            messages[idle],
            messages[idle] > 0,
            np.clip(warmth[idle], self.low, self.high),
        )
        self.tally.fold(
            Rollup(
                unit=self.unit[who],
                tick=np.full(who.size, hour.at),
                hours=np.ones(who.size),
                counts={"incident": messages[who]},
                levels={
                    "temperature": (np.ones(who.size), np.clip(warmth[who], self.low, self.high))
                },
            )
        )

    def hear(self, hour: Hour) -> None:
        """First silences of this hour against those at risk of it, both arms."""
        exposed = self.running(0)
        control = self.enrolled & ~self.started
        new = self.declared_silent(hour.at) & ~self.silent
        for h in range(len(HARDWARE)):
            kind = self.fleet.hardware == h
            at_risk = kind & ~self.silent
            d1, d0 = int((new & at_risk & exposed).sum()), int((new & at_risk & control).sum())
            y1, y0 = int((at_risk & exposed).sum()), int((at_risk & control).sum())
            self.counts[h, :2] += (d1, d0)
            self.counts[h, 2:] = int((kind & exposed).sum()), int((kind & control).sum())
            if d1 or d0:
                more = first_events.curve(self.policy.engine, [(d1, d0, y1, y0)])
                self.silence[h] = np.asarray(self.silence[h] + more)
        self.silent |= new & (exposed | control)

    # -- the case ----------------------------------------------------------------------------------

    def case(self, hour: Hour) -> Case:
        started, wave = self.started, self.wave_of
        here = started & (wave == self.wave)
        soaked = (hour.at - self.soaks_from + 1) * 3600.0
        fine = here & self.running(0)
        return Case(
            policy=self.policy,
            step=StepLimits(
                wave=self.wave,
                name=f"wave {self.wave + 1}",
                min_soak=SOAK * 3600.0,
                max_soak=MAX_SOAK * 3600.0,
                soaked=soaked,
                min_reporting=MIN_REPORTING,
                reporting=int((fine & ~self.silent).sum()),
                updated=int(fine.sum()),
            ),
            observations=observe(self.tally, (INCIDENT,), (WARMTH,)),
            outcomes=self.outcomes(hour, wave),
            silence=tuple(
                Silence(
                    wave=0,
                    hardware=kind,
                    exposed_silent=int(self.counts[h, 0]),
                    control_silent=int(self.counts[h, 1]),
                    exposed=int(self.counts[h, 2]),
                    control=int(self.counts[h, 3]),
                    curve=tuple(self.silence[h].tolist()),
                )
                for h, kind in enumerate(HARDWARE)
            ),
            history=tuple(
                Past(failed=f, lost=gone, started=n) for f, gone, n in self.fleet.history
            ),
        )

    def outcomes(self, hour: Hour, wave: np.ndarray) -> tuple[Outcome, ...]:
        kinds, slots = len(HARDWARE), len(HARDWARE) * len(WAVES)
        slot = np.maximum(wave, 0) * kinds + self.fleet.hardware

        def many(who: Bools) -> np.ndarray:
            return np.bincount(slot[who], minlength=slots)

        started, failed = many(self.started), many(self.failed())
        gone = many(self.bricked() & self.declared_silent(hour.at))
        away = many(self.bricked() & ~self.declared_silent(hour.at))
        return tuple(
            Outcome(
                wave=s // kinds,
                hardware=HARDWARE[s % kinds],
                started=int(started[s]),
                committed=int(started[s] - failed[s] - gone[s] - away[s]),
                failed=int(failed[s]),
                lost=int(gone[s]),
                activating=int(away[s]),
            )
            for s in range(slots)
            if started[s]
        )

    def begun(self) -> bool:
        """Have most of those who were told installed it? Before that no step is judged."""
        return float(self.started[self.place < self.told].mean()) >= MIN_REPORTING

    # -- what follows ------------------------------------------------------------------------------

    def follow(self, judged: Judgement, at: int) -> None:
        last = self.wave == len(WAVES) - 1
        if judged.verdict is Verdict.ROLL_BACK:
            self.end("rolled_back", at, str(judged.numbers.get("binding", "")))
        elif last:
            if at - self.opened[-1] + 1 >= TAIL:
                self.state = "done"  # complete: nothing watches it any more
        elif judged.verdict is Verdict.WIDEN:
            self.widen(at)
            self.state, self.grown, self.ended = "running", 0, HORIZON
            self.soaks_from, self.doublings = self.opened[-1], 0
            self.draw_controls()
        elif judged.numbers.get("grow") and self.doublings < DOUBLINGS and self.begun():
            # Every outcome is known and proves too little: more devices can, more time cannot.
            self.grown += WAVES[self.wave] - (WAVES[self.wave - 1] if self.wave else 0) + self.grown
            # It has soaked, and has the rest until the maximum once more.
            self.soaks_from, self.doublings = at + 1 - SOAK, self.doublings + 1
        elif at - self.soaks_from + 1 >= MAX_SOAK and self.state == "running":
            # Waits for a person; watched, and rolled back still if the evidence comes.
            self.state = "held"
            self.cause = str(judged.numbers.get("binding", ""))


DEVICES_LAST = WAVES[-1]
