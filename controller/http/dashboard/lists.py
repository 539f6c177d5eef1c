"""The pages that list: rollouts, devices, releases, decisions, audit; page by page, by index.

Each list takes its filters from the query and shows them as a form; `next` leads on. Beyond the
last row the list is empty, never an error. `?format=json` and `?format=csv` answer the same rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Response

from controller.http import paging
from controller.http.access import must_everywhere
from controller.http.dashboard import rendering, sheets
from controller.http.dashboard.routes import Page, Scene
from controller.http.dashboard.sights import decided, rows_of, told_of
from controller.http.dashboard.signs import of_device, of_member
from controller.http.problems import Problem
from controller.roles import Right
from controller.rollout.model import MemberState, RolloutState
from controller.store import lookups, views
from telemetry.store.database import reading

router = APIRouter(include_in_schema=False)
Text = Annotated[str, Query(max_length=128)]
Cursor = Annotated[str, Query(max_length=512)]
Plain = dict[str, Any]

ROLLOUTS, DEVICES, RELEASES, DECISIONS, AUDIT = 25, 50, 50, 50, 100  # rows a page
STATUSES = ("active", "pending", "quarantined", "retired")


@router.get("/rollouts")
def rollouts(page: Page, state: Text = "", fleet: Text = "", cursor: Cursor = "") -> Response:
    with reading(page.deps.engine) as conn:
        rows = lookups.list_rollouts(
            conn, before=paging.key(cursor), limit=ROLLOUTS, fleets=page.who.fleets,
            fleet=fleet, state=state,
        )  # fmt: skip
        shown = {"rows": rows_of(told_of(conn, rows)), "states": [str(s) for s in RolloutState]}
    last = rows[-1].id if len(rows) == ROLLOUTS else ""
    return _list(page, "rollouts", shown, {"state": state, "fleet": fleet}, last)


@router.get("/devices")
def devices(
    page: Page, fleet: Text = "", status: Text = "", q: Text = "", rollout: Text = "",
    member: Text = "", cursor: Cursor = "",
) -> Response:  # fmt: skip
    with reading(page.deps.engine) as conn:
        rows = lookups.list_devices(
            conn, after=paging.key(cursor), limit=DEVICES, fleets=page.who.fleets, fleet=fleet,
            status=status, prefix=q.strip(), rollout=rollout, state=member if rollout else "",
        )  # fmt: skip
        told = page.book.describe(conn, rows)
        names = lookups.names_of(conn, [rollout]) if rollout else {}
    shown = {
        "rows": [_device(one, rollout) for one in told],
        "of": names.get(rollout),
        "statuses": STATUSES,
        "members": [str(s) for s in MemberState],
        "counts": _counts(page, fleet),
    }
    wanted = {"fleet": fleet, "status": status, "q": q, "rollout": rollout, "member": member}
    return _list(page, "devices", shown, wanted, rows[-1].id if len(rows) == DEVICES else "")


def _device(one: Plain, rollout: str) -> Plain:
    member = one["membership"]
    ours = member if member and (not rollout or member["rollout"] == rollout) else None
    return {
        "one": one,
        "sign": of_device(one["status"], one["online"], one["state"]),
        "member": None if ours is None else of_member(ours["state"]),
        "why": "" if ours is None else ours["reason"],
        "runs": ", ".join(
            f"{part['release']}" + ("" if part.get("committed") else " (on trial)")
            for _, part in sorted(one["components"].items())
        ),
    }


def _counts(page: Scene, fleet: str) -> Plain | None:
    """Of the fleet that is listed, or of all that this person sees."""
    with reading(page.deps.engine) as conn:
        counted = page.census.fleets(conn)
    seen = [c for name, c in counted.items() if page.who.sees(name) and fleet in ("", name)]
    return {
        "total": sum(c.active for c in seen),
        "online": sum(c.online for c in seen),
        "unheard": sum(c.active - c.heard for c in seen),
    }


@router.get("/releases")
def releases(page: Page, cursor: Cursor = "") -> Response:
    with reading(page.deps.engine) as conn:
        rows = lookups.newest_releases(conn, before=_place(cursor), limit=RELEASES)
        held = lookups.held_digests(conn)
    shown = {
        "rows": [
            {
                "name": row.name,
                "version": row.document.get("version", ""),
                "components": ", ".join(
                    str(a.get("component", "")) for a in row.document.get("artifacts", ())
                ),
                "fixes": row.document.get("fixes"),
                "digest": row.digest,
                "commit": row.commit,
                "at": views.when(row.seen_at),
                "held": row.digest in held,
            }
            for row in rows
        ]
    }
    last = f"{rows[-1].seen_at!r} {rows[-1].name}" if len(rows) == RELEASES else ""
    return _list(page, "releases", shown, {}, last)


def _place(cursor: str) -> tuple[float, str] | None:
    at, _, name = paging.key(cursor).partition(" ")
    if not at:
        return None
    try:
        return float(at), name
    except ValueError:
        raise Problem(400, "cursor: not one of this list", pointer="query/cursor") from None


@router.get("/decisions")
def decisions(page: Page, cursor: Cursor = "") -> Response:
    with reading(page.deps.engine) as conn:
        rows = decided(conn, page.who.fleets, DECISIONS, paging.key(cursor))
    last = rows[-1]["id"] if len(rows) == DECISIONS else ""
    shown = {"rows": rows, "may_audit": page.who.may(Right.AUDIT)}
    return _list(page, "decisions", shown, {}, last)


@router.get("/audit")
def audit(page: Page, subject: Text = "", action: Text = "", cursor: Cursor = "") -> Response:
    must_everywhere(page.who, Right.AUDIT, "the audit tells of all of them")
    before = paging.number(cursor)
    with reading(page.deps.engine) as conn:
        rows = lookups.newest_audit(
            conn, before=before, limit=AUDIT,
            subject=subject.strip(), action=action.strip(),
        )  # fmt: skip
    last = str(rows[-1]["seq"]) if len(rows) == AUDIT else ""
    return _list(page, "audit", {"rows": rows}, {"subject": subject, "action": action}, last)


def _list(
    page: Scene, name: str, shown: Mapping[str, Any], wanted: Mapping[str, str], last: str
) -> Response:
    given = {key: text for key, text in wanted.items() if text}
    following = {**given, "cursor": paging.cursor(last)} if last else {}
    kind = page.request.query_params.get("format", "html")
    if kind != "html":
        return _sheet(name, shown["rows"], kind, following)
    with reading(page.deps.engine) as conn:
        stops = views.active_stops(conn)
    here = {**given, **({"cursor": c} if (c := page.request.query_params.get("cursor")) else {})}
    whole = {
        "stops": stops, "wanted": wanted, "filtered": bool(given),
        "next": f"/{name}?{urlencode(following)}" if last else "",
        "sheets": [(k, f"/{name}?" + urlencode({**here, "format": k})) for k in sheets.FORMATS],
        "title": name.capitalize(), **shown,
    }  # fmt: skip
    return rendering.page(page.request, f"{name}.html", page.who, whole)


def _sheet(
    name: str, rows: Sequence[Mapping[str, Any]], kind: str, following: Mapping[str, str]
) -> Response:
    """The rows of this page for a program; `Link` leads to the next ones."""
    if kind not in sheets.FORMATS:
        raise Problem(400, f"format: json or csv, not {kind[:20]!r}", pointer="query/format")
    headers = {
        "Cache-Control": "no-store",
        "Content-Disposition": f'attachment; filename="{name}.{kind}"',
    }
    if following:
        more = urlencode({**following, "format": kind})
        headers["Link"] = f'</{name}?{more}>; rel="next"'
    return Response(
        sheets.sheet(name, rows, kind), media_type=sheets.FORMATS[kind], headers=headers
    )
