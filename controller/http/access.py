"""Decides who is asking and what they may do. Deny by default.

Rules, in order:

1. A token that is presented is always checked: a wrong one is 401, on every listener.
2. A session's cookie stands for its person. What changes something needs the session's CSRF token
   as well: `X-CSRF-Token` here, the field `csrf` in the forms of pages (`controller.http.session`).
3. Without either: on a loopback listener with `auth: loopback` it is the local admin — unless the
   Host header is not ours (DNS rebinding) or a browser says that another site sent it.
4. HTTP Basic is for devices: their id and broker password; they reach their own things alone.
5. A stop (hold, pause, rollback, stop) is one person's; lift, resume and promote need more.
6. A grant for some fleets sees nothing of the others: they are 404, not 403.
"""

from __future__ import annotations

import binascii
import secrets
from base64 import b64decode
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

from fastapi import Request

from controller import sessions, tokens
from controller.http.lanes import Lanes
from controller.http.problems import Problem
from controller.roles import RIGHTS, Grant, Principal, Right, Role
from controller.settings import is_loopback

__all__ = ["RIGHTS", "Principal", "Right", "authenticate", "device_or_viewer", "needs"]

SAFE = frozenset({"GET", "HEAD", "OPTIONS"})


def needs(right: Right) -> Callable[[Request], Principal]:
    """A dependency: the principal, when it has this right on any fleet."""

    def check(request: Request) -> Principal:
        principal = authenticate(request)
        if not principal.may(right):
            raise forbidden(principal, right)
        return principal

    check.__name__ = f"needs_{right}"
    check.right = right  # type: ignore[attr-defined]  # the OpenAPI document tells it
    return check


def needs_at_once(right: Right) -> Callable[[Request], Awaitable[Principal]]:
    """The same for stops: checked in their own threads (`controller.http.lanes`)."""
    check = needs(right)

    async def checked(request: Request) -> Principal:
        lanes: Lanes = request.app.state.lanes
        return await lanes.stopping(check, request)

    checked.__name__ = f"needs_{right}_at_once"
    checked.right = right  # type: ignore[attr-defined]
    return checked


def forbidden(who: Principal, right: Right, fleet: str = "") -> Problem:
    place = f" in fleet {fleet[:63]}" if fleet else ""
    return Problem(403, f"{who.name} ({who.roles}) may not do this{place}: it needs {right}")


def must(who: Principal, right: Right, fleet: str) -> None:
    """Raise 403 unless the right is granted on this very fleet."""
    if not who.may(right, fleet):
        raise forbidden(who, right, fleet)


def must_everywhere(who: Principal, right: Right, what: str) -> None:
    if not who.may_everywhere(right):
        raise Problem(403, f"{who.name} is for some fleets only: {what}")


def authenticate(request: Request) -> Principal:
    """Who is asking; raises 401 and 403."""
    principal = _presented(request) or from_cookie(request)
    if principal is None:
        return local(request)
    if principal.via == "session" and request.method not in SAFE:
        check_csrf(principal, request.headers.get("x-csrf-token", ""))
    return principal


def _presented(request: Request) -> Principal | None:
    deps = request.app.state.deps
    scheme, credential = _authorization(request)
    if scheme == "bearer":
        person: Principal | None = request.app.state.identity.bearer(credential)
        if person is not None:
            return person
        row = tokens.check(deps.engine, credential, deps.clock())
        if row is None:
            raise unauthorized("the token is unknown, expired or revoked")
        return tokens.principal(row)
    if scheme:
        raise unauthorized("send Authorization: Bearer TOKEN")
    return None


def from_cookie(request: Request) -> Principal | None:
    """The person of the session's cookie, when there is one in force."""
    deps = request.app.state.deps
    cookie = request.cookies.get(cookie_name(request))
    return None if cookie is None else sessions.find(deps.engine, cookie, deps.clock())


def local(request: Request) -> Principal:
    """The local admin of a loopback listener; 401 for anybody else without credentials."""
    deps = request.app.state.deps
    if deps.settings.auth != "loopback" or not _from_here(request):
        raise unauthorized("a token is needed: Authorization: Bearer TOKEN")
    _not_from_another_site(request)
    csrf: str = request.app.state.local_csrf
    return Principal(name="local", grants=(Grant(role=Role.ADMIN),), via="local", csrf=csrf)


def check_csrf(who: Principal, given: str) -> None:
    if not who.csrf or not secrets.compare_digest(who.csrf.encode(), given.encode()):
        raise Problem(403, "the page is too old, or another site sent this: load the page again")


def cookie_name(request: Request) -> str:
    """`__Host-`: the browser keeps it from other hosts, paths and plain http."""
    secure = request.app.state.deps.settings.public_url.startswith("https://")
    return "__Host-bellwether" if secure else "bellwether"


def device_or_viewer(request: Request) -> str | None:
    """The device's id for a device's own credentials, None for a person who may look."""
    scheme, credential = _authorization(request)
    if scheme != "basic":
        needs(Right.VIEW)(request)
        return None
    try:
        device, _, password = b64decode(credential, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError, ValueError):
        raise unauthorized("the credentials are not base64 of ID:PASSWORD", "Basic") from None
    if not request.app.state.deps.registry.password_matches(device, password):
        raise unauthorized("unknown device, or wrong password", "Basic")
    return device


device_or_viewer.right = Right.VIEW  # type: ignore[attr-defined]


def _authorization(request: Request) -> tuple[str, str]:
    scheme, _, credential = request.headers.get("authorization", "").partition(" ")
    return scheme.lower(), credential.strip()


def unauthorized(detail: str, scheme: str = "Bearer") -> Problem:
    challenge = f'{scheme} realm="bellwether"'
    return Problem(401, detail, headers={"WWW-Authenticate": challenge})


def _from_here(request: Request) -> bool:
    return request.client is not None and is_loopback(request.client.host)


def _not_from_another_site(request: Request) -> None:
    settings: Any = request.app.state.deps.settings
    host = request.headers.get("host", "")
    try:
        name = (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        name = ""
    own = (urlsplit(settings.public_url).hostname or "").lower()
    if not is_loopback(name) and name != own:
        raise Problem(403, f"Host {host[:80]!r} is not this server")
    site = request.headers.get("sec-fetch-site", "none")
    navigating = request.method == "GET" and request.headers.get("sec-fetch-mode") == "navigate"
    if site not in ("none", "same-origin") and not navigating:
        raise Problem(403, "requests of other sites are refused")
    origin = request.headers.get("origin")
    if origin is not None and _netloc(origin) != host.lower():
        raise Problem(403, f"requests of {origin[:80]!r} are refused")


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""
