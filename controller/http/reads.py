"""The routes that only look: fleets, devices, releases, rollouts, decisions, audit."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from heapq import nsmallest
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import JSONResponse
from sqlalchemy import Connection, Row

from controller import dossier
from controller import preview as previews
from controller.http import answers, paging, suspecting
from controller.http.access import Principal, Right, must_everywhere, needs
from controller.http.contract import Told, raw, says
from controller.http.dashboard.measured import OF_PROGRAMS, Measured
from controller.http.ports import Book, Given
from controller.http.problems import Problem
from controller.outcomes import board
from controller.store import views
from controller.store.devices import get_many
from telemetry.report import DeviceRow
from telemetry.store.database import reading

router = APIRouter(prefix="/api/v1", route_class=Told)
Viewer = Annotated[Principal, Depends(needs(Right.VIEW))]
Auditor = Annotated[Principal, Depends(needs(Right.AUDIT))]
Limit = Annotated[int, Query(ge=1, le=1000, description="Items of one page")]
Cursor = Annotated[str | None, Query(max_length=512, description="`next` of the page before")]
PRINTABLE = r"^[^\x00-\x1f\x7f]*$"
Filter = Annotated[str, Query(max_length=128, pattern=PRINTABLE)]
Label = Annotated[
    list[str],
    Query(max_length=16, description="KEY=VALUE; several must all match", examples=["region=eu"]),
]
Plain = dict[str, Any]
_SCAN = 10_000  # names of devices that one look for matching ones reads at once


def page(items: Sequence[Any], limit: int, last: str) -> Plain:
    more = paging.cursor(last) if len(items) == limit and items else None
    return {"items": list(items), "next": more}


@router.get("/fleets", **says(answers.Fleets))
def fleets(deps: Given, who: Viewer, cursor: Cursor = None, limit: Limit = 1000) -> Plain:
    """Every fleet that has devices or a rollout; the state of Git; the stops in force."""
    after = paging.key(cursor)
    with reading(deps.engine) as conn:
        found = [f for f in views.fleets(conn, who.fleets) if f["name"] > after][:limit]
        return {
            **page(found, limit, found[-1]["name"] if found else ""),
            "git": views.git(conn),
            "stops": views.active_stops(conn),
        }


@router.get("/fleets/{fleet}", **says(answers.FleetWhole))
def fleet(fleet: str, deps: Given, who: Viewer) -> Plain:
    with reading(deps.engine) as conn:
        found = [f for f in views.fleets(conn, who.fleets) if f["name"] == fleet]
        if not found:
            raise Problem(404, f"fleet {fleet[:80]!r}: it has no device and no rollout")
        return {**found[0], "git": views.git(conn), "stops": views.active_stops(conn)}


@router.get("/devices", **says(answers.Devices))
def devices(
    deps: Given,
    book: Book,
    who: Viewer,
    cursor: Cursor = None,
    limit: Limit = 100,
    fleet: Filter = "",
    status: Filter = "",
    label: Label = [],  # noqa: B006 - FastAPI copies it
    state: Filter = "",
    online: bool | None = None,
    running: Annotated[str, Query(max_length=128, description="A release or a digest")] = "",
) -> Plain:
    """By id. `state`, `online` and `running` are the device's own last word."""
    labels = _labels(label)
    wanted = _Word(state=state, online=online, running=running)
    seen = book.seen() if wanted.asks else {}
    place: dict[str, Any] = {
        "fleets": who.fleets,
        "fleet": fleet,
        "status": status,
        "labels": labels,
    }
    with reading(deps.engine) as conn:
        after = paging.key(cursor)
        if wanted.asks:
            rows = _matching(conn, wanted, seen, after, limit, place)
        else:
            rows = views.list_devices(conn, after=after, limit=limit, **place)
        return page(book.describe(conn, rows), limit, rows[-1].id if rows else "")


def _matching(
    conn: Connection, wanted: _Word, seen: Mapping[str, DeviceRow], after: str, limit: int,
    place: Mapping[str, Any],
) -> Sequence[Row[Any]]:  # fmt: skip
    """The next devices by id whose last word fits: their names first, their rows afterwards."""
    names: list[str] = []
    more = True
    while more and len(names) < limit:
        ids = views.list_device_ids(conn, after=after, limit=_SCAN, **place)
        more, after = len(ids) == _SCAN, ids[-1] if ids else after
        names += [name for name in ids if wanted.fits(seen.get(name))]
    found = get_many(conn, names[:limit])
    return [found[name] for name in names[:limit] if name in found]


@router.get("/devices:changes", **says(answers.Changes))
def device_changes(
    deps: Given,
    book: Book,
    who: Viewer,
    cursor: Cursor = None,
    limit: Limit = 100,
    since: Annotated[
        str,
        Query(max_length=40, description="RFC 3339, or an age", examples=["24h"]),
    ] = "",
    where: Annotated[
        list[str],
        Query(
            max_length=16,
            description="What the affected devices have in common: KEY OP VALUE with = != ~ > >= < "
            "<=; several must all hold. KEY: id, fleet, status, state, reason, blockedBy, online, "
            "score, running, running.COMPONENT, label.NAME, or a metric (its count since `since`; "
            "METRIC/UNIT is its rate)",
            examples=["state=ROLLED_BACK", "hard_braking/device_hour>0.5"],
        ),
    ] = [],  # noqa: B006
    fleet: Filter = "",
) -> Plain:
    """What changed: a feed without `where`; with a symptom, the suspects.

    With `where`: which releases, components, hardware, labels are over-represented among the
    devices that match, against all others; ranked by Fisher's exact test, with counts and odds.
    Without: devices whose registry row or last word changed since the cursor, which never ends.
    """
    if where:
        return suspecting.rank(deps, book, who, since=since, where=where, fleet=fleet, limit=limit)
    registry, batch, name = _marks(paging.key(cursor))
    with reading(deps.engine) as conn:
        rows = list(views.changed_devices(conn, since=registry, limit=limit))
        registry = max([registry, *(row.change for row in rows)])
        told = _told_since(book.seen().values(), (batch, name), limit)
        if told:
            batch, name = told[-1].change, told[-1].device
        present = {row.id for row in rows}
        rows += _rows(conn, [row.device for row in told if row.device not in present])
        visible = [row for row in rows if who.sees(row.fleet) and fleet in ("", row.fleet)]
        following = paging.cursor(f"{registry}.{batch}.{name}")
        return {"items": book.describe(conn, visible), "next": following}


def _told_since(heard: Iterable[DeviceRow], since: tuple[int, str], limit: int) -> list[DeviceRow]:
    """The oldest `limit` words after `since`: (change number, device)."""
    later = (row for row in heard if (row.change, row.device) > since)
    return nsmallest(limit, later, key=lambda row: (row.change, row.device))


@router.get("/devices/{device}", **says(answers.DeviceAnswer))
def device(device: str, deps: Given, book: Book, who: Viewer) -> Plain:
    with reading(deps.engine) as conn:
        rows = [row for row in _rows(conn, [device]) if who.sees(row.fleet)]
        if not rows:
            raise Problem(404, f"device {device[:80]!r}: unknown")
        told = book.describe(conn, rows)[0]
        explained = book.explain(conn, rows[0].fleet, device)
        if explained is not None:
            factors = [asdict(part) for part in explained.parts]
            told["score"] = {**told["score"], "sentence": explained.sentence, "factors": factors}
        return told


@router.get("/releases", **says(answers.Releases))
def releases(
    deps: Given,
    who: Viewer,
    cursor: Cursor = None,
    limit: Limit = 100,
    name: Filter = "",
    digest: Filter = "",
) -> Plain:
    """Every release that an accepted commit has shown, by name."""
    with reading(deps.engine) as conn:
        found = views.list_releases(
            conn, after=paging.key(cursor), limit=limit, name=name, digest=digest
        )
    return page(found, limit, found[-1]["name"] if found else "")


@router.get("/rollouts", **says(answers.Rollouts))
def rollouts(
    deps: Given,
    who: Viewer,
    cursor: Cursor = None,
    limit: Limit = 100,
    state: Filter = "",
    fleet: Filter = "",
    name: Filter = "",
    release: Filter = "",
) -> Plain:
    """Newest first."""
    with reading(deps.engine) as conn:
        rows = views.list_rollouts(
            conn,
            before=paging.key(cursor),
            limit=limit,
            fleets=who.fleets,
            state=state,
            fleet=fleet,
            name=name,
            release=release,
        )
        return page(_described(conn, rows), limit, rows[-1].id if rows else "")


@router.get("/rollouts/{rollout}", **says(answers.RolloutAnswer))
def rollout(rollout: str, deps: Given, who: Viewer) -> Response:
    """By id, or the newest of a name; its ETag is what the verbs' If-Match wants."""
    with reading(deps.engine) as conn:
        row = find(conn, rollout, who)
        etag = f'"{row.revision}"'
        headers = {"ETag": etag, "Cache-Control": "no-cache"}
        body = _described(conn, [row])[0]
    return JSONResponse(body, headers=headers)


@router.get("/rollouts/{rollout}/decisions", **says(answers.Decisions))
def decisions(
    rollout: str,
    deps: Given,
    who: Viewer,
    cursor: Cursor = None,
    limit: Limit = 100,
    kind: Filter = "",
    verdict: Filter = "",
) -> Plain:
    """Newest first."""
    with reading(deps.engine) as conn:
        row = find(conn, rollout, who)
        found = views.list_decisions(
            conn, row.id, before=paging.key(cursor), limit=limit, kind=kind, verdict=verdict
        )
        items = [views.decision(entry, whole=False) for entry in found]
    return page(items, limit, items[-1]["id"] if items else "")


@router.get("/rollouts/{rollout}/evidence", **says(answers.Evidence))
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


@router.get("/rollouts/{rollout}/evidence:file", **raw("application/json"))
def evidence_file(rollout: str, deps: Given, who: Auditor) -> Response:
    """All evidence of one rollout, signed by the director: `evidence verify` checks the file."""
    must_everywhere(who, Right.AUDIT, "the audit tells of all of them")
    with reading(deps.engine) as conn:
        row = find(conn, rollout, who)
        data = dossier.make(conn, row.id, deps.key, deps.clock())
    return Response(data, media_type="application/json", headers={"Cache-Control": "no-store"})


@router.get("/rollouts/{rollout}/recovery", **says(answers.Recovery))
def recovery(
    rollout: str, deps: Given, book: Book, who: Viewer, cursor: Cursor = None, limit: Limit = 200
) -> Plain:
    """Who a rollback has not reached: offline, waiting for its own safety, or with no way back."""
    with reading(deps.engine) as conn:
        row = find(conn, rollout, who)
    about, left = previews.recovery(
        deps.engine,
        book.seen,
        rollout=row.id,
        after=paging.key(cursor),
        limit=limit,
        now=deps.clock(),
    )
    seen = book.seen()
    items: list[Plain] = [
        {
            "device": one.device,
            "word": one.word,
            "why": one.why,
            "lastContact": views.when(seen[one.device].last_contact)
            if one.device in seen
            else None,
        }
        for one in left
    ]
    return {**about, **page(items, limit, items[-1]["device"] if items else "")}


@router.get("/decisions/{decision}", **says(answers.DecisionWhole))
def decision(decision: str, deps: Given, who: Viewer) -> Plain:
    with reading(deps.engine) as conn:
        row = views.find_decision(conn, decision)
        owner = None if row is None else views.find_rollout(conn, row.rollout)
        if row is None or owner is None or not who.sees(owner.fleet):
            raise Problem(404, f"decision {decision[:80]!r}: unknown")
        return views.decision(row, whole=True)


@router.get("/audit", **says(answers.Audit))
def audit(
    deps: Given,
    who: Auditor,
    cursor: Cursor = None,
    limit: Limit = 100,
    actor: Filter = "",
    action: Filter = "",
    subject: Filter = "",
) -> Plain:
    """Oldest first; of all fleets, so not for a token of some."""
    must_everywhere(who, Right.AUDIT, "the audit tells of all of them")
    after = paging.number(cursor) or 0
    with reading(deps.engine) as conn:
        found = views.list_audit(
            conn, after=after, limit=limit, actor=actor, action=action, subject=subject
        )
    return page(found, limit, str(found[-1]["seq"]) if found else "")


@router.get("/outcomes", **says(answers.Outcomes))
def outcomes(
    deps: Given, who: Viewer, request: Request, days: Annotated[float, Query(gt=0, le=3650)] = 90
) -> Plain:
    """What each release changed, by the draw, and how each team ships, over a period.

    Measured when it is asked for, at most a twentieth of the time: `at` says when.
    """

    def measure() -> Plain:
        with reading(deps.engine) as conn:
            return board(conn, deps.reader, now=deps.clock(), days=days, fleets=who.fleets)

    measured: Measured = request.app.state.measured
    result = measured.get(("outcomes", days, who.fleets), measure, OF_PROGRAMS)
    if result is None or result.value is None:
        raise Problem(503, "the outcomes could not be measured yet: ask again")
    return {**result.value, "at": views.when(result.at), "next": None}


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


def _marks(key: str) -> tuple[int, int, str]:
    """(change of the registry, change of telemetry, device) where the page before ended."""
    found = re.fullmatch(r"([0-9]{1,15})\.([0-9]{1,15})(?:\.([a-z0-9._-]{0,63}))?", key or "0.0")
    if found is None:
        raise Problem(400, "cursor: not one of this list", pointer="query/cursor")
    # A cursor of an earlier version has no device: it ended with the whole batch.
    return int(found[1]), int(found[2]), "~" if found[3] is None and key else found[3] or ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Word:
    """A filter on the last word of a device."""

    state: str
    online: bool | None
    running: str

    @property
    def asks(self) -> bool:
        return bool(self.state or self.running) or self.online is not None

    def fits(self, row: DeviceRow | None) -> bool:
        if row is None:
            return not (self.state or self.running or self.online)
        if self.state and row.state != self.state:
            return False
        if self.online is not None and row.online != self.online:
            return False
        parts = row.components.values() if self.running else ()
        return not self.running or any(self.running in (p.release, p.digest) for p in parts)


def _labels(pairs: Sequence[str]) -> dict[str, str]:
    found = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign or not re.fullmatch(r"[A-Za-z0-9._/-]{1,63}", name) or len(value) > 128:
            raise Problem(422, f"label: {pair[:80]!r}: write KEY=VALUE", pointer="query/label")
        found[name] = value
    return found
