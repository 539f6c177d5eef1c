"""The status page: rendered on the server, no script, one look: what moves, why, and what is wrong.

Every name comes from people or devices and is escaped by the template engine; the policy of
`guard` allows no script at all.
"""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Response
from fastapi.responses import FileResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from controller.http.ports import Book, Given
from controller.http.session import Visitor
from controller.store import views
from telemetry.store.database import reading

router = APIRouter(include_in_schema=False)
_HERE = Path(__file__).parent / "templates"
_TEMPLATES = Environment(
    loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True
)


@router.get("/")
def status(deps: Given, book: Book, who: Visitor) -> Response:
    with reading(deps.engine) as conn:
        fleets = views.fleets(conn, who.fleets)
        rows = views.list_rollouts(conn, before="", limit=20, fleets=who.fleets)
        counts = views.count_members(conn, [row.id for row in rows])
        shown = [views.rollout(row, counts[row.id], ()) for row in rows]
        names = {row.id: row.name for row in rows}
        decisions = [
            {**views.decision(row, whole=False), "name": names[row.rollout]}
            for row in views.last_decisions(conn, 30)
            if row.rollout in names
        ]
        git, stops = views.git(conn), views.active_stops(conn)
    online = sum(row.online for row in book.seen().values())
    html = _TEMPLATES.get_template("status.html").render(
        fleets=fleets,
        rollouts=shown,
        decisions=decisions,
        git=git,
        stops=stops,
        online=online,
        at=views.when(deps.clock()),
    )
    return Response(html, media_type="text/html", headers={"Cache-Control": "no-store"})


@router.get("/status.css")
def style() -> Response:
    return FileResponse(_HERE / "status.css", media_type="text/css")
