"""Refusals as pages, for people; programs get their problem document as before."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from controller.http.dashboard import rendering
from controller.http.session import LoginNeeded

_LISTS = frozenset({"rollouts", "devices", "releases", "decisions"})


def install(app: FastAPI) -> None:
    """Wrap every handler of problems: a browser's page gets a page that says the same."""
    for kind, handler in list(app.exception_handlers.items()):
        if kind is not LoginNeeded:
            app.exception_handlers[kind] = _page_or(handler)


def _page_or(handler: Callable[..., Any]) -> Callable[[Request, Exception], Any]:
    async def answer(request: Request, error: Exception) -> Response:
        found = handler(request, error)
        response: Response = await found if isinstance(found, Awaitable) else found
        return _page(request, response) if _of_a_person(request, response) else response

    return answer


def _of_a_person(request: Request, response: Response) -> bool:
    path = request.url.path
    machine = path.startswith(("/api/", "/artifacts/", "/live/", "/webhooks/", "/metrics"))
    wants = "text/html" in request.headers.get("accept", "")
    return wants and not machine and isinstance(response, JSONResponse)


def _page(request: Request, response: Response) -> Response:
    problem = json.loads(bytes(response.body))
    above = request.url.path.strip("/").partition("/")[0]
    shown = {
        "problem": problem,
        "title": problem["title"],
        "up": above if above in _LISTS and response.status_code == 404 else "",
    }
    page = rendering.page(request, "refusal.html", None, shown, response.status_code)
    for name, text in response.headers.items():
        if name in ("retry-after", "www-authenticate"):
            page.headers[name] = text
    return page
