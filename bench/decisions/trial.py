"""One run: one fleet, one scenario, one seed, and every method side by side in the same hours."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from bench.decisions.fleet import SCENARIOS, fleet, hours
from bench.decisions.ours import Ours
from bench.decisions.plan import HORIZON, Result, Rollout
from bench.decisions.rivals import RIVALS

OURS = Ours.name
METHODS = (OURS, *RIVALS)


def run(scenario: str, seed: int, methods: Sequence[str]) -> list[Result]:
    """The results of these methods; chance follows from (seed, scenario)."""
    chance = np.random.default_rng([seed, zlib.crc32(scenario.encode())])
    what = SCENARIOS[scenario]
    devices = fleet(what, chance)
    rollouts: list[Rollout] = [
        Ours(devices, what) if name == Ours.name else RIVALS[name](devices, what)
        for name in methods
    ]
    for hour in hours(devices, what, chance):
        for rollout in rollouts:
            rollout.step(hour)
        over = all(one.state in ("rolled_back", "done") for one in rollouts)
        if over or hour.at >= HORIZON - 1:
            break
    return [one.result(seed) for one in rollouts]
