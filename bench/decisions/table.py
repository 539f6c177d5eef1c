"""What many runs say about a method: shares with exact bounds, medians and means."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean, median
from typing import Any

from bench.decisions.fleet import SCENARIOS
from bench.decisions.plan import Result
from bench.report import Row
from telemetry.evidence.outcome import upper_bound

# What issue 4 wants of the engine: scenario → figure → (limit, which way is better).
WANTED: dict[str, dict[str, tuple[float, str]]] = {
    "S0": {
        "false_rollback_upper": (0.05, "lower"),
        "false_hold": (0.02, "lower"),
        "hours_to_all": (80, "lower"),
    },
    "S1": {"caught": (0.60, "higher")},
    "S2": {
        "caught": (1.0, "higher"),
        "devices_exposed": (400, "lower"),
        "bad_device_hours": (8_000, "lower"),
    },
    "S3": {"caught": (1.0, "higher")},
    "S4": {"caught": (1.0, "higher")},
    "S5a": {"caught": (0.50, "higher")},
    "S5b": {"resolved": (0.90, "higher")},
    "S5c": {"bad_device_hours": (500, "lower")},
    "S6a": {"caught": (0.95, "higher")},
    "S6b": {"resolved": (0.90, "higher")},
    "S7a": {"caught": (1.0, "higher")},
    "S7b": {"caught": (1.0, "higher")},
    "S8": {"caught": (1.0, "higher"), "devices_exposed": (1_500, "lower")},
    "S9": {"caught": (0.90, "higher"), "dead_devices": (12, "lower")},
}


def figures(results: Sequence[Result]) -> dict[str, Any]:
    """The columns of one (method, scenario)."""
    first, n = results[0], len(results)
    good = first.scenario == "S0"
    rolled, held = sum(r.rolled_back for r in results), sum(r.held for r in results)
    reached = [r.hours_to_all for r in results if not math.isnan(r.hours_to_all)]
    # A release that never got to all counts as slower than any that did.
    times = sorted([*reached, *[math.inf] * (n - len(reached))])
    middle = times[(n - 1) // 2]
    return {
        "method": first.method,
        "scenario": first.scenario,
        "runs": n,
        "false_rollback": rolled / n if good else None,
        "false_rollback_upper": upper_bound(rolled, n, 0.95) if good else None,
        "false_hold": held / n if good else None,
        "caught": None if good else sum(r.caught for r in results) / n,
        "resolved": None if good else rolled / n,
        "devices_exposed": median(r.exposed for r in results),
        "bad_device_hours": None if good else round(fmean(r.bad_hours for r in results)),
        "hours_to_all": middle if good and math.isfinite(middle) else None,
        "dead_devices": fmean(r.dead for r in results) if first.scenario == "S9" else None,
    }


def rows(results: Iterable[Result]) -> list[Row]:
    """One row per figure that is wanted, or per method and scenario; all columns in each."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for one in results:
        groups.setdefault((one.scenario, one.method), []).append(one)
    order = list(SCENARIOS)
    found = []
    for (scenario, method), part in sorted(
        groups.items(), key=lambda item: (order.index(item[0][0]), item[0][1] != "engine")
    ):
        columns = figures(part)
        wanted = WANTED.get(scenario, {}) if method == "engine" else {}
        shown = {k: v if v is not None else "" for k, v in columns.items()}
        main = "false_rollback" if scenario == "S0" else "caught"
        figure: dict[str, tuple[float | None, str]] = {**wanted} or {main: (None, "")}
        for name, (limit, better) in figure.items():
            value = columns[name]
            found.append(
                Row(
                    name=f"{scenario} {method} {name}",
                    value=math.inf if value is None else float(value),
                    unit=_UNITS.get(name, "share"),
                    limit=limit,
                    better=better or ("lower" if scenario == "S0" else "higher"),
                    peer="issue 4" if limit is not None else "",
                    more=shown,
                )
            )
    return found


_UNITS = {
    "hours_to_all": "h",
    "devices_exposed": "devices",
    "bad_device_hours": "device hours",
    "dead_devices": "devices",
}
