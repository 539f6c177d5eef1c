"""The pages: each route names what it looks at; the reading is `sights`', the words the views'."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import StreamingResponse

from controller.http.dashboard import rendering
from controller.http.dashboard.census import Census
from controller.http.dashboard.live import Live
from controller.http.dashboard.sights import SIGHTS, look
from controller.http.devicebook import DeviceBook
from controller.http.ports import Deps, Given
from controller.http.problems import Problem
from controller.http.session import Visitor
from controller.roles import Principal, to_json

router = APIRouter(include_in_schema=False)


class Scene:
    """One person's request for a page."""

    def __init__(self, request: Request, deps: Deps, who: Principal) -> None:
        self.request: Request = request
        self.deps: Deps = deps
        self.who: Principal = who
        self.book: DeviceBook = request.app.state.book
        self.census: Census = request.app.state.census

    def see(self, name: str, what: str = "") -> Response:
        """A page that can be followed."""
        sight = SIGHTS[name]
        shown = look(sight, self.deps, self.book, self.census, self.who, what)
        live = f"/live/{name}" + (f"/{rendering.segment(what)}" if what else "")
        return rendering.page(self.request, sight.template, self.who, shown, live=live)

    def part(self, name: str, what: str) -> str:
        """The part of a page that a stream sends."""
        sight = SIGHTS[name]
        shown = look(sight, self.deps, self.book, self.census, self.who, what)
        return rendering.live_part(sight.template, shown)


async def scene(request: Request, deps: Given, who: Visitor) -> Scene:
    # `async`: a stop's button must not wait for a free thread.
    return Scene(request, deps, who)


Page = Annotated[Scene, Depends(scene)]


@router.get("/")
def overview(page: Page) -> Response:
    return page.see("overview")


@router.get("/oncall")
def oncall(page: Page) -> Response:
    return page.see("oncall")


@router.get("/rollouts/{rollout}")
def rollout(page: Page, rollout: str) -> Response:
    return page.see("rollout", rollout)


@router.get("/devices/{device}")
def device(page: Page, device: str) -> Response:
    return page.see("device", device)


@router.get("/live/{name}")
@router.get("/live/{name}/{what}")
async def live(page: Page, name: str, what: str = "") -> StreamingResponse:
    if name not in SIGHTS:
        raise Problem(404, "this page has no stream")
    hub: Live = page.request.app.state.live
    key = (name, what, str(to_json(page.who.grants)))
    # The first rendering refuses what this person does not see; who has the same grants shares it.
    stream = await hub.join(key, lambda: page.part(name, what))
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(stream, media_type="text/event-stream", headers=headers)


@router.get("/static/{digest}/{name:path}")
def static(digest: str, name: str) -> Response:
    return rendering.static_file(digest, name)
