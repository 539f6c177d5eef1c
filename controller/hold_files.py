"""Holds and lifts that stand in Git, by people's hands or ours before a wipe: they come into force.

Rules, in order:

1. A file says whom it rejects by name. What the name means is looked up in the commit; where that
   does not say it (a broken rollout, a release that is gone), in what earlier commits have shown.
2. A hold of which not all is known is in force for what is known, and is completed by a later
   commit. Ids are never used twice, so that a file changed afterwards changes nothing.
3. A lift ends its hold; nothing else does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, bindparam, insert, select, update

from controller.manifests.kinds import Hold, Lift, Release
from controller.manifests.reader import Manifests
from controller.rollout import scope
from controller.store import rollouts as store
from controller.store.tables import holds, releases, rollouts

_KNOWN = select(
    holds.c.id, holds.c.fleet, holds.c.artifacts, holds.c.commit, holds.c.lift,
    holds.c.lift_commit, holds.c.lifted_at,
)  # fmt: skip
_SET = update(holds).where(holds.c.id == bindparam("named"))


def take(conn: Connection, manifests: Manifests, commit: str, now: float) -> None:
    known = {row.id: row for row in conn.execute(_KNOWN)}
    for hold in manifests.holds.values():
        row = known.get(hold.id)
        if row is not None and row.commit and row.fleet and row.artifacts:
            continue  # as with nearly all of them
        meaning = _meaning(conn, hold, manifests)
        if row is None:
            conn.execute(insert(holds), _row(hold, meaning, commit, now))
            continue
        values: dict[str, Any] = {}
        if not row.fleet and meaning.fleet:
            values["fleet"] = meaning.fleet
        if not row.artifacts and meaning.artifacts:
            values["artifacts"] = meaning.artifacts
        if values:
            values["created_at"] = now  # what was not known was not rejected before
        if not row.commit:  # ours: it stands in Git now, whoever merged it
            values["commit"] = commit
        if values:
            conn.execute(_SET.values(**values), {"named": hold.id})
    known = {row.id: row for row in conn.execute(_KNOWN)} if manifests.lifts else {}
    for lift in manifests.lifts.values():
        _lift(conn, lift, known, commit, now)


def _lift(conn: Connection, lift: Lift, known: Mapping[str, Any], commit: str, now: float) -> None:
    row = known.get(lift.hold)
    if row is None or row.lift_commit is not None:
        return
    if row.lifted_at is None:
        values = {"lift": lift.id, "lifted_at": now, "lifted_by": lift.actor}
        values |= {"lift_reason": lift.reason, "lift_commit": commit}
        conn.execute(_SET.values(**values), {"named": row.id})
    elif row.lift == lift.id:  # ours: it stands in Git now, whoever merged it
        conn.execute(_SET.values(lift_commit=commit), {"named": row.id})


@dataclass(frozen=True, slots=True)
class _Meaning:
    fleet: str  # empty: nothing says it yet
    artifacts: list[str]


def _meaning(conn: Connection, hold: Hold, manifests: Manifests) -> _Meaning:
    rollout = manifests.rollouts.get(hold.rollout)
    fleet = rollout.fleet if rollout is not None else _fleet_before(conn, hold.rollout)
    release = manifests.releases.get(hold.rejects_release)
    if release is None:
        release = _release_before(conn, hold.rejects_release)
    if release is None:
        return _Meaning(fleet, [])
    artifacts = [artifact.digest for artifact in release.artifacts]
    # What the fleet's proven set contains was there before the release, and is not rejected.
    before = {
        proven.digest for (of, _, _), proven in store.load_proven(conn).items() if of == fleet
    }
    return _Meaning(fleet, [one for one in artifacts if one not in before] or artifacts)


def _fleet_before(conn: Connection, rollout: str) -> str:
    """The fleet of the newest rollout of this name."""
    query = select(rollouts.c.fleet).where(rollouts.c.name == rollout)
    row = conn.execute(query.order_by(rollouts.c.id.desc()).limit(1)).first()
    return str(row.fleet) if row is not None else ""


def _release_before(conn: Connection, name: str) -> Release | None:
    row = conn.execute(select(releases.c.document).where(releases.c.name == name)).first()
    return Release.model_validate(row.document) if row is not None else None


def _row(hold: Hold, meaning: _Meaning, commit: str, now: float) -> dict[str, Any]:
    return {
        "id": hold.id,
        "rollout": hold.rollout,
        "fleet": meaning.fleet,
        "release": hold.rejects_release,
        "digest": hold.rejects_digest,
        "artifacts": meaning.artifacts,
        "to": str(hold.to),
        "scope": scope.in_git(hold.scope),
        "reason": hold.reason,
        "actor": hold.actor,
        "incident": hold.incident,
        "created_at": now,
        "commit": commit,
    }
