"""Joins what the registry, telemetry and the rollouts know of devices into the API's JSON.

Reading only. Telemetry is followed by its change numbers, scores are used for some seconds: a page
of devices costs what is on the page.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import structlog
from sqlalchemy import Connection, Engine, Row

from controller.rollout.cohort import assign, scored
from controller.rollout.model import Device
from controller.rollout.waves import Pinned
from controller.store import views
from controller.store.reach import registry
from device_agent.codec import to_wire
from telemetry.report import DeviceRow, TelemetryReader
from telemetry.score import Explanation, Scores, placed, score
from telemetry.score_days import ScoreDays
from telemetry.store.database import reading

log = structlog.get_logger()
_SCORES_LAST = 10.0


@dataclass(frozen=True, slots=True)
class _Scored:
    at: float
    cohorts: Mapping[str, str]
    places: Mapping[str, int] = field(default_factory=dict)  # of devices in the scores
    scores: Scores | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)  # cohort → devices
    took: float = 0.0  # seconds

    def value(self, device: str) -> float | None:
        place = self.places.get(device)
        return None if self.scores is None or place is None else _finite(self.scores.value[place])

    def of(self, device: str) -> dict[str, Any]:
        """One device's score as the API tells it."""
        scores, place = self.scores, self.places.get(device)
        if scores is None or place is None:
            return {"value": None, "exposureHours": 0.0, "parts": {}}
        return {
            "value": _finite(scores.value[place]),
            "exposureHours": float(scores.exposure_hours[place]),
            "parts": {
                name: part
                for name, column in scores.parts.items()
                if (part := _finite(column[place])) is not None
            },
        }


class DeviceBook:
    def __init__(self, reader: TelemetryReader, clock: Callable[[], float]) -> None:
        self._reader = reader
        self._clock = clock
        self._lock = threading.Lock()
        self._seen: dict[str, DeviceRow] = {}
        self._change = 0
        self._scored: dict[str, _Scored] = {}
        self._days = ScoreDays(reader)
        self._scoring = threading.Lock()
        self._followers: list[Callable[[DeviceRow], None]] = []

    def follow(self, tell: Callable[[DeviceRow], None]) -> None:
        """Call `tell` with every row that is read from now on; it must be quick."""
        with self._lock:
            for row in self._seen.values():
                tell(row)
            self._followers.append(tell)

    def seen(self) -> Mapping[str, DeviceRow]:
        """The last word of every device."""
        with self._lock:
            for row in self._reader.devices_changed(self._change):
                self._seen[row.device] = row
                self._change = max(self._change, row.change)
                for tell in self._followers:
                    tell(row)
            return self._seen

    def describe(self, conn: Connection, rows: Sequence[Row[Any]]) -> list[dict[str, Any]]:
        """The API's JSON of registry rows."""
        ids = [row.id for row in rows]
        seen, orders = self.seen(), views.orders(conn, ids)
        drawn = views.memberships(conn, ids)
        waves = views.cohorts_of_steps(conn, list({row.rollout for row in drawn.values()}))
        now = self._clock()
        found = {fleet: self._score(conn, fleet, now) for fleet in {row.fleet for row in rows}}
        return [
            _device(
                row,
                seen.get(row.id),
                orders.get(row.id),
                drawn.get(row.id),
                waves,
                found[row.fleet],
            )
            for row in rows
        ]

    def explain(self, conn: Connection, fleet: str, device: str) -> Explanation | None:
        """The arithmetic of one device's score; None where there is none."""
        scores = self._score(conn, fleet, self._clock()).scores
        return None if scores is None else scores.explain(device)

    def cohort_sizes(self, fleet: str) -> Mapping[str, int]:
        """Devices in each cohort when the fleet was last scored; empty before that."""
        with self._lock:
            known = self._scored.get(fleet)
        return {} if known is None else known.sizes

    def scores(self, conn: Connection, fleets: set[str]) -> dict[str, float | None]:
        """device → its score, of these fleets."""
        now = self._clock()
        found = [self._score(conn, fleet, now) for fleet in sorted(fleets)]
        return {device: one.value(device) for one in found for device in one.places}

    def warm(self, engine: Engine) -> None:
        """Read and score everything once, so that the first page need not."""
        self.seen()
        with reading(engine) as conn, self._scoring:
            self._all_anew(conn, views.names_of_fleets(conn))

    def _score(self, conn: Connection, fleet: str, now: float) -> _Scored:
        """The scores of a fleet: a page waits for the first ones only, then they are made anew
        beside the pages, in at most a twentieth of the time. Fleets that are asked for at the
        same moment share what is read for it."""
        with self._lock:
            known = self._scored.get(fleet)
        if known is None:
            with self._scoring:
                known = self._scored.get(fleet)
                return known if known is not None else self._anew(conn, fleet, now)
        if now - known.at >= max(_SCORES_LAST, 20 * known.took) and self._scoring.acquire(False):
            beside = threading.Thread(
                target=self._beside, args=(conn.engine,), name="scores", daemon=True
            )
            beside.start()
        return known

    def _beside(self, engine: Engine) -> None:
        try:
            with self._lock:
                fleets = list(self._scored)
            with reading(engine) as conn:
                self._all_anew(conn, fleets)
        except Exception:  # the outermost turn of this thread: the scores before stay
            log.exception("scores")
        finally:
            self._scoring.release()

    def _all_anew(self, conn: Connection, fleets: Sequence[str]) -> None:
        """All at the same moment: fleets with the same window share what is read for it."""
        now, began = self._clock(), time.perf_counter()
        fresh = {fleet: self._compute(conn, fleet, now) for fleet in fleets}
        took = time.perf_counter() - began
        with self._lock:
            self._scored.update({name: replace(one, took=took) for name, one in fresh.items()})

    def _anew(self, conn: Connection, fleet: str, now: float) -> _Scored:
        began = time.perf_counter()
        fresh = self._compute(conn, fleet, now)
        fresh = replace(fresh, took=time.perf_counter() - began)
        with self._lock:
            self._scored[fleet] = fresh
        return fresh

    def _compute(self, conn: Connection, fleet: str, now: float) -> _Scored:
        plain = views.pinned_of_fleet(conn, fleet)
        if not plain:
            return _Scored(now, {})
        pinned, devices = Pinned.from_json(plain), registry(conn, fleet, None)
        spec = pinned.policy.score
        if spec is None:
            cohorts = _cohorts(devices, pinned, {})
            return _Scored(now, cohorts, sizes=Counter(cohorts.values()))
        result = score([day.of(devices) for day in self._days.read(spec, now)], spec)
        cohorts = _cohorts(devices, pinned, placed(result))
        places = {device: place for place, device in enumerate(result.devices)}
        return _Scored(now, cohorts, places, result, Counter(cohorts.values()))


def _finite(number: float) -> float | None:
    return float(number) if math.isfinite(number) else None


def _cohorts(
    devices: Mapping[str, Device],
    pinned: Pinned,
    scores: Mapping[str, tuple[float | None, int]],
) -> dict[str, str]:
    """The cohort that each device would be drawn from now."""
    active = [device for device in devices.values() if device.status == "active"]
    found = assign(pinned.fleet.cohorts, scored(active, scores), "view")
    return {c.device.id: name for name, members in found.items() for c in members}


def _device(
    row: Row[Any],
    seen: DeviceRow | None,
    order: Mapping[str, Any] | None,
    drawn: Row[Any] | None,
    waves: Mapping[str, Sequence[str | None]],
    score: _Scored,
) -> dict[str, Any]:
    cohort, score_then = _membership(drawn, waves)
    return {
        "id": row.id,
        "fleet": row.fleet,
        "labels": row.labels,
        "status": row.status,
        "enrolledAt": views.when(row.enrolled_at),
        "cohort": cohort or score.cohorts.get(row.id),
        "score": score.of(row.id),
        "scoreWhenDrawn": score_then,
        "membership": None
        if drawn is None
        else {
            "rollout": drawn.rollout,
            "name": drawn.rollout_name,
            "step": drawn.step,
            "arm": drawn.arm,
            "state": drawn.state,
            "reason": drawn.reason,
        },
        "desired": order,
        **_reported(seen),
    }


def _membership(
    drawn: Row[Any] | None, waves: Mapping[str, Sequence[str | None]]
) -> tuple[str | None, float | None]:
    if drawn is None or drawn.arm == "control":
        return None, None if drawn is None else drawn.score
    steps = waves.get(drawn.rollout, ())
    return (steps[drawn.step] if 0 <= drawn.step < len(steps) else None), drawn.score


def _reported(seen: DeviceRow | None) -> dict[str, Any]:
    if seen is None:
        return {
            "state": None,
            "reason": None,
            "blockedBy": [],
            "attempt": None,
            "term": 0,
            "generation": 0,
            "components": {},
            "history": [],
            "lastContact": None,
            "reportedAt": None,
            "online": False,
            "log": "",
        }
    return {
        "state": None if seen.state is None else str(seen.state),
        "reason": seen.reason,
        "blockedBy": list(seen.blocked_by),
        "attempt": seen.attempt,
        "term": seen.term,
        "generation": seen.generation,
        "components": {name: to_wire(part) for name, part in seen.components.items()},
        "history": [to_wire(entry) for entry in seen.history],
        "lastContact": views.when(seen.last_contact),
        "reportedAt": views.when(seen.reported_at),
        "online": seen.online,
        "log": seen.log,
    }
