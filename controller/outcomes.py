"""Reads what `telemetry.outcomes` judges: who was drawn when, what was reported before and since.

A stratum is one draw: who it exposed, against who was its control, until the next draw. With a
holdout there is one stratum: everybody drawn, against who was held out, from the last draw on. The
lists come from the recorded draws: a device that became exposed later was a control before.

Sums are kept by the hour: a window begins with the first whole hour after its draw. Windows of a
few hours are read from the messages themselves, where these are still kept.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, Row, select

from controller import ulid
from controller.rollout import holdout
from controller.rollout.model import Rollout, RolloutState
from controller.rollout.waves import Pinned
from controller.store import views
from controller.store.tables import decisions, devices, rollouts
from telemetry.outcomes import Outcome, Shipped, Stratum, delivery, goal, measure, series_of
from telemetry.report import HealthRow, TelemetryReader, Totals, added

DAY = 86_400.0
HOUR = 3600.0
SHORT = 6 * HOUR  # windows up to here are read from messages
_MEASURED, _COUNTED = 50, 2_000  # newest rollouts: with their goals; in the measures of delivery
HOLDOUT, WAITING = "the holdout", "devices not yet updated"
Plain = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Draw:
    at: float
    exposed: frozenset[str]
    control: frozenset[str]
    watermark: int  # the last batch that was known then


def board(
    conn: Connection, reader: TelemetryReader, *, now: float, days: float, fleets: frozenset[str]
) -> Plain:
    """What was changed by each release, and how each team ships: JSON of `GET /outcomes`."""
    since = ulid.new(max(0.0, now - days * DAY), bytes(10))
    query = select(rollouts).where(rollouts.c.id >= since).order_by(rollouts.c.id.desc())
    if fleets:
        query = query.where(rollouts.c.fleet.in_(sorted(fleets)))
    rows = conn.execute(query.limit(_COUNTED)).all()
    return {
        "days": days,
        "items": [_changed(conn, reader, row, now) for row in rows[:_MEASURED]],
        "delivery": [asdict(one) for one in delivery([_shipped(row) for row in rows], days)],
    }


def of_rollout(
    conn: Connection, reader: TelemetryReader, row: Row[Any], now: float
) -> list[Outcome]:
    """Every goal of the rollout's policy, judged now."""
    pinned = Pinned.from_json(row.pinned)
    if not pinned.policy.goals:
        return []
    strata, against = _strata(conn, reader, row, pinned, now)
    engine = pinned.policy.judged.engine
    return [measure(goal(aim), strata, against, engine) for aim in pinned.policy.goals]


def _changed(conn: Connection, reader: TelemetryReader, row: Row[Any], now: float) -> Plain:
    pinned = row.pinned
    release, fleet = pinned.get("release", {}), pinned.get("fleet", {})
    return {
        "rollout": row.id,
        "name": row.name,
        "fleet": row.fleet,
        "release": row.release,
        "state": row.state,
        "initiative": release.get("labels", {}).get("initiative"),
        "product": fleet.get("labels", {}).get("product"),
        "team": fleet.get("labels", {}).get("team"),
        "openedAt": views.when(row.opened_at),
        "outcomes": [one.to_json() for one in of_rollout(conn, reader, row, now)],
    }


def _strata(
    conn: Connection, reader: TelemetryReader, row: Row[Any], pinned: Pinned, now: float
) -> tuple[list[Stratum], str]:
    draws = _draws(conn, row.id)
    if not draws:
        return [], WAITING
    ended = float(row.flags.get("ended_at", math.inf)) if row.state in _REJECTED else math.inf
    engine = pinned.policy.judged.engine
    names = series_of([goal(aim) for aim in pinned.policy.goals])
    before = reader.totals(
        since=row.opened_at - engine.baseline_days * DAY,
        until=math.floor(row.opened_at / HOUR) * HOUR,
        names=names,
    )
    held = _held_out(conn, row, pinned)
    drawn = frozenset[str]().union(*(draw.exposed for draw in draws))
    if held - drawn:
        until = min(now, ended, holdout.until(_rollout(row), pinned))
        since = _between(reader, draws[-1], until, names)
        return [Stratum(treated=drawn, control=held - drawn, before=before, since=since)], HOLDOUT
    strata = []
    for place, draw in enumerate(draws):
        following = draws[place + 1].at if place + 1 < len(draws) else math.inf
        until = min(now, ended, following)
        if draw.exposed and draw.control and until > draw.at:
            since = _between(reader, draw, until, names)
            strata.append(
                Stratum(treated=draw.exposed, control=draw.control, before=before, since=since)
            )
    return strata, WAITING


def _draws(conn: Connection, rollout: str) -> list[_Draw]:
    columns = (decisions.c.at, decisions.c.inputs, decisions.c.watermark)
    query = select(*columns).where(decisions.c.rollout == rollout, decisions.c.kind == "draw")
    return [
        _Draw(
            at=float(at),
            exposed=frozenset(inputs.get("exposed", ())),
            control=frozenset(inputs.get("control", ())),
            watermark=int(watermark),
        )
        for at, inputs, watermark in conn.execute(query.order_by(decisions.c.id))
    ]


def _between(reader: TelemetryReader, draw: _Draw, until: float, names: Collection[str]) -> Totals:
    """Sums of what happened after a draw, until a moment."""
    if until - draw.at > SHORT:
        return reader.totals(since=math.ceil(draw.at / HOUR) * HOUR, until=until, names=names)
    rows: list[HealthRow] = []
    batch = draw.watermark
    while some := reader.health_since(batch):
        batch = max(row.batch for row in some)
        rows += [row for row in some if row.t0 >= draw.at and row.t0 < until]
    return added(rows)


_REJECTED = frozenset({RolloutState.ROLLING_BACK, RolloutState.ROLLED_BACK, RolloutState.HELD})


def _held_out(conn: Connection, row: Row[Any], pinned: Pinned) -> frozenset[str]:
    """Devices that the holdout keeps, or kept, out of this rollout: drawable but for it."""
    rule = pinned.rollout.holdout
    if rule is None:
        return frozenset()
    query = select(devices).where(devices.c.fleet == row.fleet, devices.c.status == "active")
    return frozenset(
        d.id
        for d in conn.execute(query)
        if holdout.chosen(row.seed, d.id, rule.percent)
        and (d.enrolled_at or 0.0) <= row.opened_at
        and pinned.release.fits(d.labels)
    )


def _rollout(row: Row[Any]) -> Rollout:
    names = {c.name for c in rollouts.c} & set(Rollout.__dataclass_fields__)
    values = {name: getattr(row, name) for name in names}
    return Rollout(**{**values, "state": RolloutState(row.state)})


def _shipped(row: Row[Any]) -> Shipped:
    pinned, flags = row.pinned, row.flags or {}
    labels = pinned.get("fleet", {}).get("labels", {})
    return Shipped(
        rollout=row.id,
        product=str(labels.get("product", "")),
        team=str(labels.get("team", "")),
        state=row.state,
        committed_at=row.opened_at,
        finished_at=row.finished_at,
        rejected_at=flags.get("ended_at"),
        fixes=bool(pinned.get("release", {}).get("fixes")),
    )
