"""Whom a hold reaches, device by device, and what it means for each.

Reads only: members, orders and the registry from the control database, the devices' last words from
telemetry. The set that a rollback would send each device to is composed by the same pure function
that composes the order (`controller.rollout.desired`); devices of which it would read the same are
composed once.

Rules, in order, for each device that has, or may get, the rejected digest:

1. It cannot go back: the release is one-way, it ran nothing before, or what requires it stays.
2. It is offline: it goes back at its next contact, whenever that is.
3. It waits for its own safety (parked, landed, …): it said so in its last word.
4. Everybody else changes now.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection

from controller.manifests.kinds import Release
from controller.rollout import desired, retreat, scope
from controller.rollout.model import ActiveHold, Device, Member, Order, Rollout
from controller.rollout.proven import Proofs
from controller.rollout.waves import Pinned
from controller.store import reach as rows
from controller.store import rollouts as store
from telemetry.report import DeviceRow

WORDS = ("changes", "offline", "waiting", "cannot")
HEARD = 360.0  # seconds without contact after which a device counts as offline
Heard = Callable[[], Mapping[str, DeviceRow]]  # the last word of every device; may raise
_STAYS = "the release says that nothing goes back from it"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """One device, and what the verb means for it."""

    device: str
    word: str  # changes | offline | waiting | cannot
    why: str = ""
    also: tuple[str, ...] = ()  # other components that go back with it


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """The devices of one rollout's fleet, and what they were told and said."""

    rollout: Rollout
    pinned: Pinned | None  # None: pinned by an older version
    members: Mapping[str, Member]  # of this rollout
    rollouts: Sequence[Rollout]  # all of the fleet, oldest first
    devices: Mapping[str, Device]
    orders: Mapping[str, Order]
    holds: Sequence[ActiveHold]
    catalog: desired.Catalog
    seen: Mapping[str, DeviceRow]
    telemetry: str  # "" or why it did not answer
    proven: Mapping[tuple[str, str, str], Any] = field(default_factory=dict)

    def covers(self, hold: ActiveHold, device: str) -> bool:
        return scope.covers(hold.scope, self.devices[device], self.members.get(device), self.pinned)


def load(conn: Connection, rollout: str, heard: Heard | None, *, running: bool = False) -> Fleet:
    """`running`: only the devices that run what this rollout brings; without, all of the fleet."""
    every = store.load_rollouts(conn)
    this = every[rollout]
    seen, fault = _heard(heard)
    only = _running(seen, frozenset(this.artifacts.values())) if running else None
    documents = {n: Release.model_validate(d) for n, d in store.load_releases(conn).items()}
    holds, _ = store.load_holds(conn)
    return Fleet(
        rollout=this,
        pinned=Pinned.from_json(this.pinned) if this.pinned else None,
        members=rows.members_of(conn, this.id, only),
        rollouts=[one for one in every.values() if one.fleet == this.fleet],
        devices=rows.registry(conn, this.fleet, only),
        orders=rows.orders(conn, this.fleet, only),
        holds=[h for h in holds if h.fleet == this.fleet],
        catalog=desired.Catalog(releases=documents),
        seen=seen,
        telemetry=fault,
        proven=store.load_proven(conn),
    )


def _running(seen: Mapping[str, DeviceRow], digests: frozenset[str]) -> list[str]:
    return [
        name
        for name, row in seen.items()
        if any(part.digest in digests for part in row.components.values())
    ]


def _heard(heard: Heard | None) -> tuple[Mapping[str, DeviceRow], str]:
    if heard is None:
        return {}, "not asked"
    try:
        return heard(), ""
    except Exception as error:  # noqa: BLE001 - whatever ails it, the people go on without it
        return {}, f"telemetry does not answer: {type(error).__name__}"


def reached(conn: Connection, fleet: Fleet, hold: ActiveHold, now: float) -> list[Reached]:
    """By device. `hold.id` "preview": one that is not in force yet, so that orders count too."""
    names = [name for name in sorted(fleet.devices) if _concerned(fleet, hold, name)]
    if hold.to == "stay":
        return [Reached(device=name, word="changes") for name in names]
    if fleet.pinned is not None and not fleet.pinned.release.rollback.possible:
        return [Reached(device=name, word="cannot", why=_STAYS) for name in names]
    past = _Past.of(conn, fleet, hold, names)
    composed: dict[Hashable, desired.Target | None] = {}
    found = []
    for name in names:
        place = _place(fleet, hold, name, past)
        key = _alike(place)
        if key not in composed:
            composed[key] = desired.compose(place, fleet.catalog, now)
        found.append(_one(fleet, hold, name, composed[key], now))
    return found


def _concerned(fleet: Fleet, hold: ActiveHold, name: str) -> bool:
    """Does this device run the rejected digest, or may it get it?"""
    if not fleet.devices[name].governed or not fleet.covers(hold, name):
        return False
    row, order = fleet.seen.get(name), fleet.orders.get(name)
    if row is not None and any(p.digest in hold.artifacts for p in row.components.values()):
        return True
    ordered = order.components.values() if order else ()
    return hold.id == "preview" and any(told.digest in hold.artifacts for told in ordered)


@dataclass(frozen=True, slots=True)
class _Past:
    """What `desired.compose` may ask for: memberships, and what is proven."""

    speaking: Sequence[tuple[Rollout, Mapping[str, Member]]]  # of active rollouts, oldest first
    before: Mapping[str, Mapping[str, Member]]  # rollout name → device → its newest that knows
    proofs: Proofs

    @classmethod
    def of(cls, conn: Connection, fleet: Fleet, hold: ActiveHold, names: Sequence[str]) -> _Past:
        rejected = hold.artifacts.union(*(h.artifacts for h in fleet.holds))
        by_name: dict[str, list[str]] = {}
        for rollout in reversed(fleet.rollouts):
            by_name.setdefault(rollout.name, []).append(rollout.id)
        ours = {fleet.rollout.id: fleet.members}
        return cls(
            speaking=[
                (one, ours.get(one.id) or rows.members_of(conn, one.id, names))
                for one in fleet.rollouts
                if one.active
            ],
            before={
                name: rows.newest_told(conn, ids, names, rejected) for name, ids in by_name.items()
            },
            proofs=Proofs(
                fleet.proven,
                fleet.rollouts,
                fleet.catalog,
                {fleet.rollout.fleet: fleet.pinned.fleet.baseline} if fleet.pinned else {},
            ),
        )


def _place(fleet: Fleet, hold: ActiveHold, name: str, past: _Past) -> desired.Place:
    device, row = fleet.devices[name], fleet.seen.get(name)
    ours = [h for h in fleet.holds if h.whole or fleet.covers(h, name)]
    return desired.Place(
        device=device,
        running=row.components if row else {},
        last=fleet.orders.get(name),
        memberships=[(r, members[name]) for r, members in past.speaking if name in members],
        past={key: members[name] for key, members in past.before.items() if name in members},
        holds=[*ours, hold],
        stops=(),
        failed=retreat.failed_forward(row, fleet.orders.get(name)),
        proven=past.proofs.newest(
            device, rejected=hold.artifacts.union(*(h.artifacts for h in ours))
        ),
    )


def _alike(place: desired.Place) -> Hashable:
    """Places with the same key are composed alike: all that `compose` reads but the clock, with no
    stop among it, so that of the device itself only what is proven for it counts."""
    last = place.last
    return (
        tuple((c, one.digest) for c, one in sorted(place.proven.items())),
        tuple((c, r.release, r.digest, r.committed) for c, r in sorted(place.running.items())),
        None if last is None else (last.kind, tuple(sorted(last.components.items()))),
        tuple((r.id, m.arm, m.state, m.attempt, m.told_at) for r, m in place.memberships),
        tuple((name, str(m.previous)) for name, m in place.past.items()),
        tuple(h.id for h in place.holds),
        place.failed,
    )


def _one(
    fleet: Fleet, hold: ActiveHold, name: str, target: desired.Target | None, now: float
) -> Reached:
    back = {c: t.digest for c, t in target.components.items()} if target else {}
    if target is None or not hold.artifacts.isdisjoint(back.values()):
        why = target.blocked[0] if target and target.blocked else "it ran nothing before"
        return Reached(device=name, word="cannot", why=f"{why}: waits for the fix-forward")
    row = fleet.seen.get(name)
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
        return Reached(device=name, word="offline", why=since, also=also)
    if row.blocked_by:
        why = ", ".join(map(str, row.blocked_by))
        return Reached(device=name, word="waiting", why=why, also=also)
    return Reached(device=name, word="changes", also=also)
