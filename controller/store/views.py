"""Reads for people: rollouts, decisions, releases, audit and the state of Git, page by page.

Reading only, plain dictionaries out, in the names of the API (camelCase, RFC 3339 times).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Connection, Row, Select, func, select

from controller.rollout.waves import plain_steps
from controller.store.tables import (
    audit,
    decisions,
    desired,
    devices,
    holds,
    member_counts,
    members,
    meta,
    proven,
    releases,
    rollouts,
    stops,
)

Plain = dict[str, Any]
_OF_ROLLOUTS = frozenset(
    {"rollback", "hold", "lift", "pause", "resume", "promote", "verdict", "state", "open", "draw"}
)  # actions whose subject is a rollout's name


def when(moment: float | None) -> str | None:
    """RFC 3339 in UTC, milliseconds."""
    if moment is None:
        return None
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="milliseconds")[:-6] + "Z"


def value(conn: Connection, key: str, default: Any = None) -> Any:
    row = conn.execute(select(meta.c.value).where(meta.c.key == key)).first()
    return default if row is None else row[0]


def git(conn: Connection) -> Plain:
    """What the watcher found in the fleet repository."""
    state = value(conn, "git") or {}
    return {
        "accepted": state.get("accepted"),
        "author": state.get("author", ""),
        "acceptedAt": when(state.get("accepted_at")),
        "head": state.get("head"),
        "checkedAt": when(state.get("checked_at")),
        "heardAt": when(state.get("heard_at")),
        "refused": state.get("refused", ""),
        "problems": list(state.get("problems", ())),
        "notices": value(conn, "notices") or {},
    }


# -- rollouts -------------------------------------------------------------------------------------


def find_rollout(conn: Connection, name: str) -> Row[Any] | None:
    """By id, or the newest one of that manifest's name."""
    query = select(rollouts).where((rollouts.c.id == name) | (rollouts.c.name == name))
    newest = query.order_by(rollouts.c.opened_at.desc(), rollouts.c.id.desc())
    return conn.execute(newest.limit(1)).first()


def list_rollouts(
    conn: Connection,
    *,
    before: str,
    limit: int,
    fleets: frozenset[str],
    state: str = "",
    fleet: str = "",
    name: str = "",
    release: str = "",
) -> Sequence[Row[Any]]:
    """Newest first; `before` is the id where the page before ended."""
    query = select(rollouts).order_by(rollouts.c.id.desc()).limit(limit)
    if before:
        query = query.where(rollouts.c.id < before)
    if fleets:
        query = query.where(rollouts.c.fleet.in_(sorted(fleets)))
    columns = (
        (rollouts.c.state, state),
        (rollouts.c.fleet, fleet),
        (rollouts.c.name, name),
        (rollouts.c.release, release),
    )
    for column, wanted in columns:
        if wanted:
            query = query.where(column == wanted)
    return conn.execute(query).all()


def count_members(conn: Connection, ids: Sequence[str]) -> dict[str, Plain]:
    """rollout → counts of its members by arm and state, and by step."""
    counts = member_counts
    query = select(counts.c.rollout, counts.c.step, counts.c.arm, counts.c.state, counts.c.n).where(
        counts.c.rollout.in_(list(ids)), counts.c.n > 0
    )
    found: dict[str, Plain] = {i: {"devices": {}, "control": 0, "steps": {}} for i in ids}
    for rollout, step, arm, state, count in conn.execute(query):
        entry = found[rollout]
        if arm == "control":
            entry["control"] += count
            continue
        entry["devices"][state] = entry["devices"].get(state, 0) + count
        per_step = entry["steps"].setdefault(str(step), {})
        per_step[state] = per_step.get(state, 0) + count
    return found


def rollout(row: Row[Any], counts: Mapping[str, Any], held: Sequence[Plain]) -> Plain:
    return {
        "id": row.id,
        "name": row.name,
        "fleet": row.fleet,
        "release": row.release,
        "digest": row.digest,
        "artifacts": row.artifacts,
        "commit": row.commit,
        "author": row.author,
        "state": row.state,
        "sentence": row.sentence,
        "revision": row.revision,
        "step": row.step,
        "steps": plain_steps(row.pinned),
        "fixes": row.pinned.get("fixes"),  # a first wave before `steps`: who ran that release
        "openedAt": when(row.opened_at),
        "stepAt": when(row.step_at),
        "soakSeconds": row.soak,
        "finishedAt": when(row.finished_at),
        "updatedAt": when(row.updated_at),
        "members": counts,
        "holds": list(held),
    }


def holds_of(conn: Connection, names: Sequence[str]) -> dict[str, list[Plain]]:
    """Rollout manifest name → its holds, newest first."""
    query = select(holds).where(holds.c.rollout.in_(list(names))).order_by(holds.c.id.desc())
    found: dict[str, list[Plain]] = {name: [] for name in names}
    for row in conn.execute(query):
        found[row.rollout].append(
            {
                "id": row.id,
                "release": row.release,
                "digest": row.digest,
                "to": row.to,
                "scope": row.scope,
                "reason": row.reason,
                "actor": row.actor,
                "incident": row.incident,
                "createdAt": when(row.created_at),
                "commit": row.commit,
                "liftedAt": when(row.lifted_at),
                "liftedBy": row.lifted_by,
                "liftReason": row.lift_reason,
                "liftCommit": row.lift_commit,
            }
        )
    return found


def active_stops(conn: Connection) -> list[Plain]:
    rows = conn.execute(select(stops).where(stops.c.lifted_at.is_(None)).order_by(stops.c.id))
    return [
        {
            "id": row.id,
            "scope": row.scope,
            "value": row.value,
            "reason": row.reason,
            "actor": row.actor,
            "at": when(row.at),
        }
        for row in rows
    ]


# -- decisions ------------------------------------------------------------------------------------


def list_decisions(
    conn: Connection, rollout_id: str, *, before: str, limit: int, kind: str = "", verdict: str = ""
) -> Sequence[Row[Any]]:
    query = select(decisions).where(decisions.c.rollout == rollout_id)
    if before:
        query = query.where(decisions.c.id < before)
    if kind:
        query = query.where(decisions.c.kind == kind)
    if verdict:
        query = query.where(decisions.c.verdict == verdict)
    return conn.execute(query.order_by(decisions.c.id.desc()).limit(limit)).all()


def find_decision(conn: Connection, decision_id: str) -> Row[Any] | None:
    return conn.execute(select(decisions).where(decisions.c.id == decision_id)).first()


def decision(row: Row[Any], *, whole: bool) -> Plain:
    """`whole`: with its inputs and policy, as `replay` needs them."""
    short = {
        "id": row.id,
        "rollout": row.rollout,
        "at": when(row.at),
        "kind": row.kind,
        "verdict": row.verdict,
        "sentence": row.sentence,
        "numbers": row.numbers,
        "watermark": row.watermark,
        "commit": row.commit,
        "term": row.term,
    }
    return {**short, "inputs": row.inputs, "policy": row.policy} if whole else short


# -- releases, audit, fleets ----------------------------------------------------------------------


def list_releases(
    conn: Connection, *, after: str, limit: int, name: str = "", digest: str = ""
) -> list[Plain]:
    query = select(releases).where(releases.c.name > after).order_by(releases.c.name).limit(limit)
    if name:
        query = query.where(releases.c.name == name)
    if digest:
        query = query.where(releases.c.digest == digest)
    return [
        {
            "name": row.name,
            "digest": row.digest,
            "commit": row.commit,
            "seenAt": when(row.seen_at),
            "document": row.document,
        }
        for row in conn.execute(query)
    ]


def list_audit(
    conn: Connection,
    *,
    after: int,
    limit: int,
    actor: str = "",
    action: str = "",
    subject: str = "",
) -> list[Plain]:
    query = select(audit).where(audit.c.seq > after).order_by(audit.c.seq).limit(limit)
    columns = ((audit.c.actor, actor), (audit.c.action, action), (audit.c.subject, subject))
    for column, wanted in columns:
        if wanted:
            query = query.where(column == wanted)
    return [
        {
            "seq": row.seq,
            "at": when(row.at),
            "actor": row.actor,
            "action": row.action,
            "subject": row.subject,
            "detail": row.detail,
            "previous": row.previous,
            "hash": row.hash,
        }
        for row in conn.execute(query)
    ]


def fleets_of_audit(conn: Connection, rows: Sequence[Plain]) -> list[frozenset[str]]:
    """The fleets that each audit row is of, by what it names: a fleet, a rollout, devices."""
    named = {_rollout_of(row) for row in rows}
    of_rollouts = select(rollouts.c.id, rollouts.c.name, rollouts.c.fleet).where(
        rollouts.c.id.in_(named) | rollouts.c.name.in_(named)
    )
    known: dict[str, str] = {}
    for rollout_id, name, fleet in conn.execute(of_rollouts.order_by(rollouts.c.id)):
        known |= {rollout_id: fleet, name: fleet}
    ids = {row["subject"] for row in rows if row["action"].startswith("device.")}
    of_devices = select(devices.c.id, devices.c.fleet).where(devices.c.id.in_(ids))
    places = {row.id: row.fleet for row in conn.execute(of_devices)}
    return [_fleets_of(row, known, places) for row in rows]


def _rollout_of(row: Plain) -> str:
    """What an audit row says of its rollout: an id, or a name. A token may have the same name."""
    verb = row["action"].partition(":")[0] in _OF_ROLLOUTS
    return str(row["detail"].get("rollout") or (row["subject"] if verb else ""))


def _fleets_of(
    row: Plain, of_rollouts: Mapping[str, str], of_devices: Mapping[str, str]
) -> frozenset[str]:
    detail: Plain = row["detail"]
    if isinstance(detail.get("devices"), Mapping):  # enrolled together: device → fleet
        return frozenset(map(str, detail["devices"].values()))
    place = of_devices.get(row["subject"]) if row["action"].startswith("device.") else None
    named = (detail.get("fleet"), place, of_rollouts.get(_rollout_of(row)))
    return frozenset(str(fleet) for fleet in named if fleet)


def audit_head(conn: Connection) -> int:
    return int(conn.execute(select(func.coalesce(func.max(audit.c.seq), 0))).scalar_one())


def fleets(conn: Connection, only: frozenset[str]) -> list[Plain]:
    """Every fleet that has devices or a rollout, with its counts."""
    found: dict[str, Plain] = {}
    query = select(devices.c.fleet, devices.c.status, func.count())
    for name, status, count in conn.execute(query.group_by(devices.c.fleet, devices.c.status)):
        _fleet(found, name)["devices"][status] = count
    newest = select(func.max(rollouts.c.id)).group_by(rollouts.c.fleet, rollouts.c.name)
    shown = (
        rollouts.c.id, rollouts.c.fleet, rollouts.c.name, rollouts.c.release, rollouts.c.state,
        rollouts.c.sentence,
    )  # fmt: skip
    for row in conn.execute(select(*shown).where(rollouts.c.id.in_(newest.scalar_subquery()))):
        entry = _fleet(found, row.fleet)
        entry["rollouts"][row.name] = {
            "id": row.id,
            "release": row.release,
            "state": row.state,
            "sentence": row.sentence,
        }
    for row in conn.execute(select(proven)):
        entry = _fleet(found, row.fleet)["proven"].setdefault(row.component, {})
        entry[row.hardware] = {"release": row.release, "digest": row.digest}
    return [entry for name, entry in sorted(found.items()) if not only or name in only]


def names_of_fleets(conn: Connection) -> list[str]:
    return list(conn.execute(select(devices.c.fleet).distinct()).scalars())


def _fleet(found: dict[str, Plain], name: str) -> Plain:
    return found.setdefault(name, {"name": name, "devices": {}, "rollouts": {}, "proven": {}})


def pinned_of_fleet(conn: Connection, fleet: str) -> Mapping[str, Any] | None:
    """What the fleet's newest rollout pinned: cohorts and the policy that scores."""
    query = select(rollouts.c.pinned).where(rollouts.c.fleet == fleet)
    row = conn.execute(query.order_by(rollouts.c.id.desc()).limit(1)).first()
    return None if row is None else row[0]


# -- devices --------------------------------------------------------------------------------------


def list_devices(
    conn: Connection,
    *,
    after: str,
    limit: int,
    fleets: frozenset[str],
    fleet: str = "",
    status: str = "",
    labels: Mapping[str, str] | None = None,
) -> Sequence[Row[Any]]:
    return conn.execute(
        _devices(select(devices), after, limit, fleets, fleet, status, labels)
    ).all()


def list_device_ids(
    conn: Connection,
    *,
    after: str,
    limit: int,
    fleets: frozenset[str],
    fleet: str = "",
    status: str = "",
    labels: Mapping[str, str] | None = None,
) -> Sequence[str]:
    query = _devices(select(devices.c.id), after, limit, fleets, fleet, status, labels)
    return conn.execute(query).scalars().all()


def _devices(
    what: Select[Any], after: str, limit: int, fleets: frozenset[str], fleet: str, status: str,
    labels: Mapping[str, str] | None,
) -> Select[Any]:  # fmt: skip
    query = what.where(devices.c.id > after).order_by(devices.c.id).limit(limit)
    for key, wanted in (labels or {}).items():
        query = query.where(devices.c.labels[key].as_string() == wanted)
    if fleets:
        query = query.where(devices.c.fleet.in_(sorted(fleets)))
    if fleet:
        query = query.where(devices.c.fleet == fleet)
    if status:
        query = query.where(devices.c.status == status)
    return query


def changed_devices(conn: Connection, *, since: int, limit: int) -> Sequence[Row[Any]]:
    query = select(devices).where(devices.c.change > since).order_by(devices.c.change)
    return conn.execute(query.limit(limit)).all()


def memberships(conn: Connection, ids: Sequence[str]) -> dict[str, Row[Any]]:
    """device → its newest membership in the exposed arm (else as control)."""
    found: dict[str, Row[Any]] = {}
    for start in range(0, len(ids), 500):
        control = members.c.arm == "control"
        newest = func.row_number().over(
            partition_by=members.c.device, order_by=(control, members.c.drawn_at.desc())
        )
        ranked = (
            select(
                members.c.device, members.c.rollout, members.c.step, members.c.arm,
                members.c.state, members.c.reason, members.c.score, newest.label("place"),
            )
            .where(members.c.device.in_(ids[start : start + 500]))
            .subquery()
        )  # fmt: skip
        query = (
            select(ranked, rollouts.c.name.label("rollout_name"))
            .join(rollouts, rollouts.c.id == ranked.c.rollout)
            .where(ranked.c.place == 1)
        )
        found |= {row.device: row for row in conn.execute(query)}
    return found


def drawn_since(conn: Connection, since: float) -> dict[str, list[Row[Any]]]:
    """device → its memberships that were drawn since then."""
    query = (
        select(
            members.c.device, members.c.step, members.c.arm, rollouts.c.name.label("rollout_name")
        )
        .join(rollouts, rollouts.c.id == members.c.rollout)
        .where(members.c.drawn_at >= since)
    )
    found: dict[str, list[Any]] = {}
    for row in conn.execute(query):
        found.setdefault(row.device, []).append(row)
    return found


def cohorts_of_steps(conn: Connection, ids: Sequence[str]) -> dict[str, list[str | None]]:
    """rollout → the cohort of each of its waves; a wave for a fix has none."""
    found: dict[str, list[str | None]] = {}
    query = select(rollouts.c.id, rollouts.c.pinned).where(rollouts.c.id.in_(list(ids)))
    for rollout_id, pinned in conn.execute(query):
        first: list[str | None] = [None] if pinned.get("fixes") else []
        found[rollout_id] = first + [step.get("cohort") for step in plain_steps(pinned)]
    return found


def orders(conn: Connection, ids: Sequence[str]) -> dict[str, Plain]:
    found: dict[str, Plain] = {}
    for start in range(0, len(ids), 500):
        query = select(desired).where(desired.c.device.in_(ids[start : start + 500]))
        for row in conn.execute(query):
            found[row.device] = {
                "kind": row.kind,
                "term": row.term,
                "generation": row.generation,
                "attempt": row.attempt,
                "components": row.components,
                "rollout": row.rollout,
                "at": when(row.at),
                "published": bool(row.published),
            }
    return found
