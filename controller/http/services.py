"""The routes for machines: orders and artifacts for devices, webhooks, probes, events.

A device's fallback is here too: when the broker is away, its order can be fetched over HTTPS with
the device's own credentials — its own order, nobody else's.
"""

from __future__ import annotations

import hmac
import os
import re
import tempfile
from collections.abc import AsyncIterator
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import FileResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from sqlalchemy import func, insert, select
from starlette.concurrency import run_in_threadpool

from controller import audit, wake
from controller.artifacts import Unfit
from controller.http import answers
from controller.http.access import (
    Principal,
    Right,
    device_or_viewer,
    needs,
)
from controller.http.bodies import Id
from controller.http.contract import raw, says
from controller.http.events import Events, stream
from controller.http.ports import Deps, Given
from controller.http.problems import Problem
from controller.store import devices as registry_rows
from controller.store import handout, views
from controller.store.tables import artifacts, desired, devices, holds, rollouts
from device_agent.protocol import DIGEST
from telemetry import metrics
from telemetry.store.database import reading, writing

router = APIRouter()
api = APIRouter(prefix="/api/v1")
Caller = Annotated[str | None, Depends(device_or_viewer)]
Publisher = Annotated[Principal, Depends(needs(Right.PUBLISH))]
Viewer = Annotated[Principal, Depends(needs(Right.VIEW))]
Version = Annotated[str, Query(max_length=64, pattern=r"^[0-9A-Za-z][0-9A-Za-z.+_-]{0,63}$")]
EVENTS_LAST = 60.0  # seconds; then the client comes again with Last-Event-ID
EVENTS_BEAT = 10.0  # seconds of silence before a sign of life


@api.get("/devices/{device}/desired", **raw("application/json", 204))
def desired_state(device: str, deps: Given, caller: Caller) -> Response:
    """The signed order as it was published; 204 when there is none, or none that still holds."""
    if caller is not None and caller != device:
        raise Problem(403, "a device reads its own order alone")
    with reading(deps.engine) as conn:
        row = registry_rows.get(conn, device)
        body = handout.order(conn, row, deps.reader) if row is not None else None
    if row is None:
        raise Problem(404, f"device {device[:80]!r}: unknown")
    if body is None:
        return Response(status_code=204)
    return Response(body, media_type="application/json", headers={"Cache-Control": "no-store"})


@api.get("/artifacts/{digest}", include_in_schema=False)
@router.get("/artifacts/{digest}", **raw("application/octet-stream", 206, 416))
def artifact(digest: str, deps: Given, caller: Caller) -> Response:
    """The bytes of an artifact; Range and If-Range with the digest as ETag."""
    if not DIGEST.fullmatch(digest):
        raise Problem(404, "artifacts are named sha256:<64 hex digits>")
    try:
        path = Path(deps.content.path(digest))
        known = path.is_file()
    except (OSError, KeyError, ValueError):
        known = False
    if not known:
        raise Problem(404, f"{digest}: not stored here; `bellwether release publish` stores it")
    return FileResponse(
        path,
        media_type="application/octet-stream",
        headers={"ETag": f'"{digest}"', "Cache-Control": "public, max-age=31536000, immutable"},
    )


@api.post(
    "/releases:publish",
    status_code=201,
    **says(answers.Published, 201),
    openapi_extra={
        "requestBody": {
            "required": True,
            "description": "The artifact's bytes",
            "content": {
                "application/octet-stream": {"schema": {"type": "string", "format": "binary"}}
            },
        }
    },
)
async def publish(
    request: Request,
    deps: Given,
    who: Publisher,
    component: Annotated[Id, Query()],
    version: Version,
    name: Annotated[Id | None, Query()] = None,
) -> dict[str, Any]:
    """Store an artifact (the body) and answer the Release document that names it."""
    descriptor, aside = tempfile.mkstemp(prefix="upload-", dir=deps.settings.state_dir)
    try:
        with os.fdopen(descriptor, "wb") as file:
            async for part in request.stream():
                await run_in_threadpool(file.write, part)
        return await run_in_threadpool(_store, deps, Path(aside), component, version, name, who)
    finally:
        Path(aside).unlink(missing_ok=True)


def _store(
    deps: Deps, file: Path, component: str, version: str, name: str | None, who: Principal
) -> dict[str, Any]:
    if not file.stat().st_size:
        raise Problem(422, "the body is empty: send the artifact's bytes")
    try:
        digest, size = deps.content.add(file)
    except Unfit as error:
        raise Problem(422, f"the bundle is unsafe: {error}") from None
    now = deps.clock()
    with writing(deps.engine) as conn:
        known = conn.execute(select(artifacts.c.digest).where(artifacts.c.digest == digest)).first()
        if known is None:
            conn.execute(
                insert(artifacts).values(
                    digest=digest, size=size, component=component, version=version, stored_at=now
                )
            )
        audit.append(
            conn,
            at=now,
            actor=who.name,
            action="release.publish",
            subject=digest,
            detail={"component": component, "version": version, "size": size},
        )
    document = {
        "apiVersion": "bellwether.dev/v1",
        "kind": "Release",
        "metadata": {
            "name": name or re.sub(r"[^a-z0-9._-]", "-", f"{component}-{version}".lower())
        },
        "spec": {
            "version": version,
            "artifacts": [
                {
                    "component": component,
                    "digest": digest,
                    "size": size,
                    "url": f"{deps.settings.public_url}/artifacts/{digest}",
                }
            ],
        },
    }
    return {"digest": digest, "size": size, "document": document}


@router.post("/webhooks/git", status_code=202, **says(answers.State, 202))
async def git_webhook(request: Request, deps: Given) -> dict[str, str]:
    """The Git host says that there is something new: look now. Nothing of the body is believed."""
    file = deps.settings.webhook_secret_file
    if file is None:
        raise Problem(404, "no webhook: start with --webhook-secret-file FILE")
    secret = (await run_in_threadpool(Path(file).read_bytes)).strip()
    body = await request.body()
    signed = "sha256=" + hmac.new(secret, body, sha256).hexdigest()
    given = request.headers.get("x-hub-signature-256", "")
    token = request.headers.get("x-gitlab-token", "")
    right = hmac.compare_digest(signed.encode(), given.encode()) or hmac.compare_digest(
        secret, token.encode()
    )
    if not secret or not right:
        raise Problem(401, "the signature does not match the webhook's secret")
    await run_in_threadpool(deps.poke or (lambda: wake.poke(deps.settings.state_dir)))
    return {"state": "looking"}


async def event_start(request: Request, who: Viewer) -> int:
    """The event after which the stream begins."""
    last = request.headers.get("last-event-id", "")
    if last and not (last.isascii() and last.isdigit() and len(last) < 16):
        raise Problem(
            400, "Last-Event-ID: a number of one of our events", pointer="header/last-event-id"
        )
    events: Events = request.app.state.events
    return int(last) if last else await events.head()


@api.get("/events", response_class=EventSourceResponse)
async def events(
    request: Request, who: Viewer, start: Annotated[int, Depends(event_start)]
) -> AsyncIterator[ServerSentEvent]:
    """What was recorded, as it is recorded; resume with Last-Event-ID.

    `id` is the number of the audit row, `event` its action (`verdict:roll_back`, `rollback`, …),
    `data` the row. Who may see some fleets hears of these alone. A stream ends after a minute; the
    client comes again by itself.
    """
    yield ServerSentEvent(retry=1000)
    hub: Events = request.app.state.events
    async for row in stream(hub, start, who, lasts=EVENTS_LAST, beat=EVENTS_BEAT):
        if row is None:
            yield ServerSentEvent(comment="still here")
            continue
        yield ServerSentEvent(id=str(row.seq), event=row.action, raw_data=row.text)


@router.get("/livez", **says(answers.State))
def alive() -> dict[str, str]:
    return {"state": "alive"}


@router.get("/readyz", **says(answers.State))
def ready(deps: Given) -> dict[str, str]:
    """Both stores answer. A broker or a Git that is away does not make us unready."""
    try:
        with reading(deps.engine) as conn:
            views.value(conn, "term")
        deps.reader.watermark()
    except Exception as error:
        raise Problem(503, f"a database does not answer: {type(error).__name__}") from error
    return {"state": "ready"}


@router.get("/metrics", **raw("text/plain"))
def prometheus(request: Request, deps: Given, who: Viewer) -> Response:
    with reading(deps.engine) as conn:
        for state, count in conn.execute(
            select(rollouts.c.state, func.count()).group_by(rollouts.c.state)
        ):
            metrics.gauge("bellwether_rollouts", count, state=state)
        for status, count in conn.execute(
            select(devices.c.status, func.count()).group_by(devices.c.status)
        ):
            metrics.gauge("bellwether_devices", count, status=status)
        pending = select(func.count()).where(desired.c.published.is_(False))
        metrics.gauge("bellwether_orders_pending", conn.execute(pending).scalar_one())
        unrecorded = select(func.count()).where(
            holds.c.commit.is_(None) | (holds.c.lift.is_not(None) & holds.c.lift_commit.is_(None))
        )
        metrics.gauge("bellwether_holds_unrecorded", conn.execute(unrecorded).scalar_one())
        head = audit.head(conn)
        metrics.gauge("bellwether_audit_records", head[0] if head else 0)
        metrics.gauge("bellwether_audit_head", int(head[1][:12], 16) if head else 0)
        _git_metrics(views.value(conn, "git") or {})
    _refusal_metrics(request, deps)
    return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _refusal_metrics(request: Request, deps: Deps) -> None:
    """What the ingest refused: counted by its own process, kept in the store, added here."""
    refusals = getattr(deps.reader, "refusals", None)
    if refusals is None or metrics.shared():
        return
    shown: dict[str, int] = request.app.state.refused
    for reason, number in refusals().items():
        metrics.count(
            "bellwether_ingest_refused_total", max(0, number - shown.get(reason, 0)), reason=reason
        )
        shown[reason] = number


def _git_metrics(state: dict[str, Any]) -> None:
    metrics.gauge("bellwether_git_head_time_seconds", state.get("accepted_at") or 0.0)
    found = [problem.get("severity", "error") for problem in state.get("problems", ())]
    for severity in ("error", "notice"):
        metrics.gauge("bellwether_manifest_problems", found.count(severity), severity=severity)
