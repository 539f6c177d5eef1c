"""Queries of rollouts, members, decisions, holds, orders and the proven set.

The loop is the only writer of rollouts, members, decisions, orders and the proven set; every write
of it is fenced by the controller's term (`fence`). Rows go in and out as the frozen dataclasses of
`controller.rollout.model`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from sqlalchemy import (
    JSON,
    Connection,
    Table,
    bindparam,
    delete,
    insert,
    select,
    union_all,
    update,
)

from controller.rollout.model import (
    ActiveHold,
    Arm,
    Device,
    Draw,
    Member,
    MemberState,
    Order,
    Proven,
    Rollout,
    RolloutState,
    Told,
    quoted,
)
from controller.rollout.world import Command
from controller.store.lease import Fenced as Fenced
from controller.store.lease import check as check
from controller.store.lease import fence as fence
from controller.store.lease import take_over as take_over
from controller.store.tables import (
    commands,
    decisions,
    desired,
    devices,
    holds,
    looks,
    member_counts,
    members,
    meta,
    proven,
    releases,
    rollouts,
    stops,
)
from telemetry.store import bulk
from telemetry.store.prepared import Prepared

_IN = 5_000  # names in one question
# What every turn of the loop asks, put together once.
_DEVICES = Prepared(
    select(devices).where(devices.c.change > bindparam("since")).order_by(devices.c.change)
)
_HOLDS = Prepared(select(holds).order_by(holds.c.created_at, holds.c.id))
_IN_FORCE = Prepared(
    union_all(
        select(holds.c.id).where(holds.c.lifted_at.is_(None)),
        select(stops.c.id).where(stops.c.lifted_at.is_(None)),
    )
)
_COMMANDS = Prepared(select(commands).where(commands.c.state == "recorded").order_by(commands.c.id))
_REVISIONS = Prepared(select(rollouts.c.id, rollouts.c.revision))
_META = Prepared(select(meta.c.value).where(meta.c.key == bindparam("named")))
_ALL_WAITING = (
    select(desired.c.device, desired.c.body, desired.c.generation, desired.c.kind)
    .where(desired.c.published.is_(False))
    .order_by(desired.c.at)
    .limit(bindparam("most"))
)
_WAITING = Prepared(_ALL_WAITING)
_WAITING_BACK = Prepared(_ALL_WAITING.where(desired.c.kind != "install"))
_ANY_WAITS = Prepared(select(desired.c.device).where(desired.c.published.is_(False)).limit(1))
# What a decision writes, put together once too.
_NEW_META = Prepared(insert(meta))
_SET_META = Prepared(
    update(meta).where(meta.c.key == bindparam("named")).values(value=bindparam("new"))
)
_NEW_ROLLOUT, _NEW_LOOK = Prepared(insert(rollouts)), Prepared(insert(looks))
_NEW_DECISION = Prepared(insert(decisions))
_AS_OPENED = frozenset(
    {"id", "name", "fleet", "release", "digest", "artifacts", "opened_at", "seed", "pinned"}
)
_MOVES = tuple(n for n in rollouts.c.keys() if n not in _AS_OPENED | {"revision"})  # noqa: SIM118
_MOVE_ROLLOUT = Prepared(
    update(rollouts)
    .where(rollouts.c.id == bindparam("named"))
    .values({name: bindparam(f"new_{name}") for name in _MOVES})
    .values(revision=rollouts.c.revision + bindparam("raised"))
)
_STANDING = select(members.c.step, members.c.arm, members.c.state).where(
    members.c.rollout == bindparam("named"),
    members.c.device.in_(bindparam("devices", expanding=True)),
)
_NEW_COUNT = Prepared(insert(member_counts))
_COUNT = Prepared(
    update(member_counts)
    .where(
        member_counts.c.rollout == bindparam("r"),
        member_counts.c.step == bindparam("s"),
        member_counts.c.arm == bindparam("a"),
        member_counts.c.state == bindparam("t"),
    )
    .values(n=member_counts.c.n + bindparam("more"))
)
_LOOKED = Prepared(
    select(looks.c.at).where(looks.c.rollout == bindparam("named"), looks.c.at == bindparam("then"))
)
_PROVEN, _NEW_RELEASE = Prepared(insert(proven)), Prepared(insert(releases))
_UNPROVEN = Prepared(
    delete(proven).where(
        proven.c.fleet == bindparam("f"),
        proven.c.component == bindparam("c"),
        proven.c.hardware == bindparam("h"),
    )
)
_KNOWN_RELEASE = Prepared(select(releases.c.name).where(releases.c.name == bindparam("named")))
_SAID_AGAIN = ("digest", "document", "commit")
_SET_RELEASE = Prepared(
    update(releases)
    .where(releases.c.name == bindparam("named"))
    .values({name: bindparam(f"new_{name}") for name in _SAID_AGAIN})
)
_ALL_UNSENT = Prepared(update(desired).values(published=False))


def get_meta(conn: Connection, key: str, default: Any = None) -> Any:
    row = _META.first(conn, named=key)
    return default if row is None else row[0]


def put_meta(conn: Connection, key: str, value: Any) -> None:
    if not _SET_META.run(conn, named=key, new=value):
        _NEW_META.run(conn, key=key, value=value)


def delete_meta(conn: Connection, key: str) -> None:
    conn.execute(delete(meta).where(meta.c.key == key))


# -- reading --------------------------------------------------------------------------------------


def load_rollouts(conn: Connection) -> dict[str, Rollout]:
    """Unfinished rollouts and every other one that may still matter: all, oldest first."""
    rows = conn.execute(select(rollouts).order_by(rollouts.c.opened_at, rollouts.c.id))
    return {row.id: _rollout(dict(row._mapping)) for row in rows}


def revisions(conn: Connection) -> dict[str, int]:
    """Revision of each rollout: the API raises it when it records a command."""
    rows = _REVISIONS.all(conn)
    return {row.id: row.revision for row in rows}


def load_members(conn: Connection) -> dict[str, dict[str, Member]]:
    loaded: dict[str, dict[str, Member]] = {}
    for row in conn.execute(select(members)):
        loaded.setdefault(row.rollout, {})[row.device] = _member(dict(row._mapping))
    return loaded


def load_members_of(conn: Connection, ids: Sequence[str]) -> dict[str, dict[str, Member]]:
    """The members of these rollouts."""
    loaded: dict[str, dict[str, Member]] = {name: {} for name in ids}
    for row in conn.execute(select(members).where(members.c.rollout.in_(list(ids)))):
        loaded[row.rollout][row.device] = _member(dict(row._mapping))
    return loaded


def load_draws(conn: Connection, ids: Sequence[str]) -> dict[str, list[Draw]]:
    """Whom each step of these rollouts drew as its control, the oldest first."""
    loaded: dict[str, list[Draw]] = {name: [] for name in ids}
    drawn = (decisions.c.kind == "draw") & decisions.c.rollout.in_(list(ids))
    query = select(decisions.c.rollout, decisions.c.at, decisions.c.inputs).where(drawn)
    for row in conn.execute(query.order_by(decisions.c.id)):
        loaded[row.rollout].append(Draw.recorded(row.inputs, row.at))
    return loaded


def load_devices(conn: Connection, since: int) -> tuple[list[Device], int]:
    """Registry rows changed after `since`, and the newest change number."""
    rows = _DEVICES.all(conn, since=since)
    found = [
        Device(
            id=row.id,
            fleet=row.fleet,
            labels=row.labels,
            status=row.status,
            moved_at=row.moved_at,
            term=row.term,
        )
        for row in rows
    ]
    return found, rows[-1].change if rows else since


def load_holds(conn: Connection) -> tuple[list[ActiveHold], frozenset[str]]:
    """(holds in force, every digest that a hold ever named)."""
    rows = _HOLDS.all(conn)
    active = [
        ActiveHold(
            id=row.id,
            rollout=row.rollout,
            fleet=row.fleet,
            release=row.release,
            digest=row.digest,
            artifacts=frozenset(row.artifacts),
            to=row.to,
            reason=quoted(row.reason),
            actor=row.actor,
            created_at=row.created_at,
            scope=row.scope or {"all": True},
        )
        for row in rows
        if row.lifted_at is None
    ]
    return active, frozenset(row.digest for row in rows)


def in_force(conn: Connection) -> frozenset[str]:
    """Ids of the holds and stops in force now."""
    return frozenset(row.id for row in _IN_FORCE.all(conn))


def load_commands(conn: Connection) -> list[Command]:
    """Recorded and not yet done, in their order: pause before resume before promote at one time."""
    rows = _COMMANDS.all(conn)
    return [
        Command(
            id=row.id,
            kind=row.kind,
            rollout=row.rollout,
            body=row.body,
            actor=row.actor,
            reason=quoted(row.reason),
            at=row.at,
        )
        for row in rows
    ]


def load_orders(conn: Connection) -> dict[str, Order]:
    rows = conn.execute(select(desired)).all()
    return {row.device: _order(dict(row._mapping)) for row in rows}


def load_order(conn: Connection, device: str) -> tuple[Order, bytes] | None:
    """The last order of one device, and its envelope."""
    row = conn.execute(select(desired).where(desired.c.device == device)).first()
    return None if row is None else (_order(dict(row._mapping)), bytes(row.body))


def load_memberships(
    conn: Connection, device: str, *, rollout: str, digest: str
) -> list[tuple[Member, Mapping[str, Any]]]:
    """A device in the rollouts of this name that brought this release; with what they pinned."""
    query = (
        select(members, rollouts.c.pinned.label("pinned"))
        .join_from(members, rollouts, members.c.rollout == rollouts.c.id)
        .where(members.c.device == device, rollouts.c.name == rollout, rollouts.c.digest == digest)
    )
    return [(_member(dict(row._mapping)), row.pinned) for row in conn.execute(query)]


def load_proven(conn: Connection) -> dict[tuple[str, str, str], Proven]:
    return {
        (row.fleet, row.component, row.hardware): Proven(
            release=row.release, digest=row.digest, at=row.at
        )
        for row in conn.execute(select(proven))
    }


def load_releases(conn: Connection) -> dict[str, Mapping[str, Any]]:
    """Every release document ever accepted, oldest first."""
    rows = conn.execute(select(releases).order_by(releases.c.seen_at, releases.c.name))
    return {row.name: row.document for row in rows}


def any_waits(conn: Connection) -> bool:
    """Is there an order that the broker may not have yet?"""
    return _ANY_WAITS.first(conn) is not None


def unpublished(
    conn: Connection, limit: int = 5_000, *, forward: bool = True
) -> list[tuple[str, bytes, int, str]]:
    """(device, envelope, generation, kind) of orders that the broker may not have yet.

    Without `forward`, those alone that lead back.
    """
    rows = (_WAITING if forward else _WAITING_BACK).all(conn, most=limit)
    return [(row.device, row.body, row.generation, row.kind) for row in rows]


# -- writing --------------------------------------------------------------------------------------


def insert_rollout(conn: Connection, rollout: Rollout) -> None:
    _NEW_ROLLOUT.run(conn, **_values(rollout))


def update_rollout(conn: Connection, before: Rollout, after: Rollout) -> None:
    """Write what moves; the revision is raised by as much as the decision raised it."""
    values = {f"new_{name}": getattr(after, name) for name in _MOVES}
    values |= {"named": after.id, "raised": after.revision - before.revision}
    _MOVE_ROLLOUT.run(conn, **values)


def put_members(conn: Connection, rollout: str, changed: Sequence[Member]) -> None:
    """Insert or replace the rows of these members, and keep their counters."""
    newest = {member.device: member for member in changed}
    more = Counter((m.step, str(m.arm), str(m.state)) for m in newest.values())
    names = list(newest)
    for start in range(0, len(names), _IN):
        some = names[start : start + _IN]
        before = conn.execute(_STANDING, {"named": rollout, "devices": some})
        more.subtract((row.step, row.arm, row.state) for row in before)
    rows = ({"rollout": rollout, **_values(member)} for member in newest.values())
    bulk.upsert(conn, members, _in_columns(members, rows))
    _count_members(conn, rollout, more)


def _count_members(
    conn: Connection, rollout: str, more: Mapping[tuple[int, str, str], int]
) -> None:
    for (step, arm, state), n in sorted(more.items()):
        if not n:
            continue
        key = {"r": rollout, "s": step, "a": arm, "t": state, "more": n}
        if not _COUNT.run(conn, **key):
            row = {"rollout": rollout, "step": step, "arm": arm, "state": state, "n": n}
            _NEW_COUNT.run(conn, **row)


def insert_look(conn: Connection, rollout: str, at: float, numbers: Mapping[str, Any]) -> None:
    """What the evidence said; a second one of the same instant replaces nothing."""
    if _LOOKED.first(conn, named=rollout, then=at) is None:
        _NEW_LOOK.run(conn, rollout=rollout, at=at, numbers=dict(numbers))


def insert_decision(conn: Connection, values: Mapping[str, Any]) -> None:
    _NEW_DECISION.run(conn, **values)


def finish_command(conn: Connection, command: str, state: str, result: str, now: float) -> None:
    conn.execute(
        update(commands)
        .where(commands.c.id == command)
        .values(state=state, result=result[:2000], done_at=now)
    )


def prove(
    conn: Connection, fleet: str, component: str, hardware: str, value: Proven, rollout: str | None
) -> None:
    _UNPROVEN.run(conn, f=fleet, c=component, h=hardware)
    row = {"fleet": fleet, "component": component, "hardware": hardware, "rollout": rollout}
    what = {"release": value.release, "digest": value.digest, "at": value.at}
    _PROVEN.run(conn, **row, **what)


def put_release(conn: Connection, name: str, values: Mapping[str, Any]) -> None:
    if _KNOWN_RELEASE.first(conn, named=name) is None:
        _NEW_RELEASE.run(conn, name=name, **values)
    else:
        _SET_RELEASE.run(conn, named=name, **{f"new_{k}": values[k] for k in _SAID_AGAIN})


def put_orders(conn: Connection, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replace the orders of these devices; each starts unpublished."""
    bulk.upsert(conn, desired, _in_columns(desired, rows))


def _in_columns(table: Table, rows: Iterable[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    """Rows as `bulk` takes them: in the table's order, JSON as text.

    What the row before has too (one object, shared by alike orders) is not worded again.
    """
    columns = [(column.name, isinstance(column.type, JSON)) for column in table.columns]
    found, last = [], dict[str, tuple[Any, str]]()
    for row in rows:
        values = []
        for name, plain in columns:
            value = row[name]
            if plain:
                known = last.get(name)
                if known is None or known[0] is not value:
                    known = last[name] = (value, json.dumps(value))
                value = known[1]
            values.append(value)
        found.append(tuple(values))
    return found


def mark_published(conn: Connection, sent: Sequence[tuple[str, int]]) -> None:
    """The broker has these (device, generation); a newer order stays unpublished."""
    bulk.mark(conn, desired.c.published, sent, ("device", "generation"))


def unpublish(conn: Connection, names: Sequence[str]) -> None:
    """These devices have not got their order: it goes out again."""
    for start in range(0, len(names), 500):
        chunk = names[start : start + 500]
        conn.execute(update(desired).where(desired.c.device.in_(chunk)).values(published=False))


def unpublish_all(conn: Connection) -> int:
    """The broker forgot: everything is to be published again. Answers how many."""
    return _ALL_UNSENT.run(conn)


def clear_orders(conn: Connection, names: Sequence[str]) -> None:
    """A moved, retired or quarantined device has no orders any more."""
    conn.execute(delete(desired).where(desired.c.device.in_(list(names))))


# -- rows ⇄ dataclasses ---------------------------------------------------------------------------


def _values(row: Rollout | Member) -> dict[str, Any]:
    return {f.name: getattr(row, f.name) for f in fields(row)}


def _rollout(row: Mapping[str, Any]) -> Rollout:
    values = {f.name: row[f.name] for f in fields(Rollout)}
    return Rollout(**{**values, "state": RolloutState(row["state"])})


def _member(row: Mapping[str, Any]) -> Member:
    values = {f.name: row[f.name] for f in fields(Member)}
    return Member(**{**values, "state": MemberState(row["state"]), "arm": Arm(row["arm"])})


def _order(row: Mapping[str, Any]) -> Order:
    told = {
        component: Told(
            release=item["release"],
            digest=item["digest"],
            at=item["at"],
            rollout=item.get("rollout"),
        )
        for component, item in row["components"].items()
    }
    return Order(
        device=row["device"],
        term=row["term"],
        generation=row["generation"],
        attempt=row["attempt"],
        kind=row["kind"],
        components=told,
        at=row["at"],
    )
