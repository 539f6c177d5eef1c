"""Rows of approvals and votes, and the rules in force: one value in `meta`, fleet → rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Row, func, insert, select, update

from controller import audit, ulid
from controller.rollout import approval
from controller.store.rollouts import get_meta, put_meta
from controller.store.tables import approvals, devices, votes
from telemetry.store.prepared import Prepared

LASTS = 24 * 3600.0  # seconds that a request waits
_RULES = "approvals"
_GRANTED = Prepared(
    select(approvals.c.rollout, approvals.c.result).where(
        approvals.c.state == "granted", approvals.c.kind.in_(("start", "recall"))
    )
)


def load_rules(conn: Connection) -> dict[str, dict[str, int]]:
    """fleet → the rule in force there."""
    return dict(get_meta(conn, _RULES, {}))


def put_rule(conn: Connection, fleet: str, rule: Mapping[str, int]) -> None:
    put_meta(conn, _RULES, {**load_rules(conn), fleet: dict(rule)})


def load_granted(conn: Connection) -> dict[str, str]:
    """rollout id → who approved its start, in words."""
    return {row.rollout: row.result for row in _GRANTED.all(conn)}


def ask(
    conn: Connection,
    *,
    kind: str,
    fleet: str,
    rollout: str,
    seen: Mapping[str, Any],
    proposer: str,
    reason: str,
    needs: int,
    now: float,
) -> tuple[str, str]:
    """Ask for `needs` more people; answers (id, digest of what they will see). Audited."""
    name, digest = ulid.fresh(now), approval.digest(seen)
    conn.execute(
        insert(approvals).values(
            id=name,
            kind=kind,
            fleet=fleet,
            rollout=rollout,
            digest=digest,
            seen=dict(seen),
            proposer=proposer,
            reason=reason,
            needs=needs,
            state="waiting",
            at=now,
            expires_at=now + LASTS,
        )
    )
    audit.append(
        conn,
        at=now,
        actor=proposer[:128],
        action="approval.ask",
        subject=str(seen.get("name") or fleet)[:128],
        detail={"approval": name, "kind": kind, "digest": digest, "needs": needs, "reason": reason},
    )
    return name, digest


def find(conn: Connection, name: str) -> Row[Any] | None:
    """By id, or the newest that waits for the rollout of this id or name."""
    row = conn.execute(select(approvals).where(approvals.c.id == name)).first()
    if row is not None:
        return row
    waiting = select(approvals).where(approvals.c.state == "waiting")
    rows = conn.execute(waiting.order_by(approvals.c.id.desc())).all()
    return next((r for r in rows if name in (r.rollout, r.seen.get("name"))), None)


def active_devices(conn: Connection, fleet: str) -> int:
    """How many devices a start in this fleet concerns."""
    ours = devices.c.fleet == fleet, devices.c.status == "active"
    return int(conn.execute(select(func.count()).where(*ours)).scalar_one())


def listed(
    conn: Connection, *, before: str, limit: int, fleets: frozenset[str], state: str, fleet: str
) -> Sequence[Row[Any]]:
    """Newest first."""
    query = select(approvals).order_by(approvals.c.id.desc()).limit(limit)
    if before:
        query = query.where(approvals.c.id < before)
    if fleets:
        query = query.where(approvals.c.fleet.in_(sorted(fleets)))
    if state:
        query = query.where(approvals.c.state == state)
    if fleet:
        query = query.where(approvals.c.fleet == fleet)
    return conn.execute(query).all()


def voters(conn: Connection, names: Sequence[str]) -> dict[str, list[str]]:
    """approval → who approved it, in their order."""
    found: dict[str, list[str]] = {name: [] for name in names}
    query = select(votes).where(votes.c.approval.in_(list(names)))
    for row in conn.execute(query.order_by(votes.c.at)):
        found[row.approval].append(row.actor)
    return found


def add_vote(conn: Connection, name: str, actor: str, reason: str, now: float) -> int:
    """Answers how many have voted now; somebody's second vote counts once."""
    known = conn.execute(
        select(votes.c.actor).where(votes.c.approval == name, votes.c.actor == actor)
    ).first()
    if known is None:
        conn.execute(insert(votes).values(approval=name, actor=actor, at=now, reason=reason))
    count = select(func.count()).where(votes.c.approval == name)
    return int(conn.execute(count).scalar_one())


def decide(conn: Connection, name: str, state: str, result: str, now: float) -> None:
    conn.execute(
        update(approvals)
        .where(approvals.c.id == name)
        .values(state=state, result=result[:2000], decided_at=now)
    )


def waiting(conn: Connection, kind: str, fleet: str, digest: str) -> bool:
    """Is this very thing asked for already?"""
    query = select(approvals.c.id).where(
        approvals.c.state == "waiting",
        approvals.c.kind == kind,
        approvals.c.fleet == fleet,
        approvals.c.digest == digest,
    )
    return conn.execute(query).first() is not None
