"""Decides what a written scalar means: durations, shares, ratios, versions.

Pure. Manifest text arrives as strings only, so that `10.10` and `no` stay what was written; each
kind of scalar is parsed here, and an error says what to write instead.
"""

from __future__ import annotations

import math
import re
from datetime import timedelta

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SIZE = re.compile(r"(\d+)(B|kB|MB|GB)?")
_BYTES = {None: 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}
LONGEST = timedelta(days=3650)


def duration(value: object) -> timedelta:
    """`500ms`, `8s`, `30m`, `24h`, `14d` or a sum such as `1h30m`; seconds when it is a number."""
    if isinstance(value, timedelta):
        found = value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        found = _seconds(float(value))
    elif isinstance(value, str) and value == "0":
        found = timedelta()
    elif isinstance(value, str) and _DURATION.match(value) and not _DURATION.sub("", value):
        parts = _DURATION.findall(value)
        found = _seconds(sum(float(n) * _SECONDS[unit] for n, unit in parts))
    else:
        raise ValueError(f"{value!r} is no duration: write 30s, 15m, 24h or 14d")
    if not timedelta() <= found <= LONGEST:
        raise ValueError(f"{value!r} is out of range: 0s to 3650d")
    return found


def _seconds(amount: float) -> timedelta:
    # Beyond the longest allowed (NaN too) a timedelta might not hold it: any such one will do.
    return timedelta(seconds=amount) if 0 <= amount < 1e9 else LONGEST + timedelta(days=1)


def share(value: object) -> float:
    """`80%`, `0.5%`, or a plain number of percent (`10`) → 0…1; a float is a share already."""
    if isinstance(value, float):
        found = value
    elif isinstance(value, str) and value.endswith("%"):
        found = number(value[:-1]) / 100
    elif isinstance(value, int | str) and not isinstance(value, bool):
        found = number(value) / 100
    else:
        raise ValueError(f"{value!r} is no percentage: write 80%")
    if not math.isfinite(found) or not 0 <= found <= 1:
        raise ValueError(f"{value!r} is out of range: 0% to 100%")
    return found


def number(value: object) -> float:
    """A finite number; NaN and infinities are refused."""
    try:
        found = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{value!r} is no number") from None
    if isinstance(value, bool) or not math.isfinite(found):
        raise ValueError(f"{value!r} is no finite number")
    return found


def margin(value: object) -> float:
    """A ratio or amount (`2`), or a share written as one (`30%`)."""
    if isinstance(value, str) and value.endswith("%"):
        return share(value)
    return number(value)


def whole(value: object) -> int:
    """A whole number of at most 2^53 − 1."""
    if isinstance(value, str) and re.fullmatch(r"\d{1,16}", value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**53:
        raise ValueError(f"{value!r} is no whole number of 0 or more")
    return value


def truth(value: object) -> bool:
    """`true` or `false`; nothing else is one of them."""
    if isinstance(value, bool):
        return value
    if value in ("true", "false"):
        return value == "true"
    raise ValueError(f"{value!r}: write true or false")


def size(value: object) -> int:
    """Bytes: `50MB`, `10kB`, `734003200`."""
    if isinstance(value, int) and not isinstance(value, bool):
        return whole(value)
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"{value!r} is no size: write 734003200, 10kB or 50MB")
    return whole(int(match.group(1)) * _BYTES[match.group(2)])
