"""The pages of one thing that does not move: a release, a decision; and the board."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from sqlalchemy import Connection

from controller import ulid
from controller.http.dashboard import dora, evidence, rendering
from controller.http.dashboard.routes import Page, Scene
from controller.http.dashboard.sights import rows_of, told_of
from controller.http.dashboard.signs import of_verdict
from controller.http.problems import Problem
from controller.rollout.replay import Unreadable, replay
from controller.store import lookups, views
from telemetry.store.database import reading

router = APIRouter(include_in_schema=False)
Plain = dict[str, Any]
PERIODS = (30, 90, 365)  # days
_ROLLOUTS_SHOWN = 20


@router.get("/releases/{release}")
def release(page: Page, release: str) -> Response:
    with reading(page.deps.engine) as conn:
        shown = _release(page, conn, release)
    return rendering.page(page.request, "release.html", page.who, shown)


def _release(page: Scene, conn: Connection, name: str) -> Plain:
    row = lookups.find_release(conn, name)
    if row is None:
        raise Problem(404, f"release {name[:80]!r}: unknown")
    rollouts = [
        one for one in lookups.of_release(conn, name, _ROLLOUTS_SHOWN) if page.who.sees(one.fleet)
    ]
    artifacts = row.document.get("artifacts", ())
    return {
        "stops": views.active_stops(conn),
        "name": row.name,
        "document": row.document,
        "artifacts": artifacts,
        "digest": row.digest,
        "commit": row.commit,
        "at": views.when(row.seen_at),
        "holds": [
            h for h in lookups.holds_of_digest(conn, row.digest) if page.who.sees(h["fleet"])
        ],
        "rows": rows_of(told_of(conn, rollouts)),
        "installed": _installed(page, conn, {str(a["digest"]) for a in artifacts}),
        "title": row.name,
    }


def _installed(page: Scene, conn: Connection, digests: set[str]) -> list[Plain]:
    """Where its artifacts run now: fleet, component, devices of how many."""
    return [
        {"fleet": fleet, "component": component, "n": n, "total": counts.active}
        for fleet, counts in sorted(page.census.fleets(conn).items())
        if page.who.sees(fleet)
        for component, runs in sorted(counts.runs.items())
        if (n := sum(k for (_, digest), k in runs.items() if digest in digests))
    ]


@router.get("/decisions/{decision}")
def decision(page: Page, decision: str) -> Response:
    with reading(page.deps.engine) as conn:
        row = views.find_decision(conn, decision)
        owner = None if row is None else views.find_rollout(conn, row.rollout)
        if row is None or owner is None or not page.who.sees(owner.fleet):
            raise Problem(404, f"decision {decision[:80]!r}: unknown")
        one, stops = views.decision(row, whole=True), views.active_stops(conn)
    shown = {
        "stops": stops,
        "one": one,
        "rollout": {"id": owner.id, "name": owner.name, "release": owner.release},
        "sign": of_verdict(one["verdict"]),
        "rails": evidence.guardrails(one["numbers"]),
        "harm": one["numbers"].get("harm"),
        "harm_limit": one["numbers"].get("harm_limit"),
        "missing": one["numbers"].get("missing", ()),
        "again": _again(one),
        "title": f"{owner.name}: {one['verdict']}",
    }
    return rendering.page(page.request, "decision.html", page.who, shown)


def _again(one: Plain) -> Plain | None:
    """The decision judged again, now, from the inputs that were stored with it."""
    try:
        judged = replay(one)
    except Unreadable as error:
        return {"same": False, "sentence": f"It cannot be judged again: {error}"}
    return {"same": judged[0].same, "sentence": judged[0].sentence} if judged else None


@router.get("/board")
def board(page: Page, days: Annotated[int, Query(ge=1, le=3650)] = 90) -> Response:
    now = page.deps.clock()
    since = ulid.new(max(0.0, now - days * dora.DAY), bytes(10))
    with reading(page.deps.engine) as conn:
        rows = lookups.opened_since(conn, since, page.who.fleets)
        stops = views.active_stops(conn)
    shown = {
        "stops": stops,
        "cards": dora.scorecards([_ended(row) for row in rows], days),
        "days": days,
        "periods": PERIODS,
        "rollouts": len(rows),
        "outcomes": None,
        "title": "Board",
    }
    return rendering.page(page.request, "board.html", page.who, shown)


def _ended(row: Any) -> dora.Ended:
    labels = row.fleet_labels or {}
    flags = row.flags or {}
    return dora.Ended(
        id=row.id,
        product=str(labels.get("product", "no product label")),
        team=str(labels.get("team", "no team label")),
        fleet=row.fleet,
        release=row.release,
        state=row.state,
        opened_at=row.opened_at,
        finished_at=row.finished_at,
        rejected_at=flags.get("ended_at"),
        fixes=bool(row.fixes),
    )
