"""Decides whether a device may be told now: Allow and Deny windows, each in its own time zone.

Pure. Deny wins; where there is any Allow window, the moment must lie in one. `timezone: device`
reads the device's own label `timezone` (an IANA name), UTC without it. Rollbacks never ask.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, tzinfo
from functools import lru_cache
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim

from controller.manifests.kinds import Window
from controller.rollout.model import Device


def closed(windows: Sequence[Window], device: Device, now: float) -> str:
    """Why this device may not be told now; empty when it may."""
    return word(windows, zone_of(device), now) if windows else ""


def zone_of(device: Device) -> str:
    """The device's own time zone, as its label says it."""
    return device.labels.get("timezone", "UTC")


def word(windows: Sequence[Window], zone: str, now: float) -> str:
    """What the windows say to devices of this time zone; empty: they may be told."""
    denied = [w for w in windows if str(w.kind) == "Deny" and _inside(w, zone, now)]
    if denied:
        return f"window: Deny {denied[0].schedule} for {denied[0].duration}"
    allows = [w for w in windows if str(w.kind) == "Allow"]
    if allows and not any(_inside(w, zone, now) for w in allows):
        return f"window: waits for Allow {allows[0].schedule}"
    return ""


def instant(windows: Sequence[Window], now: float) -> float:
    """What `word` depends on of the time: the minute, where windows begin and end with minutes."""
    return now // 60 * 60 if all(_by_the_minute(window) for window in windows) else now


def _by_the_minute(window: Window) -> bool:
    return len(window.schedule.split()) == 5 and window.duration.total_seconds() % 60 == 0


def _inside(window: Window, zone: str, now: float) -> bool:
    named = window.timezone or "UTC"
    return _within(
        window.schedule,
        window.duration.total_seconds(),
        zone if named == "device" else named,
        instant((window,), now),
    )


@lru_cache(maxsize=4096)
def _within(schedule: str, seconds: float, zone: str, now: float) -> bool:
    moment = datetime.fromtimestamp(now, _zone(zone))
    # The latest start at or before now: one second on, looking back.
    start = next(CronSim(schedule, _next_minute(moment), reverse=True))
    return 0 <= (moment - start).total_seconds() < seconds


def _next_minute(moment: datetime) -> datetime:
    return datetime.fromtimestamp(moment.timestamp() // 60 * 60 + 60, moment.tzinfo)


def _zone(name: str) -> tzinfo:
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError):
        return UTC
