"""The OpenAPI 3.1 document: every route with every answer that it can give, refusals included.

What FastAPI cannot know is added by rule: which problems a route can answer follows from its
method, its parameters and who may use it. A test asks every route for more than it promises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import wraps
from typing import Any

import msgspec
from fastapi import APIRouter, FastAPI, Response
from fastapi.dependencies.models import Dependant
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute

from controller.http import answers, problems

OPEN = frozenset({"/livez", "/readyz", "/api/v1/devices:enrol", "/webhooks/git"})
_REF = "#/components/schemas/Problem"
_SAID: dict[int, str] = {
    204: "There is none yet",
    206: "The part that Range asked for",
    400: "The request cannot be read, or asks for what is in no name",
    401: "Nobody we know",
    403: "Known, and may not",
    404: "There is none, or it is not for this caller",
    409: "Its state does not allow it",
    412: "Stale: it has changed since it was seen",
    413: "Larger than this route takes",
    415: "Another content type is needed",
    416: "Range is beyond the end",
    422: "Read, and not valid: `errors` says where",
    428: "If-Match is missing",
    429: "Too fast: Retry-After says how long to wait",
    500: "An error of ours",
    503: "The database or the broker does not answer",
}
_VERBS = ("rollback", "hold", "pause", "lift", "resume", "promote")


class Told(APIRoute):
    """A route whose answers are plain JSON already: encoded at once. FastAPI would walk through
    every value of a list in Python first, which costs more than reading it."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **more: Any) -> None:
        super().__init__(path, _encoded(endpoint), **more)


def _encoded(endpoint: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(endpoint)
    def answer(*args: Any, **given: Any) -> Any:
        found = endpoint(*args, **given)
        if not isinstance(found, dict):
            return found
        return Response(msgspec.json.encode(found), media_type="application/json")

    return answer


def says(model: type[answers.Answer], status: int = 200) -> dict[str, Any]:
    """How a route declares its answer: told in the document, not checked at run time."""
    return {"response_model": None, "responses": {status: {"model": model}}}


def raw(kind: str, *others: int) -> dict[str, Any]:
    """A route that answers bytes of this content type; `others`: further statuses without JSON."""
    shown: dict[int | str, Any] = {
        200: {"content": {kind: {"schema": {"type": "string", "format": "binary"}}}}
    }
    if kind == "application/json":
        shown[200] = {"content": {kind: {"schema": {"type": "object"}}}}
    for code in others:
        shown[code] = {"description": _SAID[code]}
    return {"response_model": None, "response_class": Response, "responses": shown}


def install(app: FastAPI, routers: Iterable[APIRouter], *, local: bool) -> None:
    """`local`: who asks from this machine needs no token, and the document says so."""
    rights = _rights(routers)

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app, rights, local)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _document(app: FastAPI, rights: Mapping[tuple[str, str], str], local: bool) -> dict[str, Any]:
    found = get_openapi(
        title="Bellwether",
        version="1",
        description="GitOps releases for fleets of devices. Times are UTC RFC 3339; lists are "
        "paged by opaque cursors; refusals are RFC 9457 problems; verbs need `If-Match`.",
        routes=app.routes,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
    )
    schemas = found.setdefault("components", {}).setdefault("schemas", {})
    for model in (answers.Problem, answers.Fault):
        schema = model.model_json_schema(
            ref_template="#/components/schemas/{model}", mode="serialization"
        )
        schema.pop("$defs", None)
        schemas[model.__name__] = schema
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    found["components"]["securitySchemes"] = {
        "token": {"type": "http", "scheme": "bearer", "description": "API token, or JWT"},
        "device": {"type": "http", "scheme": "basic", "description": "A device's id and password"},
    }
    for path, item in found["paths"].items():
        for method, operation in item.items():
            _answers(path, method, operation)
            operation["security"] = _security(path, local)
            if right := rights.get((method, path)):
                operation["x-right"] = right
    return found


def _rights(routers: Iterable[APIRouter]) -> dict[tuple[str, str], str]:
    """(method, path) → the right that the route's dependencies ask for."""
    found = {}
    for route in (route for router in routers for route in router.routes):
        if isinstance(route, APIRoute):
            for right in _asked(route.dependant):
                for method in route.methods or ():
                    found[method.lower(), route.path] = right
    return found


def _asked(dependant: Dependant) -> Iterator[str]:
    right = getattr(dependant.call, "right", None)
    if right is not None:
        yield str(right)
    for inner in dependant.dependencies:
        yield from _asked(inner)


def _security(path: str, local: bool) -> list[dict[str, list[str]]]:
    """Any one of these is enough; `{}`: none is needed."""
    if path in OPEN:
        return []
    device = path.endswith("/desired") or path.startswith("/artifacts/")
    ways: list[dict[str, list[str]]] = [{}] if local else []
    return [*ways, {"token": []}, *([{"device": list[str]()}] if device else [])]


def _answers(path: str, method: str, operation: dict[str, Any]) -> None:
    codes = {400, 413, 429, 500, 503}
    if path not in OPEN:
        codes |= {401, 403}
    if path in ("/api/v1/devices:enrol", "/webhooks/git"):
        codes |= {401, 404}
    if "{" in path:
        codes |= {404}
    if operation.get("parameters") or "requestBody" in operation:
        codes |= {422}
    if method == "post":
        codes |= {404, 409, 415, 422}
    if path.rpartition(":")[2] in _VERBS or path == "/api/v1/stop":
        codes |= {412, 428}
    responses = operation["responses"]
    responses.pop("422", None)
    for code in sorted(codes):
        responses.setdefault(
            str(code),
            {
                "description": _SAID[code],
                "content": {problems.MEDIA_TYPE: {"schema": {"$ref": _REF}}},
            },
        )
