"""Checks bearer JWTs (and ID tokens) offline, against keys that are pinned or fetched and kept.

Rules, in order:

1. RS256, ES256 and EdDSA (Ed25519) only. `none`, HMAC and keys inside the token's own header are
   nothing.
2. The key is the one of `kid` in our set. An unknown `kid` fetches the set again, at most once a
   minute; the last good set is kept on disk, so that a provider that is away locks nobody out.
3. Issuer and audience are exactly ours; exp, iat and sub are there; clocks may differ by 30 s.
4. One sentence for whoever asks; what exactly was wrong stands in the log.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import structlog
from joserfc import jwt
from joserfc.errors import InvalidKeyIdError, JoseError, UnsupportedAlgorithmError
from joserfc.jwk import KeySet
from joserfc.jws import JWSRegistry, extract_compact

ALGORITHMS = frozenset({"RS256", "ES256", "EdDSA", "Ed25519"})  # the last two are one (RFC 9864)
LEEWAY = 30  # seconds
FRESH = 3600.0  # seconds that a fetched set is used without a look at the provider
_AGAIN = 60.0  # seconds between two fetches
_LONGEST = 16 * 1024
log = structlog.get_logger()


class NotBelieved(Exception):
    """The token proves nothing to us."""


class _Algorithms(JWSRegistry):
    """Ours alone; the library would warn of the name EdDSA at every token."""

    def get_alg(self, name: str) -> Any:
        if name not in ALGORITHMS or name not in self.algorithms:
            raise UnsupportedAlgorithmError(f"algorithm {name!r} is not accepted")
        return self.algorithms[name]


_OURS = _Algorithms()


class Keys:
    """The provider's public keys: a pinned file, or fetched and kept as `kept`."""

    def __init__(
        self,
        *,
        pinned: Path | None,
        fetch: Callable[[], bytes] | None,
        kept: Path | None,
        clock: Callable[[], float],
    ) -> None:
        self._pinned, self._fetch, self._kept, self._clock = pinned, fetch, kept, clock
        self._lock = threading.Lock()
        self._set: KeySet | None = None
        self._at = -FRESH
        self._tried = -_AGAIN
        self._mtime = 0.0

    def current(self, *, wanted: str | None = None) -> KeySet:
        """The keys; `wanted`: a kid that the caller misses. Raises NotBelieved without any."""
        with self._lock:
            if self._pinned is not None:
                self._read_pinned(self._pinned)
            elif self._set is None or wanted or self._clock() - self._at > FRESH:
                self._look(self._clock())
            if self._set is None:
                raise NotBelieved("the identity provider's keys are not known yet")
            return self._set

    def _read_pinned(self, file: Path) -> None:
        try:
            changed = file.stat().st_mtime
            if changed != self._mtime:
                self._set = _parsed(file.read_bytes())
                self._mtime = changed
        except (OSError, ValueError) as error:
            log.error("jwks", file=str(file), detail=str(error))

    def _look(self, now: float) -> None:
        if self._fetch is None or now - self._tried < _AGAIN:
            return
        self._tried = now
        try:
            data = self._fetch()
            self._set, self._at = _parsed(data), now
            if self._kept is not None:
                self._kept.write_bytes(data)
        except (OSError, ValueError) as error:
            log.warning("jwks", detail=f"{type(error).__name__}: {error}")
            if self._set is None and self._kept is not None and self._kept.is_file():
                self._set = _parsed(self._kept.read_bytes())


def claims(
    token: str,
    keys: Keys,
    *,
    issuer: str,
    audience: str,
    now: float,
    kid_needed: bool = True,
) -> Mapping[str, Any]:
    """The claims of a token that is what it says it is; raises NotBelieved.

    `kid_needed=False`: an ID token straight from the provider may leave it out.
    """
    if len(token) > _LONGEST or not token.isascii():
        raise NotBelieved("the token is too long, or no token")
    try:
        found = _decoded(token, keys, kid_needed)
        needs = jwt.JWTClaimsRegistry(
            now=int(now),
            leeway=LEEWAY,
            iss={"essential": True, "value": issuer},
            aud={"essential": True, "value": audience},
            exp={"essential": True},
            iat={"essential": True},
            sub={"essential": True},
        )
        needs.validate(found)
    except (JoseError, ValueError, TypeError, RecursionError, OverflowError) as error:
        log.info("token_refused", detail=f"{type(error).__name__}: {error}"[:300])
        raise NotBelieved("the token is not one of our provider's for us, or expired") from None
    return found


def _decoded(token: str, keys: Keys, kid_needed: bool) -> dict[str, Any]:
    kid = _kid(token)
    if kid is None and kid_needed:
        raise NotBelieved("the token names no key (kid)")
    try:
        return jwt.decode(token, keys.current(), registry=_OURS).claims
    except InvalidKeyIdError:
        return jwt.decode(token, keys.current(wanted=kid), registry=_OURS).claims


def _kid(token: str) -> str | None:
    header = extract_compact(token.encode()).headers()
    kid = header.get("kid")
    return kid if isinstance(kid, str) and kid else None


def _parsed(data: bytes) -> KeySet:
    """Public signature keys only; raises ValueError."""
    try:
        plain = json.loads(data)
        usable = [
            key
            for key in plain["keys"]
            if key.get("kty") in ("RSA", "EC", "OKP") and key.get("use", "sig") == "sig"
        ]
        return KeySet.import_key_set({"keys": usable})
    except (KeyError, TypeError, AttributeError, JoseError, RecursionError) as error:
        raise ValueError(f"no JSON Web Key Set: {error}") from None
