"""Puts the HTTP application together: routes, errors, guard. It knows ports only, no adapters."""

from __future__ import annotations

from fastapi import FastAPI

from controller.http import page, problems, reads, services, verbs
from controller.http.devicebook import DeviceBook
from controller.http.guard import Guard
from controller.http.ports import Deps

__all__ = ["Deps", "create_app"]


def create_app(deps: Deps) -> FastAPI:
    # No interactive documentation: its scripts come from elsewhere. The document itself is served.
    app = FastAPI(
        title="Bellwether",
        version="1",
        openapi_url="/api/v1/openapi.json",
        docs_url=None,
        redoc_url=None,
    )
    app.state.deps = deps
    app.state.book = DeviceBook(deps.reader, deps.clock)
    problems.install(app)
    # The more special paths come first: `/devices/{d}:move` before anything that takes any name.
    for router in (verbs.router, services.api, reads.router, services.router, page.router):
        app.include_router(router)
    app.add_middleware(Guard)
    return app
