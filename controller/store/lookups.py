"""What the pages ask of the control database: by index and with limits, counters before scans.

Reading only. What the API answers too stands in `views`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Row, Select, func, select

from controller.store.tables import (
    approvals,
    audit,
    commands,
    decisions,
    desired,
    devices,
    holds,
    looks,
    member_counts,
    members,
    proven,
    releases,
    rollouts,
)
from controller.store.views import when

Plain = dict[str, Any]
Rows = Sequence[Any]  # rows of the columns that the query names
_LIGHT = [
    rollouts.c.id, rollouts.c.fleet, rollouts.c.release, rollouts.c.state, rollouts.c.opened_at,
    rollouts.c.finished_at,
]  # fmt: skip


# -- rollouts -------------------------------------------------------------------------------------


def newest_of_fleets(conn: Connection, fleets: frozenset[str]) -> Rows:
    """The newest rollout of each fleet, whole."""
    newest = select(func.max(rollouts.c.id)).group_by(rollouts.c.fleet)
    if fleets:
        newest = newest.where(rollouts.c.fleet.in_(sorted(fleets)))
    return conn.execute(select(rollouts).where(rollouts.c.id.in_(newest.scalar_subquery()))).all()


def newest_of_fleet(conn: Connection, fleet: str) -> Row[Any] | None:
    query = select(rollouts).where(rollouts.c.fleet == fleet).order_by(rollouts.c.id.desc())
    return conn.execute(query.limit(1)).first()


def in_states(conn: Connection, states: Sequence[str], fleets: frozenset[str], limit: int) -> Rows:
    """Rollouts in these states, newest first."""
    query = select(rollouts).where(rollouts.c.state.in_(list(states)))
    if fleets:
        query = query.where(rollouts.c.fleet.in_(sorted(fleets)))
    return conn.execute(query.order_by(rollouts.c.id.desc()).limit(limit)).all()


def list_rollouts(
    conn: Connection, *, before: str, limit: int, fleets: frozenset[str], fleet: str, state: str
) -> Rows:
    """Newest first; `before` is the id where the page before ended."""
    query = select(rollouts).order_by(rollouts.c.id.desc()).limit(limit)
    if before:
        query = query.where(rollouts.c.id < before)
    if fleets:
        query = query.where(rollouts.c.fleet.in_(sorted(fleets)))
    if fleet:
        query = query.where(rollouts.c.fleet == fleet)
    if state:
        query = query.where(rollouts.c.state == state)
    return conn.execute(query).all()


def of_release(conn: Connection, release: str, limit: int) -> Rows:
    query = select(rollouts).where(rollouts.c.release == release)
    return conn.execute(query.order_by(rollouts.c.id.desc()).limit(limit)).all()


def opened_since(conn: Connection, since: str, fleets: frozenset[str]) -> Rows:
    """Light rows of the rollouts with an id (a ULID: begins with its time) from `since` on, with
    their fleet's labels and the release that theirs fixes."""
    query = select(
        *_LIGHT,
        rollouts.c.pinned["fleet"]["labels"].label("fleet_labels"),
        rollouts.c.pinned["release"]["fixes"].label("fixes"),
        rollouts.c.flags["ended_at"].label("ended_at"),
    ).where(rollouts.c.id >= since)
    if fleets:
        query = query.where(rollouts.c.fleet.in_(sorted(fleets)))
    return conn.execute(query.order_by(rollouts.c.id)).all()


def names_of(conn: Connection, ids: Sequence[str]) -> dict[str, Any]:
    """rollout id → (id, name, fleet, release, state)."""
    query = select(
        rollouts.c.id, rollouts.c.name, rollouts.c.fleet, rollouts.c.release, rollouts.c.state
    ).where(rollouts.c.id.in_(list(ids)))
    return {row.id: row for row in conn.execute(query)}


def last_verdicts(conn: Connection, ids: Sequence[str]) -> dict[str, Any]:
    """rollout → its newest decision of the gate."""
    newest = (
        select(func.max(decisions.c.id))
        .where(decisions.c.rollout.in_(list(ids)), decisions.c.kind == "verdict")
        .group_by(decisions.c.rollout)
    )
    query = select(decisions).where(decisions.c.id.in_(newest.scalar_subquery()))
    return {row.rollout: row for row in conn.execute(query)}


def judged(conn: Connection, rollout: str, limit: int) -> list[tuple[str, Mapping[str, Any]]]:
    """(RFC 3339, numbers) of the newest verdicts of a rollout and of the looks between them,
    oldest first."""
    verdicts = (
        select(decisions.c.at, decisions.c.numbers)
        .where(decisions.c.rollout == rollout, decisions.c.kind == "verdict")
        .order_by(decisions.c.at.desc())
        .limit(limit)
    )
    between = select(looks.c.at, looks.c.numbers).where(looks.c.rollout == rollout)
    between = between.order_by(looks.c.at.desc()).limit(limit)
    rows = [*conn.execute(verdicts).all(), *conn.execute(between).all()]
    newest = sorted(rows, key=lambda row: row.at)[-limit:]
    return [(when(row.at) or "", row.numbers) for row in newest]


def list_decisions(conn: Connection, *, before: str, limit: int, fleets: frozenset[str]) -> Rows:
    """Decisions of all rollouts, newest first, with their rollout's name; without their inputs."""
    query = (
        select(
            decisions.c.id, decisions.c.rollout, decisions.c.at, decisions.c.kind,
            decisions.c.verdict, decisions.c.sentence, decisions.c.commit,
            rollouts.c.name, rollouts.c.fleet, rollouts.c.release,
        )
        .join(rollouts, rollouts.c.id == decisions.c.rollout)
        .order_by(decisions.c.id.desc())
        .limit(limit)
    )  # fmt: skip
    if before:
        query = query.where(decisions.c.id < before)
    if fleets:
        query = query.where(rollouts.c.fleet.in_(sorted(fleets)))
    return conn.execute(query).all()


def decisions_of(conn: Connection, rollout: str, limit: int) -> Rows:
    """Decisions of one rollout, newest first, without their inputs: a draw names every device."""
    short = [column for column in decisions.c if column.name not in ("inputs", "policy")]
    query = select(*short).where(decisions.c.rollout == rollout)
    return conn.execute(query.order_by(decisions.c.id.desc()).limit(limit)).all()


def history_of(conn: Connection, fleet: str) -> tuple[int, int]:
    """(rollouts there ever were, members of those of this fleet): what an exact look reads."""
    all_of_them = conn.execute(select(func.count()).select_from(rollouts)).scalar_one()
    counts = select(func.coalesce(func.sum(member_counts.c.n), 0)).join(
        rollouts, rollouts.c.id == member_counts.c.rollout
    )
    ours = conn.execute(counts.where(rollouts.c.fleet == fleet)).scalar_one()
    return int(all_of_them), int(ours)


def told_members(conn: Connection, rollout: str, limit: int) -> list[str]:
    """Devices that were told the release, and have not left or gone back."""
    ours = select(members.c.device).where(members.c.rollout == rollout)
    # Controls are never told: these states need no look at the arm, the index has all of it.
    told = ours.where(members.c.state.in_(("told", "updated", "failed"))).limit(limit)
    silent = ours.where(members.c.state == "silent", members.c.arm != "control").limit(limit)
    return [*conn.execute(told).scalars(), *conn.execute(silent).scalars()]


def failures(conn: Connection, rollout: str, limit: int) -> list[tuple[str, str, int]]:
    """(state, reason, devices) of those that failed or fell silent, the most frequent first."""
    n = func.count()
    query = (
        select(members.c.state, members.c.reason, n)
        .where(
            members.c.rollout == rollout,
            members.c.state.in_(("failed", "silent")),
            members.c.arm != "control",
        )
        .group_by(members.c.state, members.c.reason)
        .order_by(n.desc(), members.c.reason)
        .limit(limit)
    )
    return [(state, reason, count) for state, reason, count in conn.execute(query)]


def waiting_commands(conn: Connection, rollout: str) -> list[Plain]:
    """What people asked of a rollout and the loop has not done yet, oldest first."""
    query = select(commands).where(commands.c.state == "recorded", commands.c.rollout == rollout)
    return [
        {"kind": row.kind, "actor": row.actor, "reason": row.reason, "at": when(row.at)}
        for row in conn.execute(query.order_by(commands.c.id))
    ]


def waiting_approvals(conn: Connection, fleets: frozenset[str], limit: int) -> list[Plain]:
    """What waits for a second person, newest first; what concerns all fleets too."""
    query = select(approvals).where(approvals.c.state == "waiting")
    if fleets:
        query = query.where(approvals.c.fleet.in_(sorted(fleets)))
    names = ("id", "kind", "fleet", "rollout", "proposer", "reason", "needs")
    rows = conn.execute(query.order_by(approvals.c.id.desc()).limit(limit))
    return [{name: getattr(row, name) for name in names} for row in rows]


# -- devices --------------------------------------------------------------------------------------


def changed_places(conn: Connection, since: int) -> Rows:
    """(id, fleet, status, change) of registry rows that changed after `since`."""
    query = select(devices.c.id, devices.c.fleet, devices.c.status, devices.c.change)
    return conn.execute(query.where(devices.c.change > since)).all()


def list_devices(
    conn: Connection, *, after: str, limit: int, fleets: frozenset[str], fleet: str = "",
    status: str = "", prefix: str = "", rollout: str = "", state: str = "",
) -> Rows:  # fmt: skip
    """Registry rows in order of id; `rollout` and `state`: its members in that state alone."""
    query: Select[Any] = select(devices).order_by(devices.c.id).limit(limit)
    if rollout:
        query = query.join(members, members.c.device == devices.c.id).where(
            members.c.rollout == rollout, members.c.arm != "control"
        )
        if state:
            query = query.where(members.c.state == state)
        query = query.where(members.c.device > after).order_by(None).order_by(members.c.device)
    else:
        query = query.where(devices.c.id > after)
    if fleets:
        query = query.where(devices.c.fleet.in_(sorted(fleets)))
    if fleet:
        query = query.where(devices.c.fleet == fleet)
    if status:
        query = query.where(devices.c.status == status)
    if prefix:
        query = query.where(devices.c.id >= prefix, devices.c.id < prefix + "\U0010ffff")
    return conn.execute(query).all()


def memberships_of(conn: Connection, device: str, limit: int) -> list[Plain]:
    """Every rollout that ever drew a device, newest first."""
    query = (
        select(members, rollouts.c.name.label("rollout_name"), rollouts.c.release)
        .join(rollouts, rollouts.c.id == members.c.rollout)
        .where(members.c.device == device)
        .order_by(members.c.drawn_at.desc())
        .limit(limit)
    )
    return [
        {
            "rollout": row.rollout,
            "name": row.rollout_name,
            "release": row.release,
            "step": row.step,
            "arm": row.arm,
            "state": row.state,
            "reason": row.reason,
            "score": row.score,
            "drawnAt": when(row.drawn_at),
            "toldAt": when(row.told_at),
            "updatedAt": when(row.updated_at),
        }
        for row in conn.execute(query)
    ]


def orders_pending(conn: Connection) -> int:
    query = select(func.count()).where(desired.c.published.is_(False))
    return int(conn.execute(query).scalar_one())


def proven_of(conn: Connection) -> dict[str, dict[str, Plain]]:
    """fleet → component → hardware → {release, digest}."""
    found: dict[str, dict[str, Plain]] = {}
    for row in conn.execute(select(proven)):
        parts = found.setdefault(row.fleet, {}).setdefault(row.component, {})
        parts[row.hardware] = {"release": row.release, "digest": row.digest}
    return found


# -- releases, audit ------------------------------------------------------------------------------


def newest_releases(conn: Connection, *, before: tuple[float, str] | None, limit: int) -> Rows:
    """Newest first; `before`: (seen_at, name) where the page before ended."""
    query = select(releases).order_by(releases.c.seen_at.desc(), releases.c.name.desc())
    if before:
        at, name = before
        query = query.where(
            (releases.c.seen_at < at) | ((releases.c.seen_at == at) & (releases.c.name < name))
        )
    return conn.execute(query.limit(limit)).all()


def find_release(conn: Connection, name: str) -> Row[Any] | None:
    return conn.execute(select(releases).where(releases.c.name == name)).first()


def held_digests(conn: Connection) -> frozenset[str]:
    """Release digests that a hold in force rejects."""
    return frozenset(
        conn.execute(select(holds.c.digest).where(holds.c.lifted_at.is_(None))).scalars()
    )


def holds_of_digest(conn: Connection, digest: str) -> list[Plain]:
    """Every hold on a release digest, newest first."""
    query = select(holds).where(holds.c.digest == digest).order_by(holds.c.id.desc())
    return [
        {
            "id": row.id,
            "fleet": row.fleet,
            "reason": row.reason,
            "actor": row.actor,
            "incident": row.incident,
            "createdAt": when(row.created_at),
            "liftedAt": when(row.lifted_at),
            "liftedBy": row.lifted_by,
            "liftReason": row.lift_reason,
        }
        for row in conn.execute(query)
    ]


def newest_audit(
    conn: Connection, *, before: int | None, limit: int, subject: str = "", action: str = ""
) -> list[Plain]:
    """Rows of the audit, newest first."""
    query = select(audit).order_by(audit.c.seq.desc()).limit(limit)
    if before is not None:
        query = query.where(audit.c.seq < before)
    if subject:
        query = query.where(audit.c.subject == subject)
    if action:
        query = query.where(audit.c.action == action)
    return [
        {
            "seq": row.seq,
            "at": when(row.at),
            "actor": row.actor,
            "action": row.action,
            "subject": row.subject,
            "detail": row.detail,
            "hash": row.hash,
        }
        for row in conn.execute(query)
    ]
