"""ASGI middleware before everything else: sizes, content types, bytes that no name has, headers.

Rules: a body beyond its route's limit is 413 even when it says no length; the API takes
`application/json` only (a form of another site cannot send that without asking), pages take forms;
NUL in a path or query is 400; every answer carries the security headers.
"""

from __future__ import annotations

import math
import time
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from controller.http import methods
from controller.http.problems import answer
from telemetry import metrics

MOST_BODY = 1024 * 1024
_MOST = {
    "/api/v1/devices": 8 * 1024 * 1024,
    "/api/v1/plan": 64 * 1024 * 1024,
    "/api/v1/releases:publish": 4 * 1024**3,
    "/webhooks/git": 25 * 1024 * 1024,
}
_ANY_TYPE = ("/api/v1/releases:publish", "/webhooks/git")
_JSON, _FORM = "application/json", "application/x-www-form-urlencoded"
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; img-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class TooLarge(HTTPException):
    """The body went over its limit while it was read."""

    def __init__(self, limit: int) -> None:
        super().__init__(413, f"the body is larger than {limit} bytes")


class Guard:
    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        status = 500

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, text in _HEADERS.items():
                    headers.setdefault(name, text)
            await send(message)

        try:
            await self._guarded(scope, receive, send_with_headers)
        finally:
            _count(scope, status, time.perf_counter() - began)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        limit = _MOST.get(scope["path"], MOST_BODY)
        if refusal := _refuse(scope, limit):
            await answer(*refusal)(scope, receive, send)
            return
        state = scope["app"].state
        wait = state.lanes.wait(scope, state.deps.settings.auth == "loopback")
        if wait > 0:
            after = {"Retry-After": str(math.ceil(wait))}
            await answer(429, "too many requests", headers=after)(scope, receive, send)
            return
        taken = 0

        async def receive_some() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > limit:
                raise TooLarge(limit)
            return message

        await self._app(scope, receive_some, send)


def _refuse(scope: Scope, limit: int) -> tuple[int, str] | None:
    if "\0" in scope["path"] or b"%00" in scope.get("query_string", b""):
        return 400, "NUL is in no name"
    headers = Headers(scope=scope)
    length = headers.get("content-length")
    if length is not None and not (length.isascii() and length.isdigit()):
        return 400, "Content-Length is no number"
    if length is not None and (len(length) > 15 or int(length) > limit):
        return 413, f"the body is larger than {limit} bytes"
    path: str = scope["path"]
    if scope["method"] == "POST" and path not in _ANY_TYPE:
        # Only pages take forms, and they check the form's CSRF token.
        wanted = _JSON if path.startswith("/api/") else _FORM
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        # Where nothing takes a POST, that is the fault to tell: the router does.
        if kind != wanted and "POST" in methods.allowed(scope):
            return 415, f"send Content-Type: {wanted}"
    return None


def _count(scope: Scope, status: int, seconds: float) -> None:
    route: Any = scope.get("route")
    path = getattr(route, "path", "other")
    metrics.count(
        "bellwether_http_requests_total", route=path, method=scope["method"], status=str(status)
    )
    metrics.observe("bellwether_http_request_seconds", seconds, route=path)
