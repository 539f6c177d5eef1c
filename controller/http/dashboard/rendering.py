"""Turns what a page shows into HTML: templates, headers, static files.

A page is `base.html` around a block named `live`. The same block is what `live` sends when
something has changed, so that a stream and a reload can never differ.
"""

from __future__ import annotations

import mimetypes
from collections.abc import Mapping
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastapi import Request, Response
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from controller.http.dashboard.figures import FILTERS, MOST, UNSHOWN, clip
from controller.http.problems import Problem
from controller.roles import Principal

_HERE = Path(__file__).parent
STATIC = _HERE / "static"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
    # Without the origin of our own pages the browser would send `Origin: null` with their forms.
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters |= FILTERS
    environment.filters["path"] = lambda text: segment(str(text))
    environment.globals["static"] = static_url
    return environment


def _shown(value: Any) -> Any:
    """Without what no page can show; ten thousand characters are enough of one name."""
    if type(value) is str and (len(value) > MOST or UNSHOWN.search(value)):
        return clip(value)
    return "" if value is None else value


def segment(text: str) -> str:
    """A name as one part of a path."""
    return quote(text, safe="")


@cache
def static_url(name: str) -> str:
    """The URL of a static file; it changes with the content, so that it may be kept for ever."""
    digest = sha256((STATIC / name).read_bytes()).hexdigest()[:12]
    return f"/static/{digest}/{name}"


def static_file(digest: str, name: str) -> Response:
    """A static file by the URL that a page named."""
    if name not in _names() or static_url(name) != f"/static/{digest}/{name}":
        raise Problem(404, "no such file: load the page again")
    kind = _TYPES.get(Path(name).suffix) or mimetypes.guess_type(name)[0] or "text/plain"
    headers = {"Cache-Control": "public, max-age=31536000, immutable"}
    return Response(_bytes(name), media_type=kind, headers=headers)


@cache
def _names() -> frozenset[str]:
    return frozenset(
        str(file.relative_to(STATIC)) for file in STATIC.rglob("*") if file.suffix in _TYPES
    )


@cache
def _bytes(name: str) -> bytes:
    return (STATIC / name).read_bytes()


_TEMPLATES = _environment()


def page(
    request: Request, template: str, who: Principal | None, shown: Mapping[str, Any],
    status: int = 200, live: str = "",
) -> Response:  # fmt: skip
    """A whole page. `live`: the path of its stream, empty when it has none."""
    html = _TEMPLATES.get_template(template).render(
        {
            "who": who,
            "here": request.url.path,
            "live_url": live,
            "stops": (),
            "scope": "",
            **shown,
        }
    )
    return Response(html, status, media_type="text/html", headers=HEADERS)


def live_part(template: str, shown: Mapping[str, Any]) -> str:
    """What changes of a page: its `live` block."""
    found = _TEMPLATES.get_template(template)
    context = found.new_context({"live_url": "", "stops": (), "scope": "", **shown})
    return "".join(found.blocks["live"](context))
