"""Speaks with the identity provider: discovery, the way to its login, the code for an ID token.

OpenID Connect Core 1.0, authorization code flow with PKCE (RFC 7636, S256), state and nonce. The
provider's answers are bounded and never redirected; everything that it says of a person is believed
only inside a signed ID token, or from its userinfo endpoint for the same subject.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from authlib.oauth2.rfc6749.parameters import prepare_grant_uri
from authlib.oauth2.rfc7636 import create_s256_code_challenge

from controller import bearer
from controller.bearer import Keys, NotBelieved
from controller.settings import Settings, is_loopback

_PATIENCE = 5.0  # seconds
_LONGEST = 1024 * 1024
_FRESH = 3600.0


class ProviderAway(OSError):
    """The identity provider does not answer, or not as the standard says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    id: str
    secret: str | None
    redirect: str  # our callback


class Provider:
    def __init__(self, settings: Settings, clock: Callable[[], float]) -> None:
        self.issuer = settings.oidc_issuer
        self._clock = clock
        self._lock = threading.Lock()
        self._found: Mapping[str, Any] | None = None
        self._at = -_FRESH
        self._secret_file = settings.oidc_client_secret_file
        self._client_id = settings.oidc_client_id
        self._redirect = f"{settings.public_url}/login/oidc/callback"
        where = settings.oidc_jwks
        pinned = Path(where) if where and "://" not in where else None
        self.keys = Keys(
            pinned=pinned,
            fetch=lambda: _get(where or str(self._document()["jwks_uri"])),
            kept=settings.state_dir / "jwks.json",
            clock=clock,
        )

    @property
    def for_pages(self) -> bool:
        """Can people log in on the pages?"""
        return bool(self._client_id)

    def login_url(self, *, state: str, nonce: str, verifier: str) -> str:
        """Where the browser goes to log in; raises ProviderAway."""
        return str(
            prepare_grant_uri(
                self._endpoint("authorization_endpoint"),
                client_id=self._client_id,
                response_type="code",
                redirect_uri=self._redirect,
                scope="openid email profile groups"
                if self._knows("groups")
                else "openid email profile",
                state=state,
                nonce=nonce,
                code_challenge=create_s256_code_challenge(verifier),
                code_challenge_method="S256",
            )
        )

    def exchange(self, code: str, *, nonce: str, verifier: str) -> Mapping[str, Any]:
        """The claims of the person who brought this code; raises NotBelieved, ProviderAway."""
        form = {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": self._redirect,
            "client_id": self._client_id,
            "code_verifier": verifier,
        }
        secret = None if self._secret_file is None else self._secret_file.read_text().strip()
        auth = None if secret is None else (self._client_id, secret)
        answer = _post(self._endpoint("token_endpoint"), form, auth)
        token = answer.get("id_token")
        if not isinstance(token, str):
            raise NotBelieved("the provider gave no ID token")
        found = bearer.claims(
            token,
            self.keys,
            issuer=self.issuer,
            audience=self._client_id,
            now=self._clock(),
            kid_needed=False,
        )
        if found.get("nonce") != nonce:
            raise NotBelieved("the ID token belongs to another login")
        if found.get("azp", self._client_id) != self._client_id:
            raise NotBelieved("the ID token was given to another client")
        return self._with_userinfo(found, answer.get("access_token"))

    def _with_userinfo(self, found: Mapping[str, Any], access: Any) -> Mapping[str, Any]:
        """Providers may keep groups and names out of the ID token."""
        where = self._document().get("userinfo_endpoint")
        if not isinstance(where, str) or not isinstance(access, str):
            return found
        more = _json(_get(where, access))
        if more.get("sub") != found["sub"]:
            raise NotBelieved("the provider's userinfo is of somebody else")
        return {**more, **found}

    def _knows(self, scope: str) -> bool:
        scopes = self._document().get("scopes_supported")
        return isinstance(scopes, list) and scope in scopes

    def _endpoint(self, name: str) -> str:
        found = self._document().get(name)
        if not isinstance(found, str):
            raise ProviderAway(f"the provider names no {name}")
        _must_be_private(found)
        return found

    def _document(self) -> Mapping[str, Any]:
        """Discovery 1.0; the last good one serves while the provider is away."""
        with self._lock:
            if self._found is not None and self._clock() - self._at < _FRESH:
                return self._found
            try:
                url = f"{self.issuer.rstrip('/')}/.well-known/openid-configuration"
                found = _json(_get(url))
                if found.get("issuer") != self.issuer:
                    raise ProviderAway(f"it calls itself {found.get('issuer')!r}")
                self._found, self._at = found, self._clock()
            except OSError:
                if self._found is None:
                    raise
            return self._found


def _get(url: str, access: str | None = None) -> bytes:
    return _ask("GET", url, headers={"Authorization": f"Bearer {access}"} if access else {})


def _post(url: str, form: Mapping[str, str], auth: tuple[str, str] | None) -> Mapping[str, Any]:
    return _json(_ask("POST", url, data=dict(form), auth=auth))


def _ask(method: str, url: str, **how: Any) -> bytes:
    """A bounded answer; raises ProviderAway."""
    import httpx2

    _must_be_private(url)
    try:
        with (
            httpx2.Client(timeout=_PATIENCE, follow_redirects=False) as client,
            client.stream(method, url, **how) as answer,
        ):
            data = b""
            for part in answer.iter_bytes():
                data += part
                if len(data) > _LONGEST:
                    raise ProviderAway(f"{url}: its answer is too long")
            if answer.status_code != 200:
                raise ProviderAway(f"{url}: HTTP {answer.status_code}")
            return data
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise ProviderAway(f"{url}: {type(error).__name__}") from None


def _must_be_private(url: str) -> None:
    """Secrets go over https; plain http is for a provider on this machine."""
    parts = urlsplit(url)
    if parts.scheme != "https" and not is_loopback(parts.hostname or ""):
        raise ProviderAway(f"{url}: an identity provider is asked over https alone")


def _json(data: bytes) -> Mapping[str, Any]:
    import json

    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ProviderAway("the provider's answer is no JSON object")
    return found
