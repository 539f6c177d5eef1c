"""The routes that only look: fleets, devices, releases, rollouts, decisions, audit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from sqlalchemy import Connection, Row

from controller.http import paging
from controller.http.access import Principal, Right, must_everywhere, needs
from controller.http.ports import Book, Given
from controller.http.problems import Problem
from controller.store import views
from controller.store.devices import get_many
from telemetry.store.database import reading

router = APIRouter(prefix="/api/v1")
Viewer = Annotated[Principal, Depends(needs(Right.VIEW))]
Auditor = Annotated[Principal, Depends(needs(Right.AUDIT))]
Limit = Annotated[int, Query(ge=1, le=1000)]
Cursor = Annotated[str | None, Query(max_length=512)]
Filter = Annotated[str, Query(max_length=63)]
Plain = dict[str, Any]


def page(items: Sequence[Any], limit: int, last: str) -> Plain:
    more = paging.cursor(last) if len(items) == limit and items else None
    return {"items": list(items), "next": more}


@router.get("/fleets")
def fleets(deps: Given, who: Viewer) -> Plain:
    with reading(deps.engine) as conn:
        return {
            "items": views.fleets(conn, who.fleets),
            "git": views.git(conn),
            "stops": views.active_stops(conn),
            "next": None,
        }


@router.get("/fleets/{fleet}")
def fleet(fleet: str, deps: Given, who: Viewer) -> Plain:
    with reading(deps.engine) as conn:
        found = [f for f in views.fleets(conn, who.fleets) if f["name"] == fleet]
        if not found:
            raise Problem(404, f"fleet {fleet[:80]!r}: it has no device and no rollout")
        return {**found[0], "git": views.git(conn), "stops": views.active_stops(conn)}


@router.get("/devices")
def devices(
    deps: Given,
    book: Book,
    who: Viewer,
    cursor: Cursor = None,
    limit: Limit = 100,
    fleet: Filter = "",
    status: Filter = "",
) -> Plain:
    with reading(deps.engine) as conn:
        rows = views.list_devices(
            conn,
            after=paging.key(cursor),
            limit=limit,
            fleets=who.fleets,
            fleet=fleet,
            status=status,
        )
        return page(book.describe(conn, rows), limit, rows[-1].id if rows else "")


@router.get("/devices:changes")
def device_changes(
    deps: Given, book: Book, who: Viewer, cursor: Cursor = None, limit: Limit = 500
) -> Plain:
    """Devices whose registry row or last word changed since the cursor; the cursor never ends."""
    registry, reported = _marks(paging.key(cursor))
    with reading(deps.engine) as conn:
        rows = list(views.changed_devices(conn, since=registry, limit=limit))
        registry = max([registry, *(row.change for row in rows)])
        heard = sorted(
            (row for row in book.seen().values() if row.change > reported), key=lambda r: r.change
        )
        taken = heard[:limit]
        if len(heard) > limit:  # a batch is never split between two pages
            taken = [row for row in heard if row.change <= taken[-1].change]
        reported = max([reported, *(row.change for row in taken)])
        present = {row.id for row in rows}
        rows += _rows(conn, [row.device for row in taken if row.device not in present])
        visible = [row for row in rows if who.sees(row.fleet)]
        following = paging.cursor(f"{registry}.{reported}")
        return {"items": book.describe(conn, visible), "next": following}


@router.get("/devices/{device}")
def device(device: str, deps: Given, book: Book, who: Viewer) -> Plain:
    with reading(deps.engine) as conn:
        rows = [row for row in _rows(conn, [device]) if who.sees(row.fleet)]
        if not rows:
            raise Problem(404, f"device {device[:80]!r}: unknown")
        return book.describe(conn, rows)[0]


@router.get("/releases")
def releases(deps: Given, who: Viewer, cursor: Cursor = None, limit: Limit = 100) -> Plain:
    with reading(deps.engine) as conn:
        found = views.list_releases(conn, after=paging.key(cursor), limit=limit)
    return page(found, limit, found[-1]["name"] if found else "")


@router.get("/rollouts")
def rollouts(
    deps: Given, who: Viewer, cursor: Cursor = None, limit: Limit = 100, state: Filter = ""
) -> Plain:
    """Newest first."""
    with reading(deps.engine) as conn:
        rows = views.list_rollouts(
            conn, before=paging.key(cursor), limit=limit, fleets=who.fleets, state=state
        )
        return page(_described(conn, rows), limit, rows[-1].id if rows else "")


@router.get("/rollouts/{rollout}")
def rollout(rollout: str, deps: Given, who: Viewer, request: Request, response: Response) -> Any:
    with reading(deps.engine) as conn:
        row = find(conn, rollout, who)
        body = _described(conn, [row])[0]
    response.headers["ETag"] = f'"{row.revision}"'
    response.headers["Cache-Control"] = "no-cache"
    return body


@router.get("/rollouts/{rollout}/decisions")
def decisions(
    rollout: str, deps: Given, who: Viewer, cursor: Cursor = None, limit: Limit = 100
) -> Plain:
    """Newest first."""
    with reading(deps.engine) as conn:
        row = find(conn, rollout, who)
        found = views.list_decisions(conn, row.id, before=paging.key(cursor), limit=limit)
        items = [views.decision(entry, whole=False) for entry in found]
    return page(items, limit, items[-1]["id"] if items else "")


@router.get("/rollouts/{rollout}/evidence")
def evidence(
    rollout: str, deps: Given, who: Viewer, cursor: Cursor = None, limit: Limit = 20
) -> Plain:
    """Every decision whole, with its inputs and policy: what `replay` judges again."""
    with reading(deps.engine) as conn:
        row = find(conn, rollout, who)
        found = views.list_decisions(conn, row.id, before=paging.key(cursor), limit=limit)
        items = [views.decision(entry, whole=True) for entry in found]
        about = _described(conn, [row])[0]
    return {**page(items, limit, items[-1]["id"] if items else ""), "v": 1, "rollout": about}


@router.get("/decisions/{decision}")
def decision(decision: str, deps: Given, who: Viewer) -> Plain:
    with reading(deps.engine) as conn:
        row = views.find_decision(conn, decision)
        owner = None if row is None else views.find_rollout(conn, row.rollout)
        if row is None or owner is None or not who.sees(owner.fleet):
            raise Problem(404, f"decision {decision[:80]!r}: unknown")
        return views.decision(row, whole=True)


@router.get("/audit")
def audit(deps: Given, who: Auditor, cursor: Cursor = None, limit: Limit = 100) -> Plain:
    """Oldest first; of all fleets, so not for a token of some."""
    must_everywhere(who, Right.AUDIT, "the audit tells of all of them")
    key = paging.key(cursor) or "0"
    if not key.isdigit():
        raise Problem(400, "cursor: not one of this list", pointer="query/cursor")
    with reading(deps.engine) as conn:
        found = views.list_audit(conn, after=int(key), limit=limit)
    return page(found, limit, str(found[-1]["seq"]) if found else "")


def find(conn: Connection, name: str, who: Principal) -> Row[Any]:
    """The rollout of this id, or the newest of this name; 404 when it is not for this person."""
    row = views.find_rollout(conn, name)
    if row is None or not who.sees(row.fleet):
        raise Problem(404, f"rollout {name[:80]!r}: unknown; `bellwether status` lists them")
    return row


def _described(conn: Connection, rows: Sequence[Row[Any]]) -> list[Plain]:
    counts = views.count_members(conn, [row.id for row in rows])
    held = views.holds_of(conn, sorted({row.name for row in rows}))
    return [
        views.rollout(row, counts[row.id], [h for h in held[row.name] if h["digest"] == row.digest])
        for row in rows
    ]


def _rows(conn: Connection, ids: Sequence[str]) -> list[Row[Any]]:
    return list(get_many(conn, list(ids)).values())


def _marks(key: str) -> tuple[int, int]:
    first, _, second = (key or "0.0").partition(".")
    if not (first.isdigit() and second.isdigit()):
        raise Problem(400, "cursor: not one of this list", pointer="query/cursor")
    return int(first), int(second)
