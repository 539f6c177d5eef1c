"""The page of a second person: what waits, what it is about, yes or no.

The vote is the API's (`controller.http.approving`); the form carries the digest of what the page
showed, so that a yes is to that and to nothing else.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Response
from fastapi.responses import RedirectResponse

from controller import commands
from controller.http.approving import cast, must_vote, told, visible
from controller.http.bodies import Vote
from controller.http.dashboard import rendering
from controller.http.dashboard.acts import checked, text_of
from controller.http.dashboard.routes import Page, Scene
from controller.http.dashboard.terms import terms
from controller.http.problems import Problem
from controller.http.session import Submitted, submitted
from controller.roles import Right
from controller.store import approvals as rows
from controller.store import lookups, views
from telemetry.store.database import reading

router = APIRouter(include_in_schema=False)
Form = Annotated[Submitted, Depends(submitted)]
WORDS = {"approve": Right.START, "reject": Right.START, "break-glass": Right.BREAK_GLASS}


@router.get("/approvals/{approval}")
def one(page: Page, approval: str) -> Response:
    return _page(page, approval)


@router.post("/approvals/{approval}/{word}")
def vote(page: Page, approval: str, word: str, form: Form) -> Response:
    page.who = form.who
    if word not in WORDS:
        raise Problem(404, f"{word[:40]!r} is nothing that can be done with an approval")
    row = visible(page.deps, approval, page.who)
    must_vote(page.who, WORDS[word], row)
    try:
        body = checked(Vote, {
            "digest": form.fields.get("digest", ""),
            "reason": text_of(form.fields, "reason"),
            "breakGlass": word == "break-glass",
        })  # fmt: skip
        cast(page.deps, row, body, page.who, reject=word == "reject")
    except commands.Refused as refused:
        return _page(page, approval, refused.code, refused.message)
    back = f"/rollouts/{rendering.segment(row.rollout)}" if row.rollout else "/"
    return RedirectResponse(back, 303)


def _page(page: Scene, name: str, code: int = 200, why: str = "") -> Response:
    row = visible(page.deps, name, page.who)
    with reading(page.deps.engine) as conn:
        shown = {
            "one": told(row, rows.voters(conn, [row.id])[row.id]),
            "rollout": lookups.names_of(conn, [row.rollout]).get(row.rollout),
            "terms": terms(row.kind, row.seen),
            "may": page.who.may(Right.START, row.fleet or None),
            "may_break": page.who.may(Right.BREAK_GLASS, row.fleet or None),
            "own": row.proposer == page.who.name,
            "why": why,
            "stops": views.active_stops(conn),
            "title": f"Approval: {row.kind}",
        }
    return rendering.page(page.request, "approval.html", page.who, shown, status=code)
