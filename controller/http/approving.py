"""The routes of a second person: what waits, what it is about, yes or no."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends
from sqlalchemy import Row

from controller import approvals, wake
from controller.http import answers, bodies, paging
from controller.http.access import Principal, Right, must, must_everywhere, needs
from controller.http.contract import says
from controller.http.ports import Deps, Given
from controller.http.problems import Problem
from controller.http.reads import Cursor, Filter, Limit, Viewer, page
from controller.store import approvals as rows
from controller.store import views
from telemetry.store.database import reading

router = APIRouter(prefix="/api/v1")
Starter = Annotated[Principal, Depends(needs(Right.START))]
Breaker = Annotated[Principal, Depends(needs(Right.VIEW))]
Plain = dict[str, Any]


@router.get("/approvals", **says(answers.Approvals))
def listed(
    deps: Given,
    who: Viewer,
    cursor: Cursor = None,
    limit: Limit = 100,
    state: Filter = "",
    fleet: Filter = "",
) -> Plain:
    """Newest first. `state`: waiting, granted, void."""
    with reading(deps.engine) as conn:
        found = rows.listed(
            conn,
            before=paging.key(cursor),
            limit=limit,
            fleets=who.fleets,
            state=state,
            fleet=fleet,
        )
        voted = rows.voters(conn, [row.id for row in found])
    items = [told(row, voted[row.id]) for row in found]
    return page(items, limit, items[-1]["id"] if items else "")


@router.get("/approvals/{approval}", **says(answers.ApprovalAnswer))
def one(approval: str, deps: Given, who: Viewer) -> Plain:
    """By id, or what waits for a rollout of this id or name. Its `digest` is what a vote names."""
    row = visible(deps, approval, who)
    with reading(deps.engine) as conn:
        return told(row, rows.voters(conn, [row.id])[row.id])


@router.post("/approvals/{approval}:approve", **says(answers.Voted))
def approve(approval: str, body: bodies.Vote, deps: Given, who: Breaker) -> Plain:
    """Yes to exactly what has this digest. Nobody approves their own; break-glass does not wait."""
    row = visible(deps, approval, who)
    must_vote(who, Right.BREAK_GLASS if body.break_glass else Right.START, row)
    return cast(deps, row, body, who, reject=False)


@router.post("/approvals/{approval}:reject", **says(answers.Voted))
def reject(approval: str, body: bodies.Vote, deps: Given, who: Starter) -> Plain:
    """No: it is void, and must be asked for again. One person's word, the proposer's too."""
    row = visible(deps, approval, who)
    must_vote(who, Right.START, row)
    return cast(deps, row, body, who, reject=True)


def cast(deps: Deps, row: Row[Any], body: bodies.Vote, who: Principal, *, reject: bool) -> Plain:
    """The vote, for the API as for the page; raises Refused."""
    voted = approvals.vote(
        deps.engine,
        row.id,
        actor=who.name,
        digest=body.digest,
        reason=body.reason,
        now=deps.clock(),
        break_glass=body.break_glass and not reject,
        reject=reject,
    )
    if deps.poke is not None:
        deps.poke()
    else:
        wake.poke(deps.settings.state_dir)
    return {"id": voted.id, "state": voted.state, "sentence": voted.sentence}


def visible(deps: Deps, approval: str, who: Principal) -> Row[Any]:
    """The approval of this id, or what waits for this rollout; 404 for whom it does not concern."""
    with reading(deps.engine) as conn:
        row = rows.find(conn, approval)
    if row is None or not (who.sees(row.fleet) if row.fleet else not who.fleets):
        raise Problem(404, f"approval {approval[:80]!r}: unknown, or nothing of it waits")
    return row


def must_vote(who: Principal, right: Right, row: Row[Any]) -> None:
    """Raises 403 unless this person has the right where the approval belongs."""
    if row.fleet:
        must(who, right, row.fleet)
    else:
        must_everywhere(who, right, "this concerns all of them")


def told(row: Row[Any], voted: list[str]) -> Plain:
    """An approval as the API tells it."""
    return {
        "id": row.id,
        "kind": row.kind,
        "fleet": row.fleet,
        "rollout": row.rollout,
        "digest": row.digest,
        "seen": row.seen,
        "proposer": row.proposer,
        "reason": row.reason,
        "needs": row.needs,
        "approvedBy": voted,
        "state": row.state,
        "at": views.when(row.at),
        "expiresAt": views.when(row.expires_at),
        "decidedAt": views.when(row.decided_at),
        "result": row.result,
    }
