"""The pages of one thing that does not move: a release, a decision; and the board."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from sqlalchemy import Connection

from controller import outcomes, ulid
from controller.http.dashboard import evidence, rendering
from controller.http.dashboard.board import initiatives, scorecards
from controller.http.dashboard.measured import Measured
from controller.http.dashboard.routes import Page, Scene
from controller.http.dashboard.sights import rows_of, told_of
from controller.http.dashboard.signs import Sign, Tone, of_verdict, sign
from controller.http.ports import Deps
from controller.http.problems import Problem
from controller.manifests.kinds import Release
from controller.release_signing import Signers
from controller.rollout.replay import Unreadable, replay
from controller.store import lookups, views
from telemetry.outcomes import Shipped, delivery
from telemetry.store.database import reading

router = APIRouter(include_in_schema=False)
Plain = dict[str, Any]
DAY = 86_400.0
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
        "signatures": _signatures(page.deps, row.document),
        "title": row.name,
    }


def _signatures(deps: Deps, document: Plain) -> list[Plain]:
    """Who has signed it: key, person, and whether the signature holds."""
    if not document.get("signatures"):
        return []
    release, file = Release.model_validate(document), deps.settings.release_signers
    try:
        signers = Signers(people={}) if file is None else Signers.load(file)
    except ValueError:
        signers = Signers(people={})  # the controller says what is wrong with the file
    found = []
    for one in release.signatures:
        name, _ = signers.people.get(one.keyid, ("", b""))
        holds = bool(signers.vouching(release.model_copy(update={"signatures": (one,)})))
        found.append({"keyid": one.keyid, "name": name, "sign": _of_signature(name, holds)})
    return found


def _of_signature(name: str, holds: bool) -> Sign:
    if not name:
        return sign("Key not known here", Tone.WAIT)
    return sign("Holds", Tone.GOOD) if holds else sign("Is of something else", Tone.BAD)


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
    now, seen = page.deps.clock(), page.who.fleets
    since = ulid.new(max(0.0, now - days * DAY), bytes(10))
    with reading(page.deps.engine) as conn:
        rows = lookups.opened_since(conn, since, seen)
        stops = views.active_stops(conn)
    shipped = [(_shipped(row), _plain(row)) for row in rows]
    cards = scorecards(delivery([what for what, _ in shipped], days), shipped)
    measured: Measured = page.request.app.state.measured
    result = measured.get(("outcomes", days, seen), lambda: _outcomes(page.deps, seen, days))
    shown = {
        "stops": stops,
        "cards": cards,
        "days": days,
        "periods": PERIODS,
        "rollouts": len(rows),
        "coming": result is None,
        "initiatives": initiatives(result.value["items"]) if result and result.value else None,
        "measured_at": None if result is None else views.when(result.at),
        "title": "Board",
    }
    return rendering.page(page.request, "board.html", page.who, shown)


def _outcomes(deps: Deps, seen: frozenset[str], days: int) -> Plain:
    with reading(deps.engine) as conn:
        return outcomes.board(conn, deps.reader, now=deps.clock(), days=days, fleets=seen)


def _shipped(row: Any) -> Shipped:
    labels = row.fleet_labels or {}
    return Shipped(
        rollout=row.id,
        product=str(labels.get("product", "")),
        team=str(labels.get("team", "")),
        state=row.state,
        committed_at=row.opened_at,
        finished_at=row.finished_at,
        rejected_at=row.ended_at,
        fixes=bool(row.fixes),
    )


def _plain(row: Any) -> Plain:
    return {"id": row.id, "release": row.release, "fleet": row.fleet, "state": row.state}
