"""The routes by which people want something: verbs on rollouts, stop, and the registry.

They record (`controller.commands`, `controller.devices`), wake the loop, and answer. What follows
is the loop's business.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Query, Request, Response
from fastapi.responses import JSONResponse

from controller import commands, wake
from controller import preview as previews
from controller.devices import NewDevice
from controller.http import answers, bodies
from controller.http.access import (
    Principal,
    Right,
    must,
    must_everywhere,
    needs,
    needs_at_once,
)
from controller.http.contract import says
from controller.http.devicebook import DeviceBook
from controller.http.lanes import Lanes
from controller.http.ports import Deps, Given
from controller.http.problems import Problem
from controller.http.reads import find
from controller.manifests.kinds import Fleet
from controller.store import devices as registry_rows
from controller.store import views
from telemetry.store.database import reading

router = APIRouter(prefix="/api/v1")
Stopper = Annotated[Principal, Depends(needs_at_once(Right.STOP))]
Starter = Annotated[Principal, Depends(needs(Right.START))]
Registrar = Annotated[Principal, Depends(needs(Right.DEVICES))]
Plain = dict[str, Any]
DryRun = Annotated[bool, Query(alias="dryRun")]


@dataclass(frozen=True, slots=True)
class Ask:
    """What every verb on a rollout is asked with."""

    rollout: str
    deps: Deps
    request: Request
    dry: bool


async def asked(rollout: str, deps: Given, request: Request, dry: DryRun = False) -> Ask:
    return Ask(rollout, deps, request, dry)


Asked = Annotated[Ask, Depends(asked)]


def does(status: int) -> dict[str, Any]:
    """How a verb is declared: what it records, and what a dry run shows."""
    shown = {200: {"model": answers.Preview, "description": "With `dryRun`: what it would reach"}}
    told = says(answers.Recorded, status)
    return {"status_code": status, **told, "responses": {**told["responses"], **shown}}


STOPS = frozenset({"rollback", "hold", "pause"})
_ETAG = re.compile(r'(?:W/)?"(\d{1,15})"', re.ASCII)


@router.post("/rollouts/{rollout}:rollback", **does(202))
async def rollback(ask: Asked, body: bodies.Verb, who: Stopper) -> Response:
    """Take devices back to what each ran before, and reject the digest. It never waits."""
    return await _stopping("rollback", ask, body, who)


@router.post("/rollouts/{rollout}:hold", **does(202))
async def hold(ask: Asked, body: bodies.Verb, who: Stopper) -> Response:
    """Reject the digest; devices stay as they are."""
    return await _stopping("hold", ask, body, who)


@router.post("/rollouts/{rollout}:pause", **does(202))
async def pause(ask: Asked, body: bodies.Verb, who: Stopper) -> Response:
    """Tell nobody else until `resume`."""
    return await _stopping("pause", ask, body, who)


@router.post("/rollouts/{rollout}:lift", **does(202))
def lift(ask: Asked, body: bodies.Verb, who: Starter) -> Response:
    """End the holds of this rollout's digest: it may be tried again."""
    return _verb("lift", ask, body, who)


@router.post("/rollouts/{rollout}:resume", **does(202))
def resume(ask: Asked, body: bodies.Verb, who: Starter) -> Response:
    """Go on with a paused or inconclusive rollout."""
    return _verb("resume", ask, body, who)


@router.post("/rollouts/{rollout}:promote", **does(202))
def promote(ask: Asked, body: bodies.Verb, who: Starter) -> Response:
    """Pass the pause or the soak of the current step."""
    return _verb("promote", ask, body, who)


@router.post("/stop", **does(202))
async def stop(
    body: bodies.Stop, deps: Given, who: Stopper, request: Request, dry: DryRun = False
) -> Response:  # fmt: skip
    """No new activation anywhere in scope, in any fleet; needs no preview and no If-Match.

    Ending a stop (`lift`) is starting: it needs more.
    """
    lanes: Lanes = request.app.state.lanes
    return await lanes.stopping(_stop, body, deps, who, dry)


def _stop(body: bodies.Stop, deps: Deps, who: Principal, dry: bool) -> Response:
    right = Right.START if body.lift else Right.STOP
    if not who.may(right):
        raise Problem(403, f"{who.name} ({who.roles}) may stop, but not end a stop")
    must_everywhere(who, right, "a stop reaches all of them")
    given = {"scope": body.scope, "value": body.value, **({"lift": True} if body.lift else {})}
    if dry:
        return JSONResponse(commands.preview_stop(deps.engine, given))
    if body.break_glass:
        must_everywhere(who, Right.BREAK_GLASS, "a stop reaches all of them")
    recorded = commands.record(
        deps.engine,
        kind="stop",
        rollout=None,
        body=given,
        actor=who.name,
        reason=body.reason,
        incident=body.incident,
        if_revision=None,
        now=deps.clock(),
        break_glass=body.break_glass,
    )
    _poke(deps)
    return JSONResponse(_recorded(recorded), 202)


@router.post("/devices", status_code=201, **says(answers.Registered, 201))
def register(
    body: Annotated[bodies.Device | list[bodies.Device], Body()], deps: Given, who: Registrar
) -> Plain:
    """Take in one device or many; each gets a one-time token."""
    wanted = body if isinstance(body, list) else [body]
    for device in wanted:
        _own_fleet(who, device.fleet)
    issued = deps.registry.register(
        [NewDevice(id=d.id, fleet=d.fleet, labels=d.labels) for d in wanted],
        actor=who.name,
        now=deps.clock(),
    )
    items = [
        {"device": i.device, "token": i.token, "expiresAt": views.when(i.expires_at)}
        for i in issued
    ]
    _poke(deps)
    warnings = _misfits(deps, wanted)
    return {
        "items": items,
        "warnings": warnings,
        **(items[0] if not isinstance(body, list) else {}),
    }


@router.post("/devices:enrol", **says(answers.Enrolled))
def enrol(body: bodies.Claim, deps: Given) -> Plain:
    """A device claims its place with its one-time token; the token is all it needs."""
    claim = deps.registry.claim(body.token, now=deps.clock())
    _poke(deps)
    return {
        "device": claim.device,
        "fleet": claim.fleet,
        "broker": {
            "url": deps.settings.broker,
            "username": claim.device,
            "password": claim.password,
        },
        "keys": [{"keyid": deps.key.keyid, "public": deps.key.public_hex}],
        "server": deps.settings.public_url,
    }


@router.post("/devices/{device}:move", **says(answers.DeviceChanged))
def move(device: str, body: bodies.Move, deps: Given, who: Registrar) -> Plain:
    _own_device(deps, who, device)
    _own_fleet(who, body.fleet)
    deps.registry.move(
        device,
        fleet=body.fleet,
        labels=body.labels,
        actor=who.name,
        reason=body.reason,
        now=deps.clock(),
    )
    return _changed(deps, device)


@router.post("/devices/{device}:retire", **says(answers.DeviceChanged))
def retire(device: str, body: bodies.Why, deps: Given, who: Registrar) -> Plain:
    _own_device(deps, who, device)
    deps.registry.retire(device, actor=who.name, reason=body.reason, now=deps.clock())
    return _changed(deps, device)


@router.post("/devices/{device}:quarantine", **says(answers.DeviceChanged))
def quarantine(device: str, body: bodies.Why, deps: Given, who: Registrar) -> Plain:
    _own_device(deps, who, device)
    deps.registry.quarantine(device, actor=who.name, reason=body.reason, now=deps.clock())
    return _changed(deps, device)


@router.post("/devices/{device}:replace", **says(answers.DeviceChanged))
def replace(device: str, body: bodies.Why, deps: Given, who: Registrar) -> Plain:
    _own_device(deps, who, device)
    issued = deps.registry.replace(device, actor=who.name, reason=body.reason, now=deps.clock())
    return {
        **_changed(deps, device),
        "token": issued.token,
        "expiresAt": views.when(issued.expires_at),
    }


async def _stopping(kind: str, ask: Ask, body: bodies.Verb, who: Principal) -> Response:
    lanes: Lanes = ask.request.app.state.lanes
    return await lanes.stopping(_verb, kind, ask, body, who)


def _verb(kind: str, ask: Ask, body: bodies.Verb, who: Principal) -> Response:
    """The one way of every verb: find, may, seen?, preview or record, wake the loop."""
    deps = ask.deps
    with reading(deps.engine) as conn:
        row = find(conn, ask.rollout, who)
    must(who, Right.STOP if kind in STOPS else Right.START, row.fleet)
    if ask.dry:
        return _preview(kind, ask, row, body)
    if body.break_glass:
        must(who, Right.BREAK_GLASS, row.fleet)
    recorded = commands.record(
        deps.engine,
        kind=kind,
        rollout=row.id,
        body=_wants(kind, body),
        actor=who.name,
        reason=body.reason,
        incident=body.incident,
        if_revision=_seen_revision(ask.request, body, row.revision),
        now=deps.clock(),
        break_glass=body.break_glass,
    )
    _poke(deps)
    answer = {**_recorded(recorded), "rollout": row.id}
    return JSONResponse(answer, 202, {"ETag": f'"{recorded.revision}"'})


def _preview(kind: str, ask: Ask, row: Any, body: bodies.Verb) -> Response:
    """What it would reach; its ETag belongs to the POST that follows."""
    book: DeviceBook = ask.request.app.state.book
    shown = previews.preview(
        ask.deps.engine,
        book.seen,
        kind=kind,
        rollout=row.id,
        body=_wants(kind, body),
        now=ask.deps.clock(),
    )
    shown["at"] = views.when(shown["at"])
    return JSONResponse(shown, headers={"ETag": f'"{row.revision}"'})


def _wants(kind: str, body: bodies.Verb) -> Plain:
    given = {"to": body.to, "hold": body.hold, "scope": body.scope}
    if body.scope is not None and kind not in ("rollback", "hold"):
        raise Problem(422, f"{kind} is of the whole rollout: leave its scope out", pointer="/scope")
    return {name: value for name, value in given.items() if value is not None}


def _seen_revision(request: Request, body: bodies.Verb, current: int) -> int | None:
    """The revision that the person has seen; None when any will do (`If-Match: *`)."""
    header = request.headers.get("if-match")
    if header is None or not header.strip():
        if body.if_revision is None:
            raise Problem(
                428,
                f'If-Match is missing: send the ETag that you have seen ("{current}" now), or *',
            )
        return body.if_revision
    if header.strip() == "*":
        return body.if_revision
    # RFC 9110: a list of what the asker would take; one of them must be the current one.
    seen = [_ETAG.fullmatch(tag.strip()) for tag in header.split(",")]
    known = [int(match[1]) for match in seen if match is not None]
    if not known:
        raise Problem(412, f"If-Match {header[:40]!r} is no revision of a rollout; it is {current}")
    return current if current in known else known[-1]


def _recorded(recorded: commands.Recorded) -> Plain:
    return {
        "id": recorded.id,
        "revision": recorded.revision,
        "state": recorded.state,
        "sentence": recorded.sentence,
        **({"digest": recorded.digest} if recorded.digest else {}),
    }


def _poke(deps: Deps) -> None:
    if deps.poke is not None:
        deps.poke()
    else:
        wake.poke(deps.settings.state_dir)


def _misfits(deps: Deps, wanted: list[bodies.Device]) -> list[str]:
    """Devices whose labels their fleet's selector does not match: taken in, but said aloud.

    Compared with the fleet as its newest rollout pinned it; a newer commit may already differ.
    """
    with reading(deps.engine) as conn:
        pinned = {name: views.pinned_of_fleet(conn, name) for name in {d.fleet for d in wanted}}
    fleets = {name: Fleet.model_validate(plain["fleet"]) for name, plain in pinned.items() if plain}
    return [
        f"{d.id}: its labels do not match the selector of fleet {d.fleet}"
        for d in wanted
        if d.fleet in fleets and not fleets[d.fleet].selector.matches(d.labels)
    ]


def _own_fleet(who: Principal, fleet: str) -> None:
    must(who, Right.DEVICES, fleet)


def _own_device(deps: Deps, who: Principal, device: str) -> None:
    with reading(deps.engine) as conn:
        row = registry_rows.get(conn, device)
    if row is None or not who.sees(row.fleet):
        raise Problem(404, f"device {device[:80]!r}: unknown")
    must(who, Right.DEVICES, row.fleet)


def _changed(deps: Deps, device: str) -> Plain:
    _poke(deps)
    with reading(deps.engine) as conn:
        row = registry_rows.get(conn, device)
    assert row is not None  # noqa: S101 - it was changed a moment ago
    return {"device": row.id, "fleet": row.fleet, "status": row.status, "labels": row.labels}
