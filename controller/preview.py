"""What a verb would reach, device by device, before anybody does it; and whom it has not reached.

Reads only: members, orders and the registry from the control database, the devices' last words from
telemetry. Where telemetry does not answer, the preview says so and counts what it can; the verbs
themselves never ask it. The set that a rollback would send each device to is composed by the same
pure function that composes the order (`controller.rollout.desired`).

Rules, in order, for each device that has, or may get, the rejected digest:

1. It cannot go back: the release is one-way, it ran nothing before, or what requires it stays.
2. It is offline: it goes back at its next contact, whenever that is.
3. It waits for its own safety (parked, landed, …): it said so in its last word.
4. Everybody else changes now.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, Engine, select

from controller.commands import Refused, found, may
from controller.manifests.kinds import Release
from controller.rollout import desired, scope
from controller.rollout.model import ActiveHold, Arm, Device, Member, MemberState, Order, Rollout
from controller.rollout.waves import Pinned
from controller.store import rollouts as store
from controller.store.tables import devices as device_table
from telemetry.report import DeviceRow
from telemetry.store.database import reading

SHOWN = 200  # devices named in each group; all are counted
HEARD = 360.0  # seconds without contact after which a device counts as offline
_NOT_TOLD = frozenset({MemberState.DRAWN, MemberState.LEFT})
Heard = Callable[[], Mapping[str, DeviceRow]]  # the last word of every device; may raise
_STAYS = "the release says that nothing goes back from it"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """One device, and what the verb means for it."""

    device: str
    word: str  # changes | offline | waiting | cannot
    why: str = ""
    also: tuple[str, ...] = ()  # other components that go back with it


@dataclass(slots=True)
class Fleet:
    """All that bears on the devices of one rollout's fleet."""

    rollout: Rollout
    pinned: Pinned | None  # None: pinned by an older version
    members: Mapping[str, Member]
    others: list[tuple[Rollout, Mapping[str, Member]]]
    devices: Mapping[str, Device]
    orders: Mapping[str, Order]
    holds: list[ActiveHold]
    catalog: desired.Catalog
    seen: Mapping[str, DeviceRow]
    telemetry: str  # "" or why it did not answer
    proven: Mapping[tuple[str, str, str], Any] = field(default_factory=dict)


def preview(
    engine: Engine,
    heard: Heard | None,
    *,
    kind: str,
    rollout: str,
    body: Mapping[str, Any],
    now: float,
) -> dict[str, Any]:
    """The blast radius of a verb on this rollout, without doing it; raises Refused."""
    with reading(engine) as conn:
        row = found(conn, rollout)
        may(row, kind)
        fleet = _load(conn, row, heard)
    part = _scope(body)
    states = Counter(str(m.state) for m in fleet.members.values() if m.arm is not Arm.CONTROL)
    told = sum(n for state, n in states.items() if state not in _NOT_TOLD)
    answer: dict[str, Any] = {
        "kind": kind,
        "rollout": row["id"],
        "name": row["name"],
        "fleet": row["fleet"],
        "release": row["release"],
        "revision": row["revision"],
        "members": dict(states),
        "scope": part,
        "telemetry": fleet.telemetry or "ok",
        "at": now,
    }
    if kind not in ("rollback", "hold"):
        open_ends = states.get("drawn", 0) + states.get("told", 0)
        sentence = f"{kind} {row['release']}: {open_ends} devices are not updated yet"
        return {**answer, "devices": sum(states.values()), "sentence": sentence}
    hold = _hold(row, body, kind, part, now)
    reached = list(_reached(fleet, hold, now))
    groups = {word: [r for r in reached if r.word == word] for word in _WORDS}
    untold = [
        m
        for m in fleet.members.values()
        if m.state is MemberState.DRAWN and m.arm is Arm.EXPOSED and _covered(fleet, hold, m.device)
    ]
    return {
        **answer,
        "to": hold.to,
        "devices": len(reached) if kind == "hold" else len(reached) - len(groups["cannot"]),
        "told": told,
        "untold": len(untold),
        **{word: _group(group) for word, group in groups.items()},
        "also": dict(Counter(name for r in reached for name in r.also)),
        "sentence": _sentence(kind, row, groups, len(untold), part),
    }


def recovery(
    engine: Engine, heard: Heard, *, rollout: str, after: str, limit: int, now: float
) -> tuple[dict[str, Any], list[Reached]]:
    """(the rollout and its hold, the devices that a rollback has not reached, by id)."""
    with reading(engine) as conn:
        row = found(conn, rollout)
        fleet = _load(conn, row, heard)
    holds = [h for h in fleet.holds if h.digest == row["digest"] and h.to != "stay"]
    if not holds:
        raise Refused(409, f"{row['name']}: no rollback of {row['release']} is in force")
    left: dict[str, Reached] = {}
    for hold in holds:
        for one in _reached(fleet, hold, now):
            left.setdefault(one.device, one)
    names = sorted(name for name in left if name > after)[:limit]
    counted = Counter(one.word for one in left.values())
    about = {
        "rollout": row["id"],
        "name": row["name"],
        "release": row["release"],
        "state": row["state"],
        "count": len(left),
        "groups": dict(counted),
        "telemetry": fleet.telemetry or "ok",
    }
    return about, [left[name] for name in names]


_WORDS = ("changes", "offline", "waiting", "cannot")


def _load(conn: Connection, row: Mapping[str, Any], heard: Heard | None) -> Fleet:
    rollouts = store.load_rollouts(conn)
    this = rollouts[row["id"]]
    same = {r.id: r for r in rollouts.values() if r.fleet == this.fleet}
    members = store.load_members_of(conn, list(same))
    holds, _ = store.load_holds(conn)
    known = {
        d.id: Device(
            id=d.id, fleet=d.fleet, labels=d.labels, status=d.status, moved_at=d.moved_at,
            term=d.term,
        )
        for d in conn.execute(select(device_table).where(device_table.c.fleet == this.fleet))
    }  # fmt: skip
    documents = {n: Release.model_validate(d) for n, d in store.load_releases(conn).items()}
    seen, fault = _heard(heard)
    return Fleet(
        rollout=this,
        pinned=Pinned.from_json(this.pinned) if this.pinned else None,
        members=members.get(this.id, {}),
        others=[(r, members.get(r.id, {})) for r in same.values()],
        devices=known,
        orders={d: o for d, o in store.load_orders(conn).items() if d in known},
        holds=[h for h in holds if h.fleet == this.fleet],
        catalog=desired.Catalog(releases=documents),
        seen={d: r for d, r in seen.items() if d in known},
        telemetry=fault,
        proven=store.load_proven(conn),
    )


def _heard(heard: Heard | None) -> tuple[Mapping[str, DeviceRow], str]:
    if heard is None:
        return {}, "not asked"
    try:
        return heard(), ""
    except Exception as error:  # noqa: BLE001 - whatever ails it, the people go on without it
        return {}, f"telemetry does not answer: {type(error).__name__}"


def _hold(
    row: Mapping[str, Any], body: Mapping[str, Any], kind: str, part: Mapping[str, Any], now: float
) -> ActiveHold:
    """The hold that the verb would make."""
    before = dict((row["flags"] or {}).get("before", {}))
    changed = [d for c, d in row["artifacts"].items() if before.get(c) != d]
    return ActiveHold(
        id="preview",
        rollout=row["name"],
        fleet=row["fleet"],
        release=row["release"],
        digest=row["digest"],
        artifacts=frozenset(changed or row["artifacts"].values()),
        to=str(body.get("to") or "previous") if kind == "rollback" else "stay",
        reason="preview",
        actor="preview",
        created_at=now,
        scope=part,
    )


def _reached(fleet: Fleet, hold: ActiveHold, now: float) -> Iterator[Reached]:
    for name, device in sorted(fleet.devices.items()):
        if not device.governed or not _covered(fleet, hold, name):
            continue
        row, order = fleet.seen.get(name), fleet.orders.get(name)
        ordered = {told.digest for told in order.components.values()} if order else set()
        runs = {part.digest for part in row.components.values()} if row else set()
        if hold.artifacts.isdisjoint(runs) and (
            hold.id != "preview" or hold.artifacts.isdisjoint(ordered)
        ):
            continue
        yield _one(fleet, hold, device, row, order, now)


def _one(
    fleet: Fleet,
    hold: ActiveHold,
    device: Device,
    row: DeviceRow | None,
    order: Order | None,
    now: float,
) -> Reached:
    if hold.to == "stay":
        return Reached(device=device.id, word="changes")
    if fleet.pinned is not None and not fleet.pinned.release.rollback.possible:
        return Reached(device=device.id, word="cannot", why=_STAYS)
    target = desired.compose(_place(fleet, hold, device, row, order), fleet.catalog, now)
    back = {c: t.digest for c, t in target.components.items()} if target else {}
    if target is None or not hold.artifacts.isdisjoint(back.values()):
        why = target.blocked[0] if target and target.blocked else "it ran nothing before"
        return Reached(device=device.id, word="cannot", why=f"{why}: waits for the fix-forward")
    running = row.components if row else {}
    also = tuple(
        sorted(
            c
            for c, digest in back.items()
            if c not in fleet.rollout.artifacts and c in running and running[c].digest != digest
        )
    )
    if row is None or not row.online or now - row.last_contact > HEARD:
        since = "never heard" if row is None else "offline"
        return Reached(device=device.id, word="offline", why=since, also=also)
    if row.blocked_by:
        return Reached(
            device=device.id, word="waiting", why=", ".join(map(str, row.blocked_by)), also=also
        )
    return Reached(device=device.id, word="changes", also=also)


def _place(
    fleet: Fleet, hold: ActiveHold, device: Device, row: DeviceRow | None, order: Order | None
) -> desired.Place:
    speaking, past = [], {}
    for rollout, members in fleet.others:
        member = members.get(device.id)
        if member is None:
            continue
        if rollout.active:
            speaking.append((rollout, member))
        if member.previous and member.state is not MemberState.DRAWN:
            past[rollout.name] = member
    proven = {
        component: value
        for (name, component, hardware), value in sorted(fleet.proven.items())
        if name == device.fleet and hardware in ("", device.hardware)
    }
    ours = [h for h in fleet.holds if h.whole or _covered(fleet, h, device.id)]
    return desired.Place(
        device=device,
        running=row.components if row else {},
        last=order,
        memberships=speaking,
        past=past,
        holds=[*ours, hold],
        stops=(),
        proven=proven,
    )


def _covered(fleet: Fleet, hold: ActiveHold, device: str) -> bool:
    member = fleet.members.get(device)
    return scope.covers(hold.scope, fleet.devices[device], member, fleet.pinned)


def _group(group: list[Reached]) -> dict[str, Any]:
    return {
        "count": len(group),
        "reasons": dict(Counter(one.why for one in group if one.why).most_common(20)),
        "devices": [one.device for one in group[:SHOWN]],
    }


def _sentence(
    kind: str,
    row: Mapping[str, Any],
    groups: Mapping[str, list[Reached]],
    untold: int,
    part: Mapping[str, Any],
) -> str:
    n = {word: len(group) for word, group in groups.items()}
    where = scope.words(part)
    head = f"{kind} {row['release']}" + (f" for {where}" if where else "")
    if kind == "hold":
        return f"{head}: {sum(n.values())} devices stay as they are, {untold} more are not told"
    said = [f"{n['changes']} devices change now"]
    if n["offline"]:
        said.append(f"{n['offline']} are offline and go back at their next contact")
    if n["waiting"]:
        why = Counter(one.why for one in groups["waiting"]).most_common(1)[0][0]
        said.append(f"{n['waiting']} wait for their own safety ({why})")
    if n["cannot"]:
        why = Counter(one.why for one in groups["cannot"]).most_common(1)[0][0]
        said.append(f"{n['cannot']} cannot go back ({why})")
    if untold:
        said.append(f"{untold} more are not told")
    return f"{head}: " + "; ".join(said)


def _scope(body: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return scope.checked(body.get("scope"))
    except ValueError as error:
        raise Refused(422, str(error), "/scope") from None
