"""Answers every refusal as RFC 9457 `application/problem+json`.

Each one says what happened (`detail`), what to do (`hint`) and where (`errors[].pointer`): a JSON
pointer into the body, or `query/NAME`, `header/NAME`, `path`, `method`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import OperationalError
from starlette.exceptions import HTTPException

from controller.broker_admin import BrokerUnavailable
from controller.commands import Refused
from controller.devices import DeviceRefused
from controller.http import bodies, methods

MEDIA_TYPE = "application/problem+json"
log = structlog.get_logger()

# What to do, and what it is about, where the refusal itself does not say.
_HINTS: Mapping[int, tuple[str, str]] = {
    400: ("", "correct the request; /api/v1/openapi.json says what is understood"),
    401: ("header/authorization", "send Authorization: Bearer TOKEN (`bellwether token create`)"),
    403: ("header/authorization", "ask an administrator of the fleet for a role that may"),
    404: ("path", "look at the list that it should be in; names are exact"),
    405: ("method", "use one of the methods that the Allow header names"),
    409: ("path", "GET it and look at its state first"),
    412: ("header/if-match", "GET it again, look, then repeat with its new ETag"),
    413: ("", "send less at once"),
    415: ("header/content-type", "send the content type that is named"),
    422: ("", "correct the fields that `errors` names; /api/v1/openapi.json has the schema"),
    428: ("header/if-match", "GET it, look, then repeat with its ETag; or send If-Match: *"),
    429: ("header/authorization", "wait as Retry-After says; stops have a lane of their own"),
    500: ("", "ask again; the server's log has the cause"),
    503: ("", "ask again in some seconds"),
}


class Problem(Exception):
    """A refusal: HTTP status, what happened, what to do; `pointer`: the part that it is about."""

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        pointer: str = "",
        hint: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.pointer = pointer
        self.hint = hint
        self.headers = dict(headers or {})


def answer(
    status: int,
    detail: str,
    errors: Sequence[Mapping[str, str]] = (),
    headers: Mapping[str, str] | None = None,
    hint: str = "",
) -> JSONResponse:
    pointer, usual = _HINTS.get(status, ("", "see /api/v1/openapi.json"))
    body: dict[str, Any] = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "hint": hint or usual,
        "errors": list(errors) or [{"pointer": pointer, "detail": detail}],
    }
    return JSONResponse(body, status, dict(headers or {}), media_type=MEDIA_TYPE)


def install(app: FastAPI) -> None:
    """All errors of this application leave it as problems."""
    app.add_exception_handler(Problem, _problem)
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(DeviceRefused, _device_refused)
    app.add_exception_handler(BrokerUnavailable, _unavailable)
    app.add_exception_handler(OperationalError, _no_database)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _broken)


def _problem(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Problem)  # noqa: S101 - registered for this type alone
    errors = [{"pointer": error.pointer, "detail": error.detail}] if error.pointer else []
    return answer(error.status, error.detail, errors, error.headers, error.hint)


def _refused(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Refused)  # noqa: S101
    errors = [{"pointer": error.pointer, "detail": error.message}] if error.pointer else []
    return answer(error.code, error.message, errors)


def _device_refused(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, DeviceRefused)  # noqa: S101
    errors = [{"pointer": error.pointer, "detail": error.message}] if error.pointer else []
    return answer(error.code, error.message, errors)


def _unavailable(_: Request, error: Exception) -> JSONResponse:
    return answer(503, f"{error}; ask again", headers={"Retry-After": "2"})


def _no_database(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, OperationalError)  # noqa: S101
    log.warning("database", detail=str(error.orig))
    return answer(503, "the database does not answer", headers={"Retry-After": "2"})


def _invalid(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)  # noqa: S101
    errors, hint = [], ""
    for fault in error.errors():
        source, *path = (str(part) for part in fault["loc"])
        pointer = "/" + "/".join(p.replace("~", "~0").replace("/", "~1") for p in path)
        message = str(fault["msg"])
        if fault["type"] == "json_invalid":  # its place is a character, and no part of the body
            pointer, message = "", f"no JSON: {fault['ctx']['error']} at character {path[0]}"
        if fault["type"] == "extra_forbidden":
            message = "unknown field"
            hint = hint or _nearest(path[-1] if path else "")
        errors.append(
            {
                "pointer": _shown(pointer if source == "body" else f"{source}{pointer}")[:200],
                "detail": _shown(message)[:500],
            }
        )
    first = errors[0] if errors else {"pointer": "", "detail": "not valid"}
    said = f"{first['pointer']}: {first['detail']}" if first["pointer"] else first["detail"]
    return answer(422, said[:600], errors[:50], hint=hint)


def _nearest(name: str) -> str:
    """The known field that was probably meant."""
    close = difflib.get_close_matches(name, sorted(bodies.fields()), n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else ""


def _shown(text: str) -> str:
    """Printable: what was sent may hold anything, lone surrogates too."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)  # noqa: S101
    headers = error.headers
    if error.status_code == 405 and (takes := methods.allowed(request.scope)):
        headers = {"Allow": ", ".join(sorted(takes))}
    return answer(error.status_code, str(error.detail), headers=headers)


def _broken(_: Request, error: Exception) -> JSONResponse:
    # What went wrong stands in the log; it may hold what the asker shall not see.
    return answer(500, f"an error of ours ({type(error).__name__}): it is in the server's log")
