"""Records what a person wants: rollback, hold, lift, pause, resume, promote, stop.

One transaction of O(1) rows — command, hold or lift, new revision, audit — however large the fleet
is; what a person asked for is safe from there, and a hold is in force from there. The loop, woken
at once, decides and acts. Git is not on this path, telemetry neither.

Rules, in order: an unknown rollout is 404; a revision that is not the one seen is 412; what the
rollout's state does not allow is 409; a stop, a pause, a hold and a rollback need a reason.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Engine, func, insert, select, update

from controller import audit, ulid
from controller.rollout.model import ACTIVE, RolloutState
from controller.store.tables import commands, holds, members, releases, rollouts, stops
from telemetry.store.database import reading, writing

KINDS = ("rollback", "hold", "lift", "pause", "resume", "promote", "stop")
SCOPES = ("all", "product", "hardware", "digest")

_ALLOWED: Mapping[str, frozenset[RolloutState]] = {
    "rollback": frozenset(RolloutState) - {RolloutState.ROLLED_BACK, RolloutState.ROLLING_BACK},
    "hold": frozenset(RolloutState)
    - {RolloutState.ROLLED_BACK, RolloutState.ROLLING_BACK, RolloutState.HELD},
    "lift": frozenset(RolloutState),
    "pause": ACTIVE - {RolloutState.PAUSED},
    "resume": frozenset({RolloutState.PAUSED, RolloutState.INCONCLUSIVE}),
    "promote": ACTIVE,
}


def allowed(kind: str, state: str) -> bool:
    """Does a rollout in this state take this verb?"""
    return state in _ALLOWED.get(kind, frozenset())


class Refused(Exception):
    """A command that was not recorded. `code`: HTTP status; `pointer`: field of the body."""

    def __init__(self, code: int, message: str, pointer: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.pointer = pointer


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    id: str
    revision: int
    sentence: str


def record(
    engine: Engine,
    *,
    kind: str,
    rollout: str | None,
    body: Mapping[str, Any],
    actor: str,
    reason: str,
    incident: str | None,
    if_revision: int | None,
    now: float,
) -> Recorded:
    """Record one command; raises Refused. `rollout` is an id or a manifest's name (its newest)."""
    if kind not in KINDS:
        raise Refused(404, f"{kind}: unknown; one of {', '.join(KINDS)}")
    if kind in ("rollback", "hold", "stop", "lift") and not reason.strip():
        raise Refused(
            422, f"{kind}: say why (reason): it stands in the audit and in Git", "/reason"
        )
    with writing(engine) as conn:
        command = ulid.new(now, secrets.token_bytes(10))
        if kind == "stop":
            row, sentence = None, _stop(conn, command, body, actor, reason, now)
        else:
            row = _find(conn, rollout)
            _check(row, kind, if_revision)
            sentence = _apply(conn, kind, row, body, actor, reason, incident, now)
        conn.execute(
            insert(commands).values(
                id=command,
                kind=kind,
                rollout=row["id"] if row else None,
                body=dict(body),
                actor=actor,
                reason=reason,
                incident=incident,
                at=now,
                state="recorded",
            )
        )
        revision = _bump(conn, row, now)
        audit.append(
            conn,
            at=now,
            actor=actor,
            action=kind,
            subject=row["name"] if row else str(body.get("scope")),
            detail={"command": command, "reason": reason, "incident": incident, **dict(body)},
        )
    return Recorded(id=command, revision=revision, sentence=sentence)


def preview(engine: Engine, *, kind: str, rollout: str) -> dict[str, Any]:
    """The blast radius of a verb on this rollout, without doing it; raises Refused."""
    with reading(engine) as conn:
        row = _find(conn, rollout)
        _check(row, kind, None)
        counted = conn.execute(
            select(members.c.state, func.count())
            .where(members.c.rollout == row["id"], members.c.arm != "control")
            .group_by(members.c.state)
        )
        states = {state: n for state, n in counted}
    told = sum(n for state, n in states.items() if state not in ("drawn", "left"))
    return {
        "kind": kind,
        "rollout": row["id"],
        "name": row["name"],
        "release": row["release"],
        "revision": row["revision"],
        "members": states,
        "devices": told if kind in ("rollback", "hold") else sum(states.values()),
        "sentence": f"{kind} {row['release']}: {told} devices were told it, "
        f"{states.get('drawn', 0)} more would not be told",
    }


def preview_stop(engine: Engine, body: Mapping[str, Any]) -> dict[str, Any]:
    """The active rollouts whose devices a stop would reach, or its end set free; raises Refused."""
    scope, value = _scope(body)
    with reading(engine) as conn:
        rows = conn.execute(
            select(rollouts.c.id, rollouts.c.name, rollouts.c.fleet, rollouts.c.artifacts).where(
                rollouts.c.state.in_([str(state) for state in ACTIVE])
            )
        ).all()
    if scope == "digest":
        rows = [row for row in rows if value in row.artifacts.values()]
    where = f"{scope} {value}".strip()
    verb = "ends the stop of" if body.get("lift") else "no new activation in"
    return {
        "kind": "stop",
        "scope": scope,
        "value": value,
        "rollouts": [{"id": row.id, "name": row.name, "fleet": row.fleet} for row in rows],
        "sentence": f"{verb} {where}: {len(rows)} active rollouts may be concerned",
    }


def _find(conn: Connection, rollout: str | None) -> Mapping[str, Any]:
    match = conn.execute(
        select(rollouts)
        .where((rollouts.c.id == rollout) | (rollouts.c.name == rollout))
        .order_by(rollouts.c.opened_at.desc(), rollouts.c.id.desc())
        .limit(1)
    ).first()
    if match is None:
        raise Refused(404, f"rollout {rollout!r}: unknown; `bellwether status` lists them")
    return dict(match._mapping)


def _check(row: Mapping[str, Any], kind: str, if_revision: int | None) -> None:
    if if_revision is not None and if_revision != row["revision"]:
        raise Refused(
            412,
            f"{row['name']}: revision {if_revision} is stale, it is {row['revision']} now: "
            f"{row['sentence']}; look again, then repeat",
        )
    if row["state"] not in _ALLOWED.get(kind, frozenset()):
        raise Refused(409, f"{row['name']}: {kind} is not possible while it is {row['state']}")


def _bump(conn: Connection, row: Mapping[str, Any] | None, now: float) -> int:
    if row is None:
        return 0
    revision = int(row["revision"]) + 1
    conn.execute(
        update(rollouts)
        .where(rollouts.c.id == row["id"])
        .values(revision=rollouts.c.revision + 1, updated_at=now)
    )
    return revision


def _apply(
    conn: Connection,
    kind: str,
    row: Mapping[str, Any],
    body: Mapping[str, Any],
    actor: str,
    reason: str,
    incident: str | None,
    now: float,
) -> str:
    if kind in ("rollback", "hold"):
        hold = add_hold(
            conn,
            row,
            to=_destination(conn, body) if kind == "rollback" else "stay",
            actor=actor,
            reason=reason,
            incident=incident,
            now=now,
        )
        return f"{row['release']} is rejected by hold {hold}; devices: {kind}"
    if kind == "lift":
        return _lift(conn, row, body, actor, reason, now)
    return f"{kind} {row['name']} ({row['release']}) recorded"


def _destination(conn: Connection, body: Mapping[str, Any]) -> str:
    to = str(body.get("to") or "previous")
    if to in ("previous", "stay"):
        return to
    if conn.execute(select(releases.c.name).where(releases.c.name == to)).first() is None:
        raise Refused(
            422, f"to: {to!r} is no known release; leave it out for each one's previous", "/to"
        )
    return to


def add_hold(
    conn: Connection,
    row: Mapping[str, Any],
    *,
    to: str,
    actor: str,
    reason: str,
    incident: str | None,
    now: float,
) -> str:
    """Reject a rollout's digest from this transaction on; answers the hold's id.

    It rejects the release digest and every artifact in it that differs from the release before.
    """
    hold = ulid.new(now, secrets.token_bytes(10))
    before = dict((row["flags"] or {}).get("before", {}))
    changed = [d for c, d in row["artifacts"].items() if before.get(c) != d]
    conn.execute(
        insert(holds).values(
            id=hold,
            rollout=row["name"],
            fleet=row["fleet"],
            release=row["release"],
            digest=row["digest"],
            artifacts=changed or list(row["artifacts"].values()),
            to=to,
            scope={"all": True},
            reason=reason,
            actor=actor,
            incident=incident,
            created_at=now,
        )
    )
    return hold


def _lift(
    conn: Connection,
    row: Mapping[str, Any],
    body: Mapping[str, Any],
    actor: str,
    reason: str,
    now: float,
) -> str:
    wanted = [holds.c.rollout == row["name"], holds.c.lifted_at.is_(None)]
    if body.get("hold"):
        wanted.append(holds.c.id == str(body["hold"]))
    found = [hold for (hold,) in conn.execute(select(holds.c.id).where(*wanted))]
    if not found:
        raise Refused(409, f"{row['name']}: no hold is in force, nothing to lift")
    for hold in found:
        conn.execute(
            update(holds)
            .where(holds.c.id == hold)
            .values(
                lift=ulid.new(now, secrets.token_bytes(10)),
                lifted_at=now,
                lifted_by=actor,
                lift_reason=reason,
            )
        )
    return f"{row['name']}: lifted {', '.join(found)}; the digest may be tried again"


def _stop(
    conn: Connection, command: str, body: Mapping[str, Any], actor: str, reason: str, now: float
) -> str:
    scope, value = _scope(body)
    if body.get("lift"):
        lifted = conn.execute(
            update(stops)
            .where(stops.c.scope == scope, stops.c.value == value, stops.c.lifted_at.is_(None))
            .values(lifted_at=now, lifted_by=actor)
        )
        if not lifted.rowcount:
            raise Refused(409, f"no stop of {scope} {value} is in force".replace("  ", " "))
        return f"the stop of {scope} {value} has ended"
    conn.execute(
        insert(stops).values(
            id=command, scope=scope, value=value, reason=reason, actor=actor, at=now
        )
    )
    return f"stopped: no new activation in {scope} {value}".rstrip()


def _scope(body: Mapping[str, Any]) -> tuple[str, str]:
    scope, value = str(body.get("scope", "all")), str(body.get("value") or "")
    if scope not in SCOPES:
        known = ", ".join(SCOPES)
        raise Refused(422, f"scope: {scope!r} is unknown; one of {known}", "/scope")
    if scope != "all" and not value:
        raise Refused(422, f"value: say which {scope}", "/value")
    return scope, "" if scope == "all" else value
