"""Decides who is asking and what they may do. Deny by default.

Rules, in order:

1. A token that is presented is always checked: a wrong one is 401, on every listener.
2. Without a token: on a loopback listener with `auth: loopback` it is the local admin — unless the
   Host header is not ours (DNS rebinding) or a browser says that another site sent it.
3. HTTP Basic is for devices: their id and broker password; they reach their own things alone.
4. A stop (hold, pause, rollback, stop) is one person's; lift, resume and promote need more.
5. A token for some fleets sees nothing of the others: they are 404, not 403.
"""

from __future__ import annotations

import binascii
from base64 import b64decode
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any
from urllib.parse import urlsplit

from fastapi import Request

from controller import tokens
from controller.http.problems import Problem
from controller.settings import is_loopback
from controller.tokens import Role


class Right(StrEnum):
    VIEW = "view"
    STOP = "stop"
    START = "start"
    PUBLISH = "publish"
    DEVICES = "devices"
    AUDIT = "audit"


_EVERYTHING = frozenset(Right)
RIGHTS: dict[Role, frozenset[Right]] = {
    Role.VIEWER: frozenset({Right.VIEW}),
    Role.AUDITOR: frozenset({Right.VIEW, Right.AUDIT}),
    Role.ON_CALL: frozenset({Right.VIEW, Right.STOP}),
    Role.RELEASE_MANAGER: frozenset({Right.VIEW, Right.STOP, Right.START, Right.PUBLISH}),
    Role.ADMIN: _EVERYTHING,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    name: str
    role: Role
    fleets: frozenset[str] = frozenset()  # empty: all

    def sees(self, fleet: str) -> bool:
        return not self.fleets or fleet in self.fleets

    def must_see_all(self, what: str) -> None:
        if self.fleets:
            raise Problem(403, f"{self.name} is for some fleets only: {what} tells of all of them")


def needs(right: Right) -> Callable[[Request], Principal]:
    """A dependency: the principal, when it has this right."""

    def check(request: Request) -> Principal:
        principal = authenticate(request)
        if right not in RIGHTS[principal.role]:
            raise Problem(
                403, f"{principal.name} ({principal.role}) may not do this: it needs {right}"
            )
        return principal

    check.__name__ = f"needs_{right}"
    return check


def authenticate(request: Request) -> Principal:
    deps = request.app.state.deps
    scheme, credential = _authorization(request)
    if scheme == "bearer":
        row = tokens.check(deps.engine, credential, deps.clock())
        if row is None:
            raise _unauthorized("the token is unknown, expired or revoked")
        return Principal(name=row.name, role=Role(row.role), fleets=frozenset(row.fleets))
    if scheme:
        raise _unauthorized("send Authorization: Bearer TOKEN")
    if deps.settings.auth != "loopback" or not _from_here(request):
        raise _unauthorized("a token is needed: Authorization: Bearer TOKEN")
    _not_from_another_site(request)
    return Principal(name="local", role=Role.ADMIN)


def device_or_viewer(request: Request) -> str | None:
    """The device's id for a device's own credentials, None for a person who may look."""
    scheme, credential = _authorization(request)
    if scheme != "basic":
        authenticate(request)
        return None
    try:
        device, _, password = b64decode(credential, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        raise _unauthorized("the credentials are not base64 of ID:PASSWORD", "Basic") from None
    if not request.app.state.deps.registry.password_matches(device, password):
        raise _unauthorized("unknown device, or wrong password", "Basic")
    return device


def _authorization(request: Request) -> tuple[str, str]:
    scheme, _, credential = request.headers.get("authorization", "").partition(" ")
    return scheme.lower(), credential.strip()


def _unauthorized(detail: str, scheme: str = "Bearer") -> Problem:
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
    if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
        raise Problem(403, f"requests of {origin[:80]!r} are refused")
