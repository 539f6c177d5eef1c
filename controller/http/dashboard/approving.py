"""The page of a second person: what waits, what it is about, yes or no.

The vote is `controller.approvals`', as for the API; the form carries the digest of what the page
showed, so that a yes is to that and to nothing else.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Response
from fastapi.responses import RedirectResponse
from sqlalchemy import Connection, Row

from controller import approvals, commands
from controller.http.access import must, must_everywhere
from controller.http.bodies import Vote
from controller.http.dashboard import rendering
from controller.http.dashboard.acts import checked, poke, text_of
from controller.http.dashboard.routes import Page, Scene
from controller.http.problems import Problem
from controller.http.session import Submitted, submitted
from controller.roles import Principal, Right
from controller.store import approvals as rows
from controller.store import lookups, views
from telemetry.store.database import reading

router = APIRouter(include_in_schema=False)
Form = Annotated[Submitted, Depends(submitted)]
_SHOWN = ("kind", "name", "fleet", "release", "step", "state", "revision", "commit", "from", "to")


@router.get("/approvals/{approval}")
def one(page: Page, approval: str) -> Response:
    return _page(page, approval)


@router.post("/approvals/{approval}/{word}")
def vote(page: Page, approval: str, word: str, form: Form) -> Response:
    page.who = form.who
    if word not in ("approve", "reject"):
        raise Problem(404, f"{word[:40]!r} is nothing that can be done with an approval")
    row = _visible(page, approval)
    may_vote(page.who, row)
    try:
        body = checked(Vote, {"digest": form.fields.get("digest", ""),
                              "reason": text_of(form.fields, "reason")})  # fmt: skip
        approvals.vote(
            page.deps.engine, row.id, actor=page.who.name, digest=body.digest, reason=body.reason,
            now=page.deps.clock(), reject=word == "reject",
        )  # fmt: skip
    except commands.Refused as refused:
        return _page(page, approval, refused.code, refused.message)
    poke(page)
    back = f"/rollouts/{rendering.segment(row.rollout)}" if row.rollout else "/"
    return RedirectResponse(back, 303)


def _page(page: Scene, name: str, code: int = 200, why: str = "") -> Response:
    row = _visible(page, name)
    with reading(page.deps.engine) as conn:
        shown = {
            "one": _plain(conn, row),
            "rollout": lookups.names_of(conn, [row.rollout]).get(row.rollout),
            "seen": [(key, row.seen[key]) for key in _SHOWN if key in row.seen],
            "may": page.who.may(Right.START, row.fleet or None),
            "own": row.proposer == page.who.name,
            "why": why,
            "stops": views.active_stops(conn),
            "title": f"Approval: {row.kind}",
        }
    return rendering.page(page.request, "approval.html", page.who, shown, status=code)


def _plain(conn: Connection, row: Row[Any]) -> dict[str, Any]:
    return {
        "id": row.id,
        "kind": row.kind,
        "fleet": row.fleet,
        "rollout": row.rollout,
        "digest": row.digest,
        "proposer": row.proposer,
        "reason": row.reason,
        "needs": row.needs,
        "state": row.state,
        "at": views.when(row.at),
        "expiresAt": views.when(row.expires_at),
        "result": row.result,
        "voters": rows.voters(conn, [row.id])[row.id],
    }


def _visible(page: Scene, name: str) -> Row[Any]:
    with reading(page.deps.engine) as conn:
        row = rows.find(conn, name)
    if row is None or not (page.who.sees(row.fleet) if row.fleet else not page.who.fleets):
        raise Problem(404, f"approval {name[:80]!r}: unknown, or nothing of it waits")
    return row


def may_vote(who: Principal, row: Row[Any]) -> None:
    """Raises 403 unless the person may start things in the fleet that it concerns."""
    if row.fleet:
        must(who, Right.START, row.fleet)
    else:
        must_everywhere(who, Right.START, "this concerns all of them")
