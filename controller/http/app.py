"""Puts the HTTP application together: routes, errors, guard. It knows ports only, no adapters."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator

import structlog
from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool

from controller.broker_admin import BrokerUnavailable
from controller.http import (
    approving,
    contract,
    identity,
    plans,
    problems,
    reads,
    services,
    session,
    verbs,
)
from controller.http.dashboard import pages
from controller.http.devicebook import DeviceBook
from controller.http.events import Events
from controller.http.guard import Guard
from controller.http.identity import Identity
from controller.http.lanes import Lanes
from controller.http.ports import Deps

__all__ = ["Deps", "create_app"]

SYNC_EVERY = 30.0  # seconds between two looks whether the broker still knows its devices
log = structlog.get_logger()


def create_app(deps: Deps) -> FastAPI:
    # No interactive documentation: its scripts come from elsewhere. The document itself is served.
    app = FastAPI(
        title="Bellwether",
        version="1",
        openapi_url="/api/v1/openapi.json",
        docs_url=None,
        redoc_url=None,
        lifespan=_lifespan,
    )
    app.state.deps = deps
    app.state.book = DeviceBook(deps.reader, deps.clock)
    app.state.refused = {}
    app.state.lanes = Lanes(deps.settings.rate_limit)
    app.state.events = Events(deps.engine)
    app.state.local_csrf = secrets.token_urlsafe(32)
    app.state.identity = Identity(deps)
    problems.install(app)
    app.add_exception_handler(session.LoginNeeded, session.to_login)
    pages.install(app, deps)
    # The more special paths come first: `/devices/{d}:move` before anything that takes any name.
    routers = (
        verbs.router, approving.router, plans.router, services.api, reads.router, services.router,
        session.router, identity.router,
        *pages.routers,
    )  # fmt: skip
    for router in routers:
        app.include_router(router)
    app.state.routes = [route for router in routers for route in router.routes]
    contract.install(app, routers, local=deps.settings.auth == "loopback")
    app.add_middleware(Guard)
    return app


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    task = asyncio.create_task(_keep_accounts(app.state.deps))
    warming = asyncio.create_task(_warm(app))
    yield
    await app.state.live.close()
    app.state.measured.close()
    app.state.events.stop()
    warming.cancel()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def _warm(app: FastAPI) -> None:
    """What a first page would wait for is read while nobody waits."""
    try:
        await run_in_threadpool(app.state.book.warm, app.state.deps.engine)
    except Exception:  # a page will find out, and say it
        log.exception("warm")


async def _keep_accounts(deps: Deps) -> None:
    """A broker that forgot its devices, or came back empty, is filled again from the registry."""
    while True:
        try:
            added, removed = await run_in_threadpool(deps.registry.sync)
            if added or removed:
                log.info("broker accounts", added=added, removed=removed)
        except BrokerUnavailable as error:
            log.warning("broker accounts", detail=str(error))
        except Exception:  # the outermost turn: logged, and tried again
            log.exception("broker accounts")
        await asyncio.sleep(SYNC_EVERY)
