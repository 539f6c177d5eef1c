"""People of an identity provider: bearer JWTs for the API, login by OpenID Connect for pages.

Rules of the login:

1. It begins in our database: state, nonce and PKCE verifier, bound to the browser by a cookie, good
   for ten minutes and for one return.
2. What comes back without its state, or in another browser, opens nothing.
3. The session is new, and holds the roles that the claims give now; without one it is refused.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import RedirectResponse
from sqlalchemy import Engine, delete, insert

from controller import bearer, rolemap, sessions
from controller.bearer import NotBelieved
from controller.http import access, session
from controller.http.ports import Deps, Given
from controller.http.problems import Problem
from controller.oidc import Provider, ProviderAway
from controller.roles import Principal, Right
from controller.store.tables import logins
from telemetry.store.database import writing

router = APIRouter(include_in_schema=False)
BROWSER = "bellwether-oidc"  # Lax: it must come along when the provider sends the person back
_LASTS = 600.0


class Identity:
    """The provider and the map of its claims to roles; None of both: local tokens only."""

    def __init__(self, deps: Deps) -> None:
        settings = deps.settings
        self.provider = Provider(settings, deps.clock) if settings.oidc_issuer else None
        self._audience = settings.oidc_audience
        file = settings.oidc_roles
        self._roles = rolemap.load(file) if file is not None else rolemap.RoleMap()
        self._clock = deps.clock

    def bearer(self, token: str) -> Principal | None:
        """Who this JWT is; None when it is none of ours to check. Raises 401."""
        if self.provider is None or not self._audience or token.count(".") != 2:
            return None
        try:
            found = bearer.claims(
                token,
                self.provider.keys,
                issuer=self.provider.issuer,
                audience=self._audience,
                now=self._clock(),
            )
        except NotBelieved as error:
            raise access.unauthorized(str(error)) from None
        return self._roles.principal(found, via="jwt")

    def person(self, code: str, *, nonce: str, verifier: str) -> Principal:
        """Who came back from the provider's login; raises NotBelieved, ProviderAway."""
        assert self.provider is not None  # noqa: S101 - the route asked before
        found = self.provider.exchange(code, nonce=nonce, verifier=verifier)
        return self._roles.principal(found, via="oidc")


@router.get("/login/oidc")
def begin(
    request: Request, deps: Given, next_: Annotated[str, Query(alias="next", max_length=512)] = "/"
) -> Response:
    """Off to the provider."""
    provider = _provider(request)
    state, nonce, browser = (secrets.token_urlsafe(32) for _ in range(3))
    verifier = secrets.token_urlsafe(48)
    try:
        url = provider.login_url(state=state, nonce=nonce, verifier=verifier)
    except (ProviderAway, KeyError) as error:
        raise Problem(503, f"the identity provider does not answer: {error}") from None
    now = deps.clock()
    with writing(deps.engine) as conn:
        conn.execute(delete(logins).where(logins.c.expires_at < now))
        conn.execute(
            insert(logins).values(
                state=_hashed(state),
                browser=_hashed(browser),
                nonce=nonce,
                verifier=verifier,
                next=session.safe_next(next_),
                expires_at=now + _LASTS,
            )
        )
    answer = RedirectResponse(url, 303)
    answer.headers["Cache-Control"] = "no-store"
    answer.set_cookie(
        BROWSER, browser, max_age=int(_LASTS), path="/login/oidc", httponly=True, samesite="lax",
        secure=session.secure(request),
    )  # fmt: skip
    return answer


@router.get("/login/oidc/callback")
def finish(
    request: Request,
    deps: Given,
    state: Annotated[str, Query(max_length=512)] = "",
    code: Annotated[str, Query(max_length=2048)] = "",
    error: Annotated[str, Query(max_length=512)] = "",
) -> Response:
    """Back from the provider."""
    identity: Identity = request.app.state.identity
    _provider(request)
    now = deps.clock()
    begun = _taken(deps.engine, state, request.cookies.get(BROWSER, ""), now)
    if begun is None:
        return session.login_again(request, "/", "this login was not begun here, or too long ago")
    nonce, verifier, path = begun
    if error or not code:
        return session.login_again(request, path, "the identity provider did not log you in")
    try:
        who = identity.person(code, nonce=nonce, verifier=verifier)
    except (NotBelieved, ProviderAway):
        return session.login_again(request, path, "the identity provider's answer is not valid")
    if not who.may(Right.VIEW):
        return session.login_again(request, path, f"{who.name} has no role here")
    opened = sessions.open_session(deps.engine, who, via="oidc", now=now)
    answer = RedirectResponse(path, 303)
    session.set_session(request, answer, opened, now)
    answer.delete_cookie(BROWSER, path="/login/oidc", httponly=True)
    return answer


def _provider(request: Request) -> Provider:
    identity: Identity = request.app.state.identity
    if identity.provider is None or not identity.provider.for_pages:
        raise Problem(404, "no identity provider: start with --oidc-issuer and --oidc-client-id")
    return identity.provider


def _taken(engine: Engine, state: str, browser: str, now: float) -> tuple[str, str, str] | None:
    """(nonce, verifier, next) of a login that this browser began; it is spent."""
    with writing(engine) as conn:
        row = conn.execute(
            delete(logins)
            .where(logins.c.state == _hashed(state))
            .returning(
                logins.c.browser, logins.c.nonce, logins.c.verifier, logins.c.next,
                logins.c.expires_at,
            )
        ).first()  # fmt: skip
    if row is None or row.expires_at < now:
        return None
    if not secrets.compare_digest(row.browser, _hashed(browser)):
        return None
    return row.nonce, row.verifier, row.next


def _hashed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
