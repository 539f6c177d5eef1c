"""The tests' OpenID provider, made strict: it verifies PKCE (RFC 7636) and takes S256 alone.

The mock answers a code without looking at its verifier; the extension of its own library does.
Run as `python strict_provider.py --port N …`, with the options of the mock.
"""

from __future__ import annotations

from typing import Any

from authlib.oauth2.rfc7636 import CodeChallenge
from oidc_provider_mock import _app
from oidc_provider_mock.__main__ import run

_challenges: dict[str, str] = {}  # code → what it was asked for with


class Strict(CodeChallenge):  # type: ignore[misc]  # the library has no types
    SUPPORTED_CODE_CHALLENGE_METHOD = ["S256"]  # noqa: RUF012 - the library's own name

    def get_authorization_code_challenge(self, authorization_code: Any) -> str | None:
        return _challenges.get(authorization_code.code)

    def get_authorization_code_challenge_method(self, authorization_code: Any) -> str:
        return "S256"


class Grant(_app.AuthorizationCodeGrant):  # type: ignore[misc]
    def save_authorization_code(self, code: str, request: Any) -> None:
        super().save_authorization_code(code, request)
        _challenges[code] = request.payload.data.get("code_challenge", "")


def _register(self: Any, grant: Any, extensions: Any = None) -> None:
    if grant is _app.AuthorizationCodeGrant:
        grant, extensions = Grant, [*(extensions or ()), Strict(required=True)]
    _plain(self, grant, extensions)


_plain = _app.flask_oauth2.AuthorizationServer.register_grant
_app.flask_oauth2.AuthorizationServer.register_grant = _register

if __name__ == "__main__":
    run()
