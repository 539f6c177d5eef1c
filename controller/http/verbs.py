"""The routes by which people want something: verbs on rollouts, stop, and the registry.

They record (`controller.commands`, `controller.devices`), wake the loop, and answer. What follows
is the loop's business.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Query, Request, Response

from controller import commands, wake
from controller.devices import NewDevice
from controller.http import bodies
from controller.http.access import Principal, Right, must, must_everywhere, needs
from controller.http.ports import Deps, Given
from controller.http.problems import Problem
from controller.http.reads import find
from controller.manifests.kinds import Fleet
from controller.store import devices as registry_rows
from controller.store import views
from telemetry.store.database import reading

router = APIRouter(prefix="/api/v1")
Stopper = Annotated[Principal, Depends(needs(Right.STOP))]
Starter = Annotated[Principal, Depends(needs(Right.START))]
Registrar = Annotated[Principal, Depends(needs(Right.DEVICES))]
Plain = dict[str, Any]
DryRun = Annotated[bool, Query(alias="dryRun")]
STOPS = frozenset({"rollback", "hold", "pause"})
_ETAG = re.compile(r'(?:W/)?"(\d{1,15})"')


@router.post("/rollouts/{rollout}:rollback", status_code=202)
def rollback(
    rollout: str, body: bodies.Verb, deps: Given, who: Stopper, request: Request,
    response: Response, dry: DryRun = False,
) -> Plain:  # fmt: skip
    return _verb("rollback", rollout, body, deps, who, request, response, dry)


@router.post("/rollouts/{rollout}:hold", status_code=202)
def hold(
    rollout: str, body: bodies.Verb, deps: Given, who: Stopper, request: Request,
    response: Response, dry: DryRun = False,
) -> Plain:  # fmt: skip
    return _verb("hold", rollout, body, deps, who, request, response, dry)


@router.post("/rollouts/{rollout}:pause", status_code=202)
def pause(
    rollout: str, body: bodies.Verb, deps: Given, who: Stopper, request: Request,
    response: Response, dry: DryRun = False,
) -> Plain:  # fmt: skip
    return _verb("pause", rollout, body, deps, who, request, response, dry)


@router.post("/rollouts/{rollout}:lift", status_code=202)
def lift(
    rollout: str, body: bodies.Verb, deps: Given, who: Starter, request: Request,
    response: Response, dry: DryRun = False,
) -> Plain:  # fmt: skip
    return _verb("lift", rollout, body, deps, who, request, response, dry)


@router.post("/rollouts/{rollout}:resume", status_code=202)
def resume(
    rollout: str, body: bodies.Verb, deps: Given, who: Starter, request: Request,
    response: Response, dry: DryRun = False,
) -> Plain:  # fmt: skip
    return _verb("resume", rollout, body, deps, who, request, response, dry)


@router.post("/rollouts/{rollout}:promote", status_code=202)
def promote(
    rollout: str, body: bodies.Verb, deps: Given, who: Starter, request: Request,
    response: Response, dry: DryRun = False,
) -> Plain:  # fmt: skip
    return _verb("promote", rollout, body, deps, who, request, response, dry)


@router.post("/stop", status_code=202)
def stop(body: bodies.Stop, deps: Given, who: Stopper) -> Plain:
    """No new activation anywhere in scope. Ending a stop (`lift`) is starting: it needs more."""
    right = Right.START if body.lift else Right.STOP
    if not who.may(right):
        raise Problem(403, f"{who.name} ({who.roles}) may stop, but not end a stop")
    must_everywhere(who, right, "a stop reaches all of them")
    recorded = commands.record(
        deps.engine,
        kind="stop",
        rollout=None,
        body={"scope": body.scope, "value": body.value, **({"lift": True} if body.lift else {})},
        actor=who.name,
        reason=body.reason,
        incident=None,
        if_revision=None,
        now=deps.clock(),
    )
    _poke(deps)
    return _recorded(recorded)


@router.post("/devices", status_code=201)
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


@router.post("/devices:enrol")
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


@router.post("/devices/{device}:move")
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


@router.post("/devices/{device}:retire")
def retire(device: str, body: bodies.Why, deps: Given, who: Registrar) -> Plain:
    _own_device(deps, who, device)
    deps.registry.retire(device, actor=who.name, reason=body.reason, now=deps.clock())
    return _changed(deps, device)


@router.post("/devices/{device}:quarantine")
def quarantine(device: str, body: bodies.Why, deps: Given, who: Registrar) -> Plain:
    _own_device(deps, who, device)
    deps.registry.quarantine(device, actor=who.name, reason=body.reason, now=deps.clock())
    return _changed(deps, device)


@router.post("/devices/{device}:replace")
def replace(device: str, body: bodies.Why, deps: Given, who: Registrar) -> Plain:
    _own_device(deps, who, device)
    issued = deps.registry.replace(device, actor=who.name, reason=body.reason, now=deps.clock())
    return {
        **_changed(deps, device),
        "token": issued.token,
        "expiresAt": views.when(issued.expires_at),
    }


def _verb(
    kind: str,
    rollout: str,
    body: bodies.Verb,
    deps: Deps,
    who: Principal,
    request: Request,
    response: Response,
    dry: bool,
) -> Plain:
    with reading(deps.engine) as conn:
        row = find(conn, rollout, who)
    must(who, Right.STOP if kind in STOPS else Right.START, row.fleet)
    if dry:
        response.status_code = 200
        response.headers["ETag"] = f'"{row.revision}"'
        return commands.preview(deps.engine, kind=kind, rollout=row.id)
    recorded = commands.record(
        deps.engine,
        kind=kind,
        rollout=row.id,
        body={k: v for k, v in (("to", body.to), ("hold", body.hold)) if v is not None},
        actor=who.name,
        reason=body.reason,
        incident=body.incident,
        if_revision=_seen_revision(request, body, row.revision),
        now=deps.clock(),
    )
    _poke(deps)
    response.headers["ETag"] = f'"{recorded.revision}"'
    return {**_recorded(recorded), "rollout": row.id}


def _seen_revision(request: Request, body: bodies.Verb, current: int) -> int | None:
    """The revision that the person has seen; None when any will do (`If-Match: *`)."""
    header = request.headers.get("if-match")
    if header is None:
        if body.if_revision is None:
            raise Problem(
                428,
                f'If-Match is missing: send the ETag that you have seen ("{current}" now), or *',
            )
        return body.if_revision
    if header.strip() == "*":
        return body.if_revision
    match = _ETAG.fullmatch(header.strip())
    if match is None:
        raise Problem(412, f"If-Match {header[:40]!r} is no revision of a rollout; it is {current}")
    return int(match[1])


def _recorded(recorded: commands.Recorded) -> Plain:
    return {
        "id": recorded.id,
        "revision": recorded.revision,
        "state": "recorded",
        "sentence": recorded.sentence,
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
