"""Puts the dashboard into the application: routers, the census, the streams, errors as pages."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from sqlalchemy import func, select

from controller.http.dashboard import acts, approving, lists, records, refusals, routes
from controller.http.dashboard.census import Census
from controller.http.dashboard.live import Live
from controller.http.dashboard.measured import Measured
from controller.http.ports import Deps
from controller.store.tables import audit, devices, rollouts
from telemetry.store.database import reading

routers = (lists.router, routes.router, records.router, approving.router, acts.router)


def install(app: FastAPI, deps: Deps) -> None:
    app.state.census = Census(app.state.book)
    app.state.measured = Measured(deps.clock)
    app.state.live = Live(lambda: _mark(deps))
    refusals.install(app)


def _mark(deps: Deps) -> tuple[Any, ...]:
    """Differs after everything that a page may show: three lookups, whoever watches."""
    with reading(deps.engine) as conn:
        row = conn.execute(
            select(
                select(func.max(audit.c.seq)).scalar_subquery(),
                select(func.max(rollouts.c.updated_at)).scalar_subquery(),
                select(func.max(devices.c.change)).scalar_subquery(),
            )
        ).one()
    return (*row, deps.reader.watermark())
