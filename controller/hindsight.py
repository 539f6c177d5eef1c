"""Reads a rollout's past for `controller.rollout.hindsight`: draws, members, verdicts, messages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Row, select

from controller.rollout.hindsight import Past, cases
from controller.store.tables import decisions, members
from telemetry.evidence.ledger import CONTROL, EXPOSED, Enrolment
from telemetry.report import HealthRow, TelemetryReader


def past(conn: Connection, rollout: Row[Any]) -> Past:
    """Raises ValueError where a recorded case is not readable."""
    query = select(decisions).where(decisions.c.rollout == rollout.id).order_by(decisions.c.id)
    rows: list[Mapping[str, Any]] = [dict(row) for row in conn.execute(query).mappings()]
    when = {row["id"]: float(row["at"]) for row in rows}
    return Past(
        name=rollout.name,
        release=rollout.release,
        opened_at=float(rollout.opened_at),
        finished_at=rollout.finished_at,
        enrolled=tuple(_enrolled(conn, rollout, rows)),
        recorded=tuple(cases(rows, when)),
    )


def messages(reader: TelemetryReader) -> Iterator[Sequence[HealthRow]]:
    """Every kept message, in order of arrival."""
    batch = 0
    while rows := reader.health_since(batch):
        yield rows
        batch = max(row.batch for row in rows)


def _enrolled(
    conn: Connection, rollout: Row[Any], rows: Sequence[Mapping[str, Any]]
) -> Iterator[Enrolment]:
    """Members as they stand, and who was a control before it was drawn."""
    known = {
        row.device: row
        for row in conn.execute(select(members).where(members.c.rollout == rollout.id))
    }
    stepped = [row for row in rows if row["kind"] == "draw"]
    for step, draw in enumerate(stepped):
        at = float(draw["at"])
        for device in draw["inputs"].get("control", ()):
            row = known.get(device)
            if row is None:
                continue
            later = _taken(stepped[step + 1 :], device)
            left = row.left_at if row.arm == CONTROL else None
            until = min((t for t in (later, left) if t is not None), default=None)
            yield _one(rollout, row, CONTROL, step, at, until)
    for row in known.values():
        if row.arm == EXPOSED and row.exposed_at is not None:
            yield _one(rollout, row, EXPOSED, row.step, row.exposed_at, row.left_at)


def _taken(draws: Sequence[Mapping[str, Any]], device: str) -> float | None:
    """When a later draw took this control: as exposed, or as the control of another wave."""
    for draw in draws:
        if device in draw["inputs"].get("exposed", ()) or device in draw["inputs"].get(
            "control", ()
        ):
            return float(draw["at"])
    return None


def _one(
    rollout: Row[Any], row: Row[Any], arm: str, step: int, since: float, until: float | None
) -> Enrolment:
    exposed = arm == EXPOSED
    return Enrolment(
        device=row.device,
        arm=arm,
        wave=step,
        hardware=row.hardware,
        band=row.band,
        since=float(since),
        until=until,
        attempt=row.attempt if exposed else None,
        digests=dict(rollout.artifacts) if exposed else {},
    )
