"""The forms: dialogs that show what a verb would reach, and the posts that record it.

One code path with the API and the command line: `controller.commands`. Rules:

1. A dialog carries the revision that its numbers belong to. When the rollout has moved since, the
   answer is 412 and the dialog again, with new numbers and what was typed.
2. A refusal (409, 422) is the dialog again with the sentence; nothing was recorded.
3. Above a thousand devices the fleet's name is typed: a number is easily overlooked, a name is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Response
from fastapi.responses import RedirectResponse
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool

from controller import commands, wake
from controller.http import bodies
from controller.http.access import must, must_everywhere
from controller.http.dashboard import blast, rendering
from controller.http.dashboard.rollout import VERBS
from controller.http.dashboard.routes import Page, Scene
from controller.http.dashboard.sights import Eyes, found_rollout
from controller.http.lanes import Lanes
from controller.http.problems import Problem
from controller.http.session import Submitted, submitted
from controller.preview import preview
from controller.roles import Right
from controller.rollout import scope
from controller.rollout.model import ACTIVE
from controller.rollout.waves import plain_steps
from controller.store import lookups, views
from telemetry.store.database import reading

router = APIRouter(include_in_schema=False)
Text = Annotated[str, Query(max_length=128)]
Form = Annotated[Submitted, Depends(submitted)]
_FEW = 2_000  # members of the fleet's rollouts: up to here every dialog looks at each device
_FEW_ROLLOUTS = 60
_COUNTED = 20_000  # devices whose contact a dialog looks up


@router.get("/rollouts/{rollout}/{verb}")
def dialog(page: Page, rollout: str, verb: str, scope: Text = "", exact: bool = False) -> Response:
    return _dialog(page, rollout, verb, {"scope": scope, "exact": "1" if exact else ""})


@router.post("/rollouts/{rollout}/{verb}")
async def act(page: Page, rollout: str, verb: str, form: Form) -> Response:
    page.who = form.who
    lanes: Lanes = page.request.app.state.lanes  # stops have threads of their own
    run = lanes.stopping if verb in ("rollback", "hold", "pause") else run_in_threadpool
    return await run(_act, page, rollout, verb, form.fields)


def _act(page: Scene, rollout: str, verb: str, fields: Mapping[str, str]) -> Response:
    try:
        _record(page, rollout, verb, fields)
    except commands.Refused as refused:
        return _dialog(page, rollout, verb, fields, refused.code, refused.message)
    return RedirectResponse(f"/rollouts/{rendering.segment(rollout)}", 303)


@router.get("/stop")
def stop_dialog(page: Page) -> Response:
    return _stop_dialog(page, {})


@router.post("/stop")
async def stop(page: Page, form: Form) -> Response:
    page.who = form.who
    lanes: Lanes = page.request.app.state.lanes
    return await lanes.stopping(_stop, page, form.fields)


def _stop(page: Scene, fields: Mapping[str, str]) -> Response:
    try:
        said = _record_stop(page, fields)
    except commands.Refused as refused:
        return _stop_dialog(page, fields, refused.code, refused.message)
    if commands.NOTHING in said:  # who wrote it must see that
        return _stop_dialog(page, {}, said=said)
    return RedirectResponse("/oncall", 303)


# -- a rollout's verbs ----------------------------------------------------------------------------


def _dialog(
    page: Scene, rollout: str, verb: str, typed: Mapping[str, str], code: int = 200, why: str = ""
) -> Response:
    """The dialog, with fresh numbers; `why`: what was refused."""
    _known(verb)
    with reading(page.deps.engine) as conn:
        row = found_rollout(Eyes(page.deps, page.book, page.census, page.who, conn), rollout)
        must(page.who, VERBS[verb][1], row.fleet)
        told = lookups.told_members(conn, row.id, _COUNTED) if verb == "rollback" else []
        stops = views.active_stops(conn)
        rollouts, ours = lookups.history_of(conn, row.fleet)
    part: dict[str, Any] | None = None
    try:
        part = _scope(typed.get("scope", ""), verb)
        plan = commands.preview(page.deps.engine, kind=verb, rollout=row.id)
        few = rollouts <= _FEW_ROLLOUTS and ours <= _FEW
        exact = verb == "rollback" and (part or few or typed.get("exact"))
        if exact or verb == "lift":  # of a lift: which holds it ends
            plan = preview(
                page.deps.engine, page.book.seen, kind=verb, rollout=row.id,
                body={"scope": part} if part else {}, now=page.deps.clock(),
            )  # fmt: skip
    except commands.Refused as refused:
        plan, code, why = None, refused.code, refused.message
    seen = page.book.seen()
    away = sum(device not in seen or not seen[device].online for device in told)
    shown = {
        "stops": stops,
        "one": {"id": row.id, "name": row.name, "release": row.release, "fleet": row.fleet},
        "sentence": row.sentence,
        "dialog": None
        if plan is None
        else blast.dialog(verb, plan, row.fleet, away, whole=part is None),
        "revision": row.revision if plan is None else plan["revision"],
        "at": views.when(page.deps.clock()),
        "why": why,
        "stale": code == 412,
        "typed": {name: typed.get(name, "") for name in ("reason", "incident", "name")},
        "scope_given": typed.get("scope", ""),
        "scopes": _scopes(row.pinned, part) if verb in ("rollback", "hold") else (),
        "title": f"{VERBS[verb][0]}: {row.name}",
    }
    return rendering.page(page.request, "dialog.html", page.who, shown, status=code)


def _scopes(pinned: Mapping[str, Any], part: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """What the dialog offers besides everything: the steps, the cohorts, the device asked for."""
    waves = len(plain_steps(pinned)) + (1 if pinned.get("fixes") else 0)
    return [
        *((f"step:{n}", f"step {n + 1} alone") for n in range(waves)),
        *((f"cohort:{name}", f"cohort {name} alone") for name in scope.reached(pinned)),
        *((f"device:{one}", f"device {one} alone") for one in (part or {}).get("devices", ())),
    ]


def _scope(text: str, verb: str) -> dict[str, Any] | None:
    """`step:1`, `cohort:canary`, `device:car-7` → the API's scope; None: everything."""
    if not text:
        return None
    kind, _, value = text.partition(":")
    if verb not in ("rollback", "hold") or kind not in ("step", "cohort", "device"):
        raise commands.Refused(422, f"scope: {text[:80]!r} is none of this dialog's")
    given: dict[str, Any] = {"devices": [value]} if kind == "device" else {kind: value}
    try:
        return scope.checked(given)
    except ValueError as error:
        raise commands.Refused(422, str(error)) from None


def _known(verb: str) -> None:
    if verb not in VERBS:
        raise Problem(404, f"{verb[:40]!r} is nothing that can be done with a rollout")


def _record(page: Scene, rollout: str, verb: str, fields: Mapping[str, str]) -> None:
    _known(verb)
    with reading(page.deps.engine) as conn:
        row = found_rollout(Eyes(page.deps, page.book, page.census, page.who, conn), rollout)
    must(page.who, VERBS[verb][1], row.fleet)
    body = checked(bodies.Verb, {
        "reason": text_of(fields, "reason"),
        "incident": text_of(fields, "incident") or None,
        "if_revision": _whole(fields.get("revision", "")),
    })  # fmt: skip
    part = _scope(fields.get("scope", ""), verb)
    if part is None:
        _name_typed(page, row.id, row.fleet, verb, fields)
    commands.record(
        page.deps.engine,
        kind=verb,
        rollout=row.id,
        body={"scope": part} if part else {},
        actor=page.who.name,
        reason=body.reason,
        incident=body.incident,
        if_revision=body.if_revision,
        now=page.deps.clock(),
    )
    poke(page)


def _name_typed(
    page: Scene, rollout: str, fleet: str, verb: str, fields: Mapping[str, str]
) -> None:
    if verb != "rollback":
        return
    plan = commands.preview(page.deps.engine, kind=verb, rollout=rollout)
    if plan["devices"] > blast.TYPE_THE_NAME and text_of(fields, "name") != fleet:
        raise commands.Refused(422, f"type the fleet's name, {fleet}, to confirm so many devices")


# -- stop -----------------------------------------------------------------------------------------


_STOP_FIELDS = ("scope", "value", "reason", "incident", "lift")


def _stop_dialog(
    page: Scene, typed: Mapping[str, str], code: int = 200, why: str = "", said: str = ""
) -> Response:
    must_everywhere(page.who, Right.STOP, "a stop reaches all of them")
    with reading(page.deps.engine) as conn:
        stops = views.active_stops(conn)
        moving = lookups.in_states(conn, sorted(map(str, ACTIVE)), frozenset(), 100)
    shown = {
        "stops": stops,
        "moving": [{"id": row.id, "name": row.name, "fleet": row.fleet} for row in moving],
        "scopes": commands.SCOPES,
        "may_end": page.who.may_everywhere(Right.START),
        "why": why,
        "said": said,
        "typed": {name: typed.get(name, "") for name in _STOP_FIELDS},
        "title": "Stop",
    }
    return rendering.page(page.request, "stop.html", page.who, shown, status=code)


def _record_stop(page: Scene, fields: Mapping[str, str]) -> str:
    ends = fields.get("lift") == "true"
    must_everywhere(page.who, Right.START if ends else Right.STOP, "a stop reaches all of them")
    body = checked(bodies.Stop, {
        "scope": fields.get("scope", ""),
        "value": text_of(fields, "value"),
        "reason": text_of(fields, "reason"),
        "incident": text_of(fields, "incident") or None,
        "lift": ends,
    })  # fmt: skip
    recorded = commands.record(
        page.deps.engine,
        kind="stop",
        rollout=None,
        body={"scope": body.scope, "value": body.value, **({"lift": True} if ends else {})},
        actor=page.who.name,
        reason=body.reason,
        incident=body.incident,
        if_revision=None,
        now=page.deps.clock(),
    )
    poke(page)
    return recorded.sentence


def checked(kind: Any, data: Mapping[str, Any]) -> Any:
    """A body as the API takes it; raises Refused 422 with the first fault."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        fault = error.errors()[0]
        field = ".".join(str(part) for part in fault["loc"])
        raise commands.Refused(422, f"{field}: {fault['msg']}") from None


def text_of(fields: Mapping[str, str], name: str) -> str:
    """A field of a form, as it was typed."""
    # Browsers send line ends as CR LF, whatever was typed.
    return fields.get(name, "").replace("\r\n", "\n").strip()


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise commands.Refused(412, "the page does not say which revision it showed: look again")
    return int(text)


def poke(page: Scene) -> None:
    """Wake the loop: something was recorded."""
    if page.deps.poke is not None:
        page.deps.poke()
    else:
        wake.poke(page.deps.settings.state_dir)
