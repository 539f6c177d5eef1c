"""The scores of the fleets whose rollouts are about to draw, computed when they are needed."""

from __future__ import annotations

from controller.memory import Memory
from controller.rollout.waves import Pinned
from controller.rollout.world import Scored
from telemetry.report import TelemetryReader
from telemetry.score import placed, score
from telemetry.score_days import ScoreDays

SCORES_LAST = 10.0  # seconds that a fleet's scores are used before they are computed again


class Scores:
    def __init__(self, reader: TelemetryReader, memory: Memory) -> None:
        self._memory = memory
        self._days = ScoreDays(reader)
        self.of: dict[str, Scored] = {}  # by fleet

    def refresh(self, now: float) -> list[str]:
        """Answers the fleets that have new ones."""
        renewed = []
        for rollout in self._memory.rollouts.values():
            drawing = rollout.active and rollout.flags.get("drawn") != rollout.step
            if drawing and self._score(rollout.fleet, self._memory.pinned[rollout.id], now):
                renewed.append(rollout.fleet)
        return renewed

    def _score(self, fleet: str, pinned: Pinned, now: float) -> bool:
        known = self.of.get(fleet)
        if known is not None and now - known.at < SCORES_LAST:
            return False
        spec = pinned.policy.score
        if spec is None:
            return False
        devices = self._memory.devices
        # Quintiles are of this fleet: another fleet's devices must not move its bands.
        ours = set(self._memory.of_fleet(fleet))
        result = score([day.of(ours) for day in self._days.read(spec, now)], spec)
        values = placed(result)
        fleet_size = sum(devices[name].governed for name in ours)
        with_score = sum(value is not None for value, _ in values.values())
        self.of[fleet] = Scored(
            at=now,
            values=values,
            unscored=fleet_size - with_score,
            min_exposure=float(spec.min_exposure),
        )
        return True
