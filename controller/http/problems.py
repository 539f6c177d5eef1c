"""Answers every refusal as RFC 9457 `application/problem+json`, with `errors[].pointer`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from controller.broker_admin import BrokerUnavailable
from controller.commands import Refused
from controller.devices import DeviceRefused

MEDIA_TYPE = "application/problem+json"


class Problem(Exception):
    """A refusal: HTTP status, what happened, what to do; `pointer`: the part of the body."""

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        pointer: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.pointer = pointer
        self.headers = dict(headers or {})


def answer(
    status: int,
    detail: str,
    errors: Sequence[Mapping[str, str]] = (),
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    body: dict[str, Any] = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
    }
    if errors:
        body["errors"] = list(errors)
    return JSONResponse(body, status, dict(headers or {}), media_type=MEDIA_TYPE)


def install(app: FastAPI) -> None:
    """All errors of this application leave it as problems."""
    app.add_exception_handler(Problem, _problem)
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(DeviceRefused, _device_refused)
    app.add_exception_handler(BrokerUnavailable, _unavailable)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _broken)


def _problem(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Problem)  # noqa: S101 - registered for this type alone
    errors = [{"pointer": error.pointer, "detail": error.detail}] if error.pointer else []
    return answer(error.status, error.detail, errors, error.headers)


def _refused(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Refused)  # noqa: S101
    return answer(error.code, error.message)


def _device_refused(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, DeviceRefused)  # noqa: S101
    errors = [{"pointer": error.pointer, "detail": error.message}] if error.pointer else []
    return answer(error.code, error.message, errors)


def _unavailable(_: Request, error: Exception) -> JSONResponse:
    return answer(503, f"{error}; ask again", headers={"Retry-After": "2"})


def _invalid(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)  # noqa: S101
    errors = []
    for fault in error.errors():
        source, *path = (str(part) for part in fault["loc"])
        pointer = "/" + "/".join(p.replace("~", "~0").replace("/", "~1") for p in path)
        message = "unknown field" if fault["type"] == "extra_forbidden" else str(fault["msg"])
        errors.append(
            {
                "pointer": pointer if source == "body" else f"{source}{pointer}"[:200],
                "detail": message[:500],
            }
        )
    first = errors[0] if errors else {"pointer": "", "detail": "not valid"}
    return answer(422, f"{first['pointer']}: {first['detail']}"[:600], errors[:50])


def _http(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)  # noqa: S101
    return answer(error.status_code, str(error.detail), headers=error.headers)


def _broken(_: Request, error: Exception) -> JSONResponse:
    # What went wrong stands in the log; it may hold what the asker shall not see.
    return answer(500, f"an error of ours ({type(error).__name__}): it is in the server's log")
