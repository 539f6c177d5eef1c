"""Records what a person wants: rollback, hold, lift, pause, resume, promote, stop.

One transaction of O(1) rows — command, hold or lift, new revision, audit — however large the fleet
is; what a person asked for is safe from there, and a hold is in force from there. The loop, woken
at once, decides and acts. Git is not on this path, telemetry neither.

Rules, in order: a stop, a hold, a rollback and a lift need a reason, of text that may stand in Git;
an unknown rollout is 404; a revision that is not the one seen is 412; what the rollout's state does
not allow is 409.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Engine, func, insert, select, update

from controller import audit, ballast, ulid
from controller.rollout import scope as scopes
from controller.rollout.model import ACTIVE, RolloutState
from controller.store import approvals
from controller.store import stops as stop_rows
from controller.store.devices import get_many
from controller.store.tables import commands, holds, members, releases, rollouts, stops
from telemetry.store.database import reading, writing

KINDS = ("rollback", "hold", "lift", "pause", "resume", "promote", "stop")
RULED = {"promote": "widen", "lift": "lift", "stop": "lift"}  # kind → the rule that it falls under
SCOPES = ("all", "product", "hardware", "digest")
REASON = 2000  # characters
CONTROLS = r"\x00-\x08\x0b-\x1f\x7f-\x9f"  # all but tab and line feed
NOTHING = "NOTHING that we know is in it"  # of a stop, said after it was recorded

_ALLOWED: Mapping[str, frozenset[RolloutState]] = {
    "rollback": frozenset(RolloutState) - {RolloutState.ROLLED_BACK, RolloutState.ROLLING_BACK},
    "hold": frozenset(RolloutState)
    - {RolloutState.ROLLED_BACK, RolloutState.ROLLING_BACK, RolloutState.HELD},
    "lift": frozenset(RolloutState),
    "pause": ACTIVE - {RolloutState.PAUSED},
    "resume": frozenset({RolloutState.PAUSED, RolloutState.INCONCLUSIVE}),
    "promote": ACTIVE,
}


def allowed(kind: str, state: str, flags: Mapping[str, Any] | None = None) -> bool:
    """Does a rollout in this state take this verb? A way back that is frozen can be resumed."""
    if kind == "resume" and state == RolloutState.ROLLING_BACK:
        return bool((flags or {}).get("frozen"))
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
    state: str = "recorded"  # or `awaiting`: a second person's word is asked for
    digest: str | None = None  # of what that person is asked to approve


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
    break_glass: bool = False,
) -> Recorded:
    """Record one command; raises Refused. `rollout` is an id or a manifest's name (its newest).

    What the fleet's rule gives to two people is asked for instead (`state: awaiting`), unless
    `break_glass`. Whether this actor may break the glass is the caller's to know.
    """
    if kind not in KINDS:
        raise Refused(404, f"{kind}: unknown; one of {', '.join(KINDS)}")
    if (kind in ("rollback", "hold", "stop", "lift") or break_glass) and not reason.strip():
        raise Refused(
            422, f"{kind}: say why (reason): it stands in the audit and in Git", "/reason"
        )
    _writable("reason", reason, REASON)
    _writable("incident", incident or "", 128)

    def write() -> Recorded:
        with writing(engine) as conn:
            row = None if kind == "stop" else found(conn, rollout)
            if row is not None:
                _check(row, kind, if_revision)
            needs = _others(conn, kind, row, body)
            if needs and not break_glass:
                return _ask(conn, kind, row, body, actor, reason, needs, now)
            if needs:
                detail = {"kind": kind, "reason": reason, "incident": incident}
                _note(conn, now, actor, "break-glass", row, body, detail)
            return _carry_out(conn, kind, row, body, actor, reason, incident, now)

    stops = kind in ("rollback", "hold", "stop", "pause")
    return ballast.urgently(engine, write) if stops else write()


def _writable(name: str, text: str, longest: int) -> None:
    """Raises Refused for what a hold's file in Git could not carry, or a page not show."""
    if len(text) > longest:
        raise Refused(422, f"{name}: at most {longest} characters", f"/{name}")
    if found := re.search(f"[{CONTROLS}]", text):
        raise Refused(422, f"{name}: without {found.group()!a}: it is a control", f"/{name}")


def carry_out(
    conn: Connection,
    *,
    kind: str,
    rollout: str | None,
    body: Mapping[str, Any],
    actor: str,
    reason: str,
    now: float,
) -> str:
    """What two people have agreed on, in the transaction of the last one's word."""
    row = None if kind == "stop" else found(conn, rollout)
    return _carry_out(conn, kind, row, body, actor, reason, None, now).sentence


def seen(
    conn: Connection, kind: str, rollout: str | None, body: Mapping[str, Any]
) -> dict[str, Any]:
    """What a second person approves: the act, and the rollout as it stands."""
    if kind == "stop":
        return {"kind": kind, "name": str(body.get("scope")), "body": dict(body)}
    row = found(conn, rollout)
    names = ("name", "fleet", "release", "digest", "commit", "step", "state", "revision")
    return {"kind": kind, "body": dict(body), "rollout": row["id"], **{n: row[n] for n in names}}


def _carry_out(
    conn: Connection,
    kind: str,
    row: Mapping[str, Any] | None,
    body: Mapping[str, Any],
    actor: str,
    reason: str,
    incident: str | None,
    now: float,
) -> Recorded:
    command = ulid.fresh(now)
    if row is None:
        sentence = _stop(conn, command, body, actor, reason, now)
    else:
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
    detail = {"command": command, "reason": reason, "incident": incident, **dict(body)}
    _note(conn, now, actor, kind, row, body, detail)
    return Recorded(id=command, revision=revision, sentence=sentence)


def _others(
    conn: Connection, kind: str, row: Mapping[str, Any] | None, body: Mapping[str, Any]
) -> int:
    """How many people besides this one the rule asks for. A stop asks for none, ever."""
    if kind not in RULED or (kind == "stop" and not body.get("lift")):
        return 0
    rules = approvals.load_rules(conn)
    concerned = list(rules.values()) if row is None else [rules.get(row["fleet"], {})]
    return max([0, *(rule.get(RULED[kind], 1) - 1 for rule in concerned)])


def _ask(
    conn: Connection,
    kind: str,
    row: Mapping[str, Any] | None,
    body: Mapping[str, Any],
    actor: str,
    reason: str,
    needs: int,
    now: float,
) -> Recorded:
    if kind == "lift" and row is not None:
        in_force(conn, row, body)
    asked, digest = approvals.ask(
        conn,
        kind=kind,
        fleet=row["fleet"] if row else "",
        rollout=row["id"] if row else "",
        seen=seen(conn, kind, row["id"] if row else None, body),
        proposer=actor,
        reason=reason,
        needs=needs,
        now=now,
    )
    who = "one more person" if needs == 1 else f"{needs} more people"
    return Recorded(
        id=asked,
        revision=int(row["revision"]) if row else 0,
        sentence=f"{kind} waits for {who}: `bellwether approve {asked}`",
        state="awaiting",
        digest=digest,
    )


def _note(
    conn: Connection,
    now: float,
    actor: str,
    action: str,
    row: Mapping[str, Any] | None,
    body: Mapping[str, Any],
    detail: Mapping[str, Any],
) -> None:
    subject = row["name"] if row else str(body.get("scope"))
    audit.append(conn, at=now, actor=actor[:128], action=action, subject=subject, detail=detail)


def preview(engine: Engine, *, kind: str, rollout: str) -> dict[str, Any]:
    """The blast radius of a verb on this rollout, without doing it; raises Refused."""
    with reading(engine) as conn:
        row = found(conn, rollout)
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
            select(
                rollouts.c.id, rollouts.c.name, rollouts.c.fleet, rollouts.c.digest,
                rollouts.c.artifacts,
            ).where(rollouts.c.state.in_([str(state) for state in ACTIVE]))
        ).all()  # fmt: skip
        if scope in ("product", "hardware"):
            concerned = stop_rows.fleets(conn, scope, value)
            rows = [row for row in rows if row.fleet in concerned]
        if scope == "digest":
            meant = {value, *stop_rows.released(conn, value)}
            rows = [r for r in rows if not meant.isdisjoint({r.digest, *r.artifacts.values()})]
        known = bool(body.get("lift")) or stop_rows.known(conn, scope, value)
    where = _everywhere(scope, value)
    verb = "ends the stop of" if body.get("lift") else "no new activation in"
    return {
        "kind": "stop",
        "scope": scope,
        "value": value,
        "rollouts": [{"id": row.id, "name": row.name, "fleet": row.fleet} for row in rows],
        "sentence": f"{verb} {where}: "
        + (f"{len(rows)} active {'rollout' if len(rows) == 1 else 'rollouts'} may be concerned")
        + ("" if known else f"; {NOTHING}: is {value!r} written right?"),
    }


def found(conn: Connection, rollout: str | None) -> Mapping[str, Any]:
    """The rollout of this id, or the newest of this name; raises Refused."""
    match = conn.execute(
        select(rollouts)
        .where((rollouts.c.id == rollout) | (rollouts.c.name == rollout))
        .order_by(rollouts.c.opened_at.desc(), rollouts.c.id.desc())
        .limit(1)
    ).first()
    if match is None:
        raise Refused(404, f"rollout {rollout!r}: unknown; `bellwether status` lists them")
    return dict(match._mapping)


def may(row: Mapping[str, Any], kind: str) -> None:
    """Does the rollout's state allow it? Raises Refused."""
    _check(row, kind, None)


def _check(row: Mapping[str, Any], kind: str, if_revision: int | None) -> None:
    if if_revision is not None and if_revision != row["revision"]:
        raise Refused(
            412,
            f"{row['name']}: revision {if_revision} is stale, it is {row['revision']} now: "
            f"{row['sentence']}; look again, then repeat",
        )
    if not allowed(kind, row["state"], row["flags"]):
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
        part = scope_of(conn, row, body)
        hold = add_hold(
            conn,
            row,
            to=_destination(conn, body) if kind == "rollback" else "stay",
            actor=actor,
            reason=reason,
            incident=incident,
            now=now,
            scope=part,
        )
        words = scopes.words(part)
        whom = f" for {words}" if words else ""
        what = "devices go back" if kind == "rollback" else "devices stay as they are"
        return f"{row['release']} is rejected by hold {hold}{whom}; {what}"
    if kind == "lift":
        return _lift(conn, row, body, actor, reason, now)
    return f"{kind} {row['name']} ({row['release']}) recorded"


def scope_of(conn: Connection, row: Mapping[str, Any], body: Mapping[str, Any]) -> dict[str, Any]:
    """The part of the fleet that is meant; raises Refused for one that nobody can be in.

    At 3 a.m. a name that is mistyped must not look like a rollback that is under way.
    """
    try:
        part = scopes.checked(body.get("scope"))
    except ValueError as error:
        raise Refused(422, str(error), "/scope") from None
    why = scopes.empty(part, row["pinned"] or {})
    if names := part.get("devices"):
        known = get_many(conn, names)
        strange = [n for n in names if n not in known or known[n].fleet != row["fleet"]]
        if strange:
            why = f"fleet {row['fleet']} has no device {', '.join(strange[:5])}"
    if why:
        raise Refused(422, f"scope: {why}", "/scope")
    return part


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
    scope: Mapping[str, Any] = scopes.EVERYBODY,
) -> str:
    """Reject a rollout's digest from this transaction on; answers the hold's id.

    It rejects the release digest and every artifact in it that differs from the release before.
    """
    hold = ulid.fresh(now)
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
            scope=dict(scope),
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
    lifted = in_force(conn, row, body)
    for hold in lifted:
        conn.execute(
            update(holds)
            .where(holds.c.id == hold)
            .values(
                lift=ulid.fresh(now),
                lifted_at=now,
                lifted_by=actor,
                lift_reason=reason,
            )
        )
    what = "its release" if body.get("hold") else row["release"]
    return f"{row['name']}: lifted {', '.join(lifted)}; {what} may be tried again"


def in_force(conn: Connection, row: Mapping[str, Any], body: Mapping[str, Any]) -> list[str]:
    """The holds that a lift ends: of this digest, or the one that is named.

    Never those of other releases of the same rollout: who sets one free has not looked at them.
    Raises Refused when there is none.
    """
    query = select(holds.c.id, holds.c.digest, holds.c.release).where(
        holds.c.rollout == row["name"], holds.c.lifted_at.is_(None)
    )
    known = conn.execute(query.order_by(holds.c.id)).all()
    named = str(body.get("hold") or "")
    meant = [h.id for h in known if (h.id == named if named else h.digest == row["digest"])]
    if meant:
        return meant
    wanted = f"hold {named}" if named else f"hold on {row['release']}"
    others = ", ".join(f"{h.id} on {h.release}" for h in known[-3:])
    hint = f"; in force are {others}: lift one by its id (`--hold ID`)" if others else ""
    raise Refused(409, f"{row['name']}: no {wanted} is in force, nothing to lift{hint}")


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
            raise Refused(409, f"no stop of {_everywhere(scope, value)} is in force")
        return f"the stop of {_everywhere(scope, value)} has ended"
    conn.execute(
        insert(stops).values(
            id=command, scope=scope, value=value, reason=reason, actor=actor, at=now
        )
    )
    said = f"stopped: no new activation in {_everywhere(scope, value)}"
    if stop_rows.known(conn, scope, value):
        return said
    return f"{said}; {NOTHING}: is {value!r} written right?"


def _everywhere(scope: str, value: str) -> str:
    return "all fleets" if scope == "all" else f"{scope} {value}"


def _scope(body: Mapping[str, Any]) -> tuple[str, str]:
    scope, value = str(body.get("scope", "all")), str(body.get("value") or "")
    if scope not in SCOPES:
        known = ", ".join(SCOPES)
        raise Refused(422, f"scope: {scope!r} is unknown; one of {known}", "/scope")
    if scope != "all" and not value:
        raise Refused(422, f"value: say which {scope}", "/value")
    return scope, "" if scope == "all" else value
