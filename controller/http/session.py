"""Login and logout on the pages, and what every page asks: who is looking, is this form ours?

Rules:

1. A page without a person answers 303 to `/login?next=…`; the API answers 401.
2. A login form carries the value of its browser's login cookie; every other form carries the CSRF
   token of its person. A form without it is 403 and changes nothing.
3. `next` is a path of ours; anything else becomes `/`.
4. The session's cookie is HttpOnly, SameSite=Lax (a link in an alert must find the person logged
   in), with https Secure and `__Host-`; it ends with the session.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Annotated
from urllib.parse import quote

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import RedirectResponse
from starlette.concurrency import run_in_threadpool

from controller import sessions, tokens
from controller.http import access
from controller.http.dashboard import rendering
from controller.http.lanes import Lanes
from controller.http.ports import Given
from controller.http.problems import Problem
from controller.roles import Principal, Right

router = APIRouter(include_in_schema=False)
LOGIN_COOKIE = "bellwether-login"
_MOST_FIELDS = 64


class LoginNeeded(Exception):
    """A page was asked for by nobody we know: the answer is the login page."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path


async def visitor(request: Request) -> Principal:
    """A page's dependency: who is looking. Sends browsers of nobody to the login page."""
    if request.method == "GET":
        return await run_in_threadpool(_visitor, request)
    lanes: Lanes = request.app.state.lanes  # a form may be a stop: it has threads of its own
    return await lanes.stopping(_visitor, request)


def _visitor(request: Request) -> Principal:
    try:
        who = access.from_cookie(request) or access.authenticate(request)
    except Problem as problem:
        if problem.status == 401 and "authorization" not in request.headers:
            raise LoginNeeded(_here(request)) from None
        raise
    if not who.may(Right.VIEW):
        raise access.forbidden(who, Right.VIEW)
    return who


async def submitted(request: Request) -> Submitted:
    """A form's dependency: its person and its fields, when the form is one of ours."""
    fields = await _fields(request)
    lanes: Lanes = request.app.state.lanes
    who = await lanes.stopping(_author, request)
    access.check_csrf(who, fields.get("csrf", ""))
    return Submitted(who, fields)


class Submitted:
    """A form that one of our pages sent: its person, its fields without the CSRF token."""

    def __init__(self, who: Principal, fields: Mapping[str, str]) -> None:
        self.who = who
        self.fields = {name: text for name, text in fields.items() if name != "csrf"}


Visitor = Annotated[Principal, Depends(visitor)]
Form = Annotated[Submitted, Depends(submitted)]


def _author(request: Request) -> Principal:
    who = access.from_cookie(request)
    if who is not None:
        return who
    try:
        return access.local(request)
    except Problem as problem:
        if problem.status == 401:
            raise LoginNeeded("/") from None
        raise


@router.get("/login")
def login_page(
    request: Request, deps: Given, next_: Annotated[str, Query(alias="next", max_length=512)] = "/"
) -> Response:
    return _login_page(request, safe_next(next_), "")


def login_again(request: Request, path: str, problem: str) -> Response:
    """The login page, with what went wrong."""
    return _login_page(request, path, problem)


def _login_page(request: Request, path: str, problem: str) -> Response:
    csrf = request.cookies.get(LOGIN_COOKIE, "")
    if not 20 <= len(csrf) <= 64:
        csrf = secrets.token_urlsafe(24)
    shown = {
        "csrf": csrf,
        "next": path,
        "problem": problem,
        "title": "Log in",
        "provider": _provider(request),
    }
    page = rendering.page(request, "login.html", None, shown, 403 if problem else 200)
    page.set_cookie(
        LOGIN_COOKIE, csrf, max_age=3600, path="/login", httponly=True, samesite="strict",
        secure=secure(request),
    )  # fmt: skip
    return page


@router.post("/login")
async def login(request: Request, deps: Given) -> Response:
    """Log in with an API token of one's own."""
    fields = await _fields(request)
    path = safe_next(fields.get("next", "/"))
    expected = request.cookies.get(LOGIN_COOKIE, "")
    if not expected or not secrets.compare_digest(
        expected.encode(), fields.get("csrf", "").encode()
    ):
        return _login_page(request, path, "the form was too old: try again")
    now = deps.clock()
    row = await run_in_threadpool(tokens.check, deps.engine, fields.get("token", "").strip(), now)
    if row is None:
        return _login_page(request, path, "this token is unknown, expired or revoked")
    opened = await run_in_threadpool(
        lambda: sessions.open_session(
            deps.engine, tokens.principal(row), via="token", now=now, token=row.id
        )
    )
    answer = RedirectResponse(path, 303)
    set_session(request, answer, opened, now)
    return answer


@router.post("/logout")
def logout(request: Request, deps: Given, form: Form) -> Response:
    cookie = request.cookies.get(access.cookie_name(request))
    if cookie:
        sessions.end(deps.engine, cookie, deps.clock())
    answer = RedirectResponse("/login", 303)
    answer.delete_cookie(
        access.cookie_name(request), path="/", httponly=True, samesite="lax",
        secure=secure(request),
    )  # fmt: skip
    return answer


def set_session(request: Request, answer: Response, opened: sessions.Opened, now: float) -> None:
    answer.set_cookie(
        access.cookie_name(request), opened.cookie, max_age=int(opened.expires_at - now), path="/",
        httponly=True, samesite="lax", secure=secure(request),
    )  # fmt: skip
    answer.headers["Cache-Control"] = "no-store"


def to_login(_: Request, error: Exception) -> Response:
    assert isinstance(error, LoginNeeded)  # noqa: S101 - registered for this type alone
    return RedirectResponse(f"/login?next={quote(error.path, safe='')}", 303)


def safe_next(path: str) -> str:
    """A path on this server, whatever was asked: nobody's link leads a person away from it."""
    here = path.startswith("/") and not path.startswith(("//", "/\\")) and path.isprintable()
    return path if here and "\\" not in path and len(path) <= 512 else "/"


async def _fields(request: Request) -> dict[str, str]:
    """The fields of a form, each once; raises 400."""
    async with request.form(max_files=0, max_fields=_MOST_FIELDS) as form:
        fields = {name: text for name, text in form.items() if isinstance(text, str)}
        if len(form.multi_items()) > len(fields):
            raise Problem(400, "a field of the form is given twice")
    if any("\0" in text for text in fields.values()):
        raise Problem(400, "NUL is in no text")
    return fields


def _here(request: Request) -> str:
    query = f"?{request.url.query}" if request.url.query else ""
    return safe_next(request.url.path + query) if request.method == "GET" else "/"


def _provider(request: Request) -> bool:
    """Is there an identity provider to log in at?"""
    provider = request.app.state.identity.provider
    return provider is not None and bool(provider.for_pages)


def secure(request: Request) -> bool:
    return access.cookie_name(request).startswith("__Host-")
