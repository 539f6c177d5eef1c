"""What the loop knows by the control database: read once, then kept in step with what it records.

The database is the truth: after any failure the loop makes a new memory. What other processes
write (registry, commands, holds, stops, rules) is read again in every turn.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection

from controller.manifests.kinds import Release
from controller.registry_copy import RECOVERED
from controller.rollout import desired, recovery
from controller.rollout.model import ActiveHold, ActiveStop, Device
from controller.rollout.waves import Pinned
from controller.rollout.world import Command
from controller.store import approvals as approval_rows
from controller.store import rollouts as store
from controller.store import stops as stop_rows
from telemetry.report import DeviceRow


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What people want: as long as two of these are equal, nobody wants anything new."""

    holds: Sequence[ActiveHold] = ()
    stops: Sequence[ActiveStop] = ()
    rules: Mapping[str, Mapping[str, int]]
    granted: Mapping[str, str]


class Memory:
    def __init__(self, conn: Connection) -> None:
        self.rollouts = store.load_rollouts(conn)
        self.members = store.load_members(conn)
        active = [name for name, rollout in self.rollouts.items() if rollout.active]
        self.draws = store.load_draws(conn, active)
        self.orders = store.load_orders(conn)
        self.proven = store.load_proven(conn)
        self.documents = {
            name: Release.model_validate(document)
            for name, document in store.load_releases(conn).items()
        }
        self.commit: str | None = store.get_meta(conn, "head_commit")
        self.recovered_at: float | None = store.get_meta(conn, "recovered_at")
        self.recovered = store.get_meta(conn, RECOVERED) is not None
        self.restored = False
        self.doubted: bool = bool(store.get_meta(conn, "doubted"))  # as noted last
        self.ears: dict[str, Any] | None = store.get_meta(conn, "ears")  # as noted last
        self.catalog = desired.Catalog(releases=self.documents)
        self.pinned = {r.id: Pinned.from_json(r.pinned) for r in self.rollouts.values()}
        self.devices: dict[str, Device] = {}
        self.holds: list[ActiveHold] = []
        self.stops: list[ActiveStop] = []
        self.commands: list[Command] = []
        self.rules: dict[str, dict[str, int]] = {}
        self.granted: dict[str, str] = {}
        self.rejected: frozenset[str] = frozenset()
        self._fleets: dict[str, dict[str, None]] = {}  # fleet → its devices
        self.orders_wait = True  # is there one that the broker may not have yet?
        self._registry = 0

    @property
    def wishes(self) -> Wishes:
        return Wishes(holds=self.holds, stops=self.stops, rules=self.rules, granted=self.granted)

    @property
    def in_force(self) -> frozenset[str]:
        """Ids of the holds and stops that this turn knows."""
        return frozenset([*(hold.id for hold in self.holds), *(stop.id for stop in self.stops)])

    def read(self, conn: Connection) -> list[Device]:
        """Take in what others wrote; answers the devices whose registry rows changed."""
        changed, self._registry = store.load_devices(conn, self._registry)
        self.commands = store.load_commands(conn)
        self.read_holds(conn)
        self.stops = stop_rows.load(conn)
        self.orders_wait = store.any_waits(conn)
        self.rules, self.granted = approval_rows.load_rules(conn), approval_rows.load_granted(conn)
        for rollout, revision in store.revisions(conn).items():
            known = self.rollouts.get(rollout)
            if known is not None and known.revision != revision:  # the API recorded a command
                self.rollouts[rollout] = replace(known, revision=revision)
        for device in changed:
            before = self.devices.get(device.id)
            if before is not None and before.fleet != device.fleet:
                del self._fleets[before.fleet][device.id]
            self._fleets.setdefault(device.fleet, {})[device.id] = None
            self.devices[device.id] = device
        return changed

    def read_holds(self, conn: Connection) -> None:
        self.holds, self.rejected = store.load_holds(conn)

    def adopt(self, documents: Mapping[str, Release]) -> None:
        """These release documents are ours now, too."""
        self.documents.update(documents)
        self.catalog = desired.Catalog(releases=self.documents)

    def of_fleet(self, fleet: str) -> Collection[str]:
        return self._fleets.get(fleet, {}).keys()

    def newly_held(self, before: Sequence[ActiveHold]) -> frozenset[str]:
        """Fleets of the holds that came or went since then."""
        either = (h for h in (*before, *self.holds) if h not in before or h not in self.holds)
        return frozenset(hold.fleet for hold in either)

    def concerned(self, before: Sequence[ActiveHold], seen: Mapping[str, DeviceRow]) -> list[str]:
        """Devices that a new hold may send elsewhere, and the fleets of holds that were lifted.

        A hold is of one fleet: the others are not looked at, whatever they run.
        """
        found = [d for h in before if h not in self.holds for d in self.of_fleet(h.fleet)]
        new: dict[str, set[str]] = {}
        for hold in self.holds:
            if hold not in before:
                new.setdefault(hold.fleet, set()).update(hold.artifacts)
        for fleet, digests in new.items():
            found += [d for d in self.of_fleet(fleet) if self._has(d, seen.get(d), digests)]
        return found

    def _has(self, device: str, row: DeviceRow | None, digests: set[str]) -> bool:
        """Does this device run, or was it told, one of these?"""
        order = self.orders.get(device)
        running = row.components.values() if row is not None else ()
        told = order.components.values() if order is not None else ()
        return any(c.digest in digests for c in running) or any(c.digest in digests for c in told)

    def find_what_was_lost(self, seen: Mapping[str, DeviceRow]) -> bool:
        """Do devices obey words that the database does not know? It was wiped, or is a backup.

        Answers whether it is an older one than that.
        """
        lost = any(
            recovery.foreign(
                device, seen.get(device.id), self.orders.get(device.id), self.recovered_at
            )
            for device in self.devices.values()
        )
        older = lost and bool(self.rollouts)
        self.restored = self.restored or older
        self.recovered = self.recovered or (lost and not self.rollouts)
        return older
