"""Decides whether a device may be told now: Allow and Deny windows, each in its own time zone.

Pure. Deny wins; where there is any Allow window, the moment must lie in one. `timezone: device`
reads the device's own label `timezone` (an IANA name), UTC without it. Rollbacks never ask.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, tzinfo
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim

from controller.manifests.kinds import Window
from controller.rollout.model import Device


def closed(windows: Sequence[Window], device: Device, now: float) -> str:
    """Why this device may not be told now; empty when it may."""
    denied = [w for w in windows if str(w.kind) == "Deny" and _inside(w, device, now)]
    if denied:
        return f"window: Deny {denied[0].schedule} for {denied[0].duration}"
    allows = [w for w in windows if str(w.kind) == "Allow"]
    if allows and not any(_inside(w, device, now) for w in allows):
        return f"window: waits for Allow {allows[0].schedule}"
    return ""


def _inside(window: Window, device: Device, now: float) -> bool:
    moment = datetime.fromtimestamp(now, _zone(window, device))
    # The latest start at or before now: one second on, looking back.
    start = next(CronSim(window.schedule, _next_minute(moment), reverse=True))
    return 0 <= (moment - start).total_seconds() < window.duration.total_seconds()


def _next_minute(moment: datetime) -> datetime:
    return datetime.fromtimestamp(moment.timestamp() // 60 * 60 + 60, moment.tzinfo)


def _zone(window: Window, device: Device) -> tzinfo:
    name = window.timezone or "UTC"
    if name == "device":
        name = device.labels.get("timezone", "UTC")
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError):
        return UTC
