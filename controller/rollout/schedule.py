"""Says when a step could end at the earliest: windows, limits, soak.

Pure. "Earliest" takes every device as reachable and every update as instant: what slows it down is
the manifest's own: Deny and Allow windows in each device's time zone, `maxPerMinute`, the soak.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from controller.manifests.kinds import Step, Window
from controller.rollout import windows
from controller.rollout.model import Device

GRAIN = 900.0  # seconds between two looks at the windows
HORIZON = 35 * 86_400.0  # a window that does not open within five weeks counts as never
_MOST_ZONES = 60  # distinct time zones looked at


def told_by(rules: Sequence[Window], step: Step, devices: Sequence[Device], begins: float) -> float:
    """Unix seconds by which the last device of a step can have been told; inf: never."""
    if not devices or math.isinf(begins):
        return begins
    opens = begins
    if rules:
        one_of_each = {d.labels.get("timezone", "UTC"): d for d in devices}
        zones = sorted(one_of_each)[:_MOST_ZONES]
        opens = max(open_at(rules, one_of_each[zone], begins) for zone in zones)
    if step.max_per_minute is None:
        return opens
    return opens + 60.0 * max(0, math.ceil(len(devices) / step.max_per_minute) - 1)


def open_at(rules: Sequence[Window], device: Device, begins: float) -> float:
    """The first moment from `begins` on at which this device may be told; inf: not in 35 days."""
    at = begins
    while windows.closed(rules, device, at):
        at = (at // GRAIN + 1) * GRAIN
        if at > begins + HORIZON:
            return math.inf
    return at
