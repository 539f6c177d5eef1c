"""Brings orders up to what was decided: composes, signs and records those of the touched devices.

Rules, in order:

1. Who was touched waits here, the urgent first (a rollback's devices), each once.
2. A part is composed at a time, small at first: its orders are on the wire while the others are
   still being signed. Nobody is forgotten by a kill: after a start everybody waits.
3. Only an order that differs from the last one is written; its generation is above all that the
   device has seen.
4. A device that obeys a lost memory has perhaps more to tell than we have heard: while we were away
   it went on. It is told nothing but a way back before we have heard it for a while.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from controller.orders import Issuer
from controller.press import Press
from controller.rollout import desired, holdout, recovery, retreat, scope, withholding
from controller.rollout.follow import LINK_WAS_DOWN
from controller.rollout.model import (
    ActiveHold,
    Device,
    Member,
    MemberState,
    Order,
    Proven,
    Rollout,
    RolloutState,
)
from controller.rollout.proven import Proofs
from controller.rollout.world import World
from device_agent.protocol import Kind, Reason, State
from telemetry.report import DeviceRow

# Seconds before one order is issued again: a rollback that failed on its device, and a lease that
# has passed by the device's clock (one that is wrong by years would ask for ever, at each report).
AGAIN = 300.0
SETTLES = 20.0  # seconds in touch until a device has told what it had to tell


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one transaction records: new orders with their rows, and devices that have none now."""

    devices: Sequence[str] = ()  # all that were looked at
    orders: Sequence[Order] = ()
    rows: Sequence[dict[str, Any]] = ()
    gone: Sequence[str] = ()


class Dispatch:
    def __init__(self, issuer: Issuer, members: Mapping[str, Iterable[str]]) -> None:
        """`members`: rollout → its devices, the oldest rollout first."""
        self._issuer = issuer
        self._urgent: dict[str, None] = {}
        self._rest: dict[str, None] = {}
        self._again: dict[str, float] = {}  # device → when its order is issued once more
        self._strangers: dict[str, float | None] = {}  # who obeys a lost memory → in touch since
        self._began: float | None = None
        self._memberships: dict[str, tuple[str, ...]] = {}
        for rollout, devices in members.items():
            self.joined(rollout, devices)

    def __len__(self) -> int:
        return len(self._urgent) + len(self._rest)

    def __contains__(self, device: object) -> bool:
        """Does its order still have to be composed?"""
        return device in self._urgent or device in self._rest

    @property
    def urgent(self) -> bool:
        return bool(self._urgent)

    def touch(self, devices: Iterable[str], *, urgent: bool = False) -> None:
        """The orders of these may have to change."""
        if not urgent:
            self._rest.update(dict.fromkeys(devices))
            return
        for device in devices:
            self._rest.pop(device, None)
            self._urgent[device] = None

    def heard(self, devices: Iterable[str]) -> None:
        """These were heard, with nothing new to say."""
        self.touch(name for name in devices if self._strangers.get(name, 0.0) is None)

    def due(self, now: float) -> set[str]:
        """Devices whose order is issued once more."""
        due = {name for name, at in self._again.items() if at <= now}
        self._again = {name: at for name, at in self._again.items() if name not in due}
        return due

    def waits(self, until: float) -> bool:
        """Is there a device whose order comes once more by then?"""
        return any(at <= until for at in self._again.values())

    def joined(self, rollout: str, devices: Iterable[str]) -> None:
        """These are members of that rollout now, the newest of theirs."""
        for device in devices:
            known = self._memberships.get(device, ())
            if rollout not in known:
                self._memberships[device] = (*known, rollout)

    def withholds(self, world: World, device: str) -> bool:
        """Does a hold reject what this device was told last? Such an order does not leave again.

        It stood before the hold, and there is no other set: the device runs it, or never came.
        """
        order, row, known = world.orders.get(device), world.seen.get(device), world.devices
        if order is None or device not in known:
            return False
        memberships = self._memberships.get(device, ())
        holds = (
            hold
            for hold in world.holds
            if hold.fleet == known[device].fleet
            and _covers(world, hold, known[device], memberships)
        )
        return withholding.rejected(order, row, holds)

    def compose(self, world: World, most: int, now: float, *, before: float | None) -> Part:
        """The next part: at most so many devices. `before`: when a lost database was found."""
        names = self._take(most)
        self._began = now if self._began is None else self._began
        view = _View(world=world, now=now)
        press = Press(self._issuer, world.catalog, now)
        orders, rows, gone = [], [], []
        for name in names:
            device = world.devices.get(name)
            if device is None:
                continue
            row, last = world.seen.get(name), world.orders.get(name)
            if last is not None and (not device.governed or _moved_since(device, last)):
                gone.append(name)
                last = None
            if not device.governed:
                continue
            place = view.place(device, row, last, self._memberships.get(name, ()), before)
            made = self._order(press, world, place, row, now)
            if made is not None:
                orders.append(made[0])
                rows.append(made[1])
        press.seal(rows)
        return Part(devices=names, orders=orders, rows=rows, gone=gone)

    def _take(self, most: int) -> list[str]:
        source = self._urgent or self._rest
        names = sorted(source) if len(source) <= most else list(islice(source, most))
        for name in names:
            del source[name]
        return names

    def _order(
        self,
        press: Press,
        world: World,
        place: desired.Place,
        row: DeviceRow | None,
        now: float,
    ) -> tuple[Order, dict[str, Any]] | None:
        target = desired.compose(place, world.catalog, now)
        if target is None:
            return None
        last = place.last
        again = (
            place.foreign
            or self._stale(last, row, now)
            or _back_there(place, target)
            or _told_once_more(place)
            or (place.failed and self._excused(world, place))
        )
        if not (again or desired.differs(target, last, place.running)):
            return None
        if last is None and row is None:
            return None  # never heard and never told: its first report says what it runs
        if not _may_go(world, place, target):
            return None
        if place.foreign and not _leads_away(place, target) and not self._settled(row, now):
            return None
        return press.order(place.device, target, last, row)

    def _excused(self, world: World, place: desired.Place) -> bool:
        """Did it go back for want of a link while ours was down, and miss the rollout's end?"""
        last, device = place.last, place.device.id
        return last is not None and any(
            (member := world.members[name][device]).reason == LINK_WAS_DOWN
            and member.updated_at >= last.at
            and world.rollouts[name].state is RolloutState.COMPLETED
            for name in self._memberships.get(device, ())
        )

    def _settled(self, row: DeviceRow | None, now: float) -> bool:
        """Has this stranger been in touch with us for long enough? Not yet: noted."""
        if self._began is None or row is None:
            return False
        since = self._strangers.get(row.device)
        if since is None and row.last_contact > self._began:
            since = now
        self._strangers[row.device] = since
        if since is not None and now < since + SETTLES:
            self._again[row.device] = since + SETTLES
            return False
        return since is not None

    def _stale(self, last: Order | None, row: DeviceRow | None, now: float) -> bool:
        """Must the same order go out again, under a new generation? Not yet: noted."""
        if last is None or not _asks_again(last, row):
            return False
        if now > last.at + AGAIN:
            return True
        self._again[last.device] = last.at + AGAIN + 1
        return False


@dataclass(slots=True, kw_only=True)
class _View:
    """What many devices of one part share, worked out once."""

    world: World
    now: float
    _holds: dict[str, tuple[list[ActiveHold], frozenset[str]]] = field(default_factory=dict)
    _proofs: Proofs | None = None
    _withholding: dict[str, list[Rollout]] = field(default_factory=dict)

    def place(
        self,
        device: Device,
        row: DeviceRow | None,
        last: Order | None,
        memberships: Sequence[str],
        before: float | None,
    ) -> desired.Place:
        world, fleet = self.world, device.fleet
        holds, rejected = self._held(device, memberships)
        speaking: list[tuple[Rollout, Member]] = []
        past: dict[str, Member] = {}
        stays = set()
        for name in memberships:
            member, rollout = world.members[name][device.id], world.rollouts[name]
            if retreat.stays(rollout, member):
                stays.add(str(rollout.flags.get("hold")))
            if rollout.active and rollout.fleet == fleet:
                speaking.append((rollout, member))
            if member.previous and member.state is not MemberState.DRAWN:
                known = past.get(rollout.name)
                if known is None or member.leads_back(rejected) or not known.leads_back(rejected):
                    past[rollout.name] = member
        declared = world.head.manifests.fleets.get(fleet) if world.head else None
        return desired.Place(
            device=device,
            running=row.components if row else {},
            last=last,
            memberships=speaking,
            past=past,
            holds=holds,
            stops=world.stops,
            proven=self._proven_for(device, rejected),
            on_unknown=str(declared.on_unknown) if declared else "keep",
            stays=frozenset(stays),
            begun=retreat.begun(row, last),
            failed=retreat.failed_forward(row, last),
            foreign=recovery.foreign(device, row, last, before),
        )

    def _held(
        self, device: Device, memberships: Sequence[str]
    ) -> tuple[Sequence[ActiveHold], frozenset[str]]:
        """The holds that cover the device, and what they reject."""
        if device.fleet not in self._holds:
            holds = [hold for hold in self.world.holds if hold.fleet == device.fleet]
            self._holds[device.fleet] = holds, _rejected(holds)
        holds, rejected = self._holds[device.fleet]
        if all(hold.whole for hold in holds):
            return holds, rejected
        some = [h for h in holds if _covers(self.world, h, device, memberships)]
        return some, _rejected(some)

    def _proven_for(self, device: Device, rejected: frozenset[str]) -> Mapping[str, Proven]:
        world, fleet = self.world, device.fleet
        if self._proofs is None:
            declared = world.head.manifests.fleets if world.head is not None else {}
            baselines = {name: one.baseline for name, one in declared.items()}
            rollouts = list(world.rollouts.values())
            self._proofs = Proofs(world.proven, rollouts, world.catalog, baselines)
        if fleet not in self._withholding:
            self._withholding[fleet] = [
                rollout
                for rollout in world.rollouts.values()
                if rollout.fleet == fleet
                and rollout.state is RolloutState.COMPLETED
                and world.pinned[rollout.id].rollout.holdout is not None
            ]
        without = frozenset[str]()
        if self._withholding[fleet]:
            without = holdout.withheld(
                self._withholding[fleet], world.pinned, fleet, device.id, self.now
            )
        return self._proofs.newest(device, without=without, rejected=rejected)


def _rejected(holds: Sequence[ActiveHold]) -> frozenset[str]:
    return frozenset[str]().union(*(hold.artifacts for hold in holds))


def _covers(world: World, hold: ActiveHold, device: Device, memberships: Sequence[str]) -> bool:
    """Is the device in the hold's scope? Steps and cohorts are those of the hold's rollout."""
    if hold.whole:
        return True
    if scope.named(hold.scope):  # by who it is, not by where it stands in a rollout
        return scope.covers(hold.scope, device, None, None)
    for name in memberships:
        rollout = world.rollouts[name]
        if rollout.name == hold.rollout and rollout.digest == hold.digest:
            member = world.members[name][device.id]
            if scope.covers(hold.scope, device, member, world.pinned.get(name)):
                return True
    return False


def _back_there(place: desired.Place, target: desired.Target) -> bool:
    """Is what it failed at the only way away from what it runs? Then it is told that once more."""
    leads_away = place.failed and target.kind is Kind.ROLLBACK
    return leads_away and desired.moves(target, place.running)


def _told_once_more(place: desired.Place) -> bool:
    """Has a rollout told it again, after it went back from this very order? (`rollout.follow`)"""
    last = place.last
    if last is None or not place.failed:
        return False
    told = (m.told_at for _, m in place.memberships if m.state is MemberState.TOLD)
    return any(at is not None and at > last.at for at in told)


def _leads_away(place: desired.Place, target: desired.Target) -> bool:
    """Back, or from an order that a hold has rejected: that never waits."""
    held = {digest for hold in place.holds for digest in hold.artifacts}
    told = place.last.components.values() if place.last is not None else ()
    return target.kind is Kind.ROLLBACK or any(one.digest in held for one in told)


def _may_go(world: World, place: desired.Place, target: desired.Target) -> bool:
    """Going back always; forward, or by a lost memory, only with Git and telemetry at hand."""
    head = world.head
    if target.kind is not Kind.INSTALL:
        return True
    if place.foreign:
        return head is not None and head.heard and not world.blind
    if not desired.moves(target, place.running):
        return True
    return head is not None and head.asked and not world.blind


def _moved_since(device: Device, order: Order) -> bool:
    return device.moved_at is not None and device.moved_at > order.at


def _asks_again(last: Order | None, row: DeviceRow | None) -> bool:
    """Does it wait for a lease, or could it not go back for want of a download or a disk?"""
    if last is None or row is None or row.generation != last.generation:
        return False
    if last.kind == Kind.INSTALL:
        return Reason.LEASE_EXPIRED in row.blocked_by
    return last.kind == Kind.ROLLBACK and row.state is State.FAILED
