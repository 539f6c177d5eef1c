"""What the invariant checker looks at: rows of both databases, and what was seen outside. Data.

`Tables` is what a live system shows; `Observed` is what the simulation and the process tests saw of
wire and devices beside it. `Look` is both, indexed. Times are Unix seconds by the server's clock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from controller.manifests.kinds import Release
from controller.rollout import scope
from controller.rollout.desired import Catalog
from controller.rollout.model import (
    Arm,
    Device,
    Member,
    MemberState,
    Proven,
    Rollout,
    RolloutState,
)
from controller.rollout.proven import Proofs
from controller.rollout.waves import Pinned
from device_agent.protocol import Desired, ProtocolError, open_envelope
from telemetry.report import DeviceRow

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One broken promise."""

    invariant: str  # I1 … I14
    what: str
    do: str

    def __str__(self) -> str:
        return f"{self.invariant}: {self.what}. {self.do}"


@dataclass(frozen=True, slots=True)
class Counted:
    """What the store remembers of one boot: everything up to `high` but the `missing` bits."""

    high: int
    missing: int

    def has(self, seq: int) -> bool:
        behind = self.high - seq - 1
        return seq <= self.high and (behind < 0 or not self.missing >> behind & 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Summed:
    """One counter of one device, added up in three ways that must agree."""

    device: str
    counter: str
    messages: float
    hours: float
    ever: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Tables:
    """The rows of both databases; columns as in `controller.store.tables`."""

    term: int  # of the controller's lease
    devices: Sequence[Row]
    releases: Sequence[Row]
    rollouts: Sequence[Row]
    members: Sequence[Row]
    decisions: Sequence[Row]
    commands: Sequence[Row]
    holds: Sequence[Row]
    stops: Sequence[Row]
    desired: Sequence[Row]
    audit: Sequence[Row]
    proven: Sequence[Row]
    reports: Sequence[DeviceRow] = ()
    health: Sequence[tuple[str, str, int]] = ()  # (device, boot, seq) of every raw message kept
    boots: Mapping[tuple[str, str], Counted] = field(default_factory=dict)
    sums: Sequence[Summed] = ()
    hearing_at: float | None = None  # when the service last heard its own probe


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """An order that left, in the order of leaving."""

    at: float
    device: str
    body: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """A release that a device itself saw starting."""

    at: float
    digest: str
    kind: str  # of the order that it followed, or "back"
    guards: tuple[str, ...] = ()  # preconditions of the order that were not true
    late: bool = False  # installed under a lease that had passed


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """The truth about one device, from outside of what it reports."""

    device: str
    active: Mapping[str, str]  # component → digest that really runs
    running: Mapping[str, str]  # what its journal says
    had: frozenset[str]  # digests that were ever whole on its disk
    starts: Sequence[Start] = ()
    acknowledged: frozenset[tuple[str, int]] = frozenset()  # (boot, seq) that it may forget
    settled: bool = False  # nothing under way, in touch for a while
    honest: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What was seen beside the tables."""

    sent: Sequence[Sent] = ()
    hold_marks: Mapping[str, int] = field(default_factory=dict)  # hold → orders gone before it
    lift_marks: Mapping[str, int] = field(
        default_factory=dict
    )  # hold → orders gone before its lift
    take_overs: Sequence[tuple[int, float]] = ()  # (term, when)
    devices: Sequence[Seen] = ()
    deaf: Sequence[tuple[float, float]] = ()  # [from, to] in which nothing could be heard
    keys: Mapping[str, str] = field(default_factory=dict)  # keyid → public key of the director


@dataclass(frozen=True)
class Look:
    tables: Tables
    seen: Observed
    now: float
    grace: float

    @cached_property
    def devices(self) -> dict[str, Row]:
        return {row["id"]: row for row in self.tables.devices}

    @cached_property
    def reports(self) -> dict[str, DeviceRow]:
        return {row.device: row for row in self.tables.reports}

    @cached_property
    def truths(self) -> dict[str, Seen]:
        return {one.device: one for one in self.seen.devices}

    @cached_property
    def in_force(self) -> list[Row]:
        return [row for row in self.tables.holds if row["lifted_at"] is None]

    @cached_property
    def active_at(self) -> float:
        """When the controller last wrote something: what is younger it has not seen yet."""
        moments = [row["updated_at"] for row in self.tables.rollouts]
        moments += [row["at"] for row in self.tables.decisions]
        moments += [row["at"] for row in self.tables.desired]
        return max(moments, default=0.0)

    @cached_property
    def orders(self) -> dict[str, tuple[Desired | None, str]]:
        """device → (its order as signed, what is wrong with the signature)."""
        return {row["device"]: self.open(bytes(row["body"])) for row in self.tables.desired}

    def open(self, body: bytes) -> tuple[Desired | None, str]:
        """An order that left more than once is opened once."""
        if body not in self._opened:
            self._opened[body] = self._open(body)
        return self._opened[body]

    @cached_property
    def _opened(self) -> dict[bytes, tuple[Desired | None, str]]:
        return {}

    def _open(self, body: bytes) -> tuple[Desired | None, str]:
        try:
            order, signed, signatures = open_envelope(body)
        except ProtocolError as error:
            return None, str(error)
        if not self.seen.keys:
            return order, ""
        for one in signatures:
            public = self.seen.keys.get(one.keyid)
            if public and _signed(public, one.sig, signed):
                return order, ""
        return order, "no director key of ours signed it"

    def honest(self, device: str) -> bool:
        truth = self.truths.get(device)
        return truth is None or truth.honest

    def runs(self, device: str) -> set[str]:
        row = self.reports.get(device)
        found = {report.digest for report in row.components.values()} if row else set()
        truth = self.truths.get(device)
        return found | set(truth.active.values()) if truth else found

    def covers(self, hold: Row, device: Row) -> bool:
        """Is this device in the hold's scope? By the same rule as the orders."""
        if hold["fleet"] != device["fleet"]:
            return False
        part = hold.get("scope") or scope.EVERYBODY
        if "all" in part:
            return True
        one = Device(
            id=device["id"], fleet=device["fleet"], labels=device["labels"] or {},
            status=device["status"],
        )  # fmt: skip
        named = [
            row
            for row in self.tables.rollouts
            if row["name"] == hold["rollout"] and row["digest"] == hold["digest"]
        ]
        return any(
            scope.covers(part, one, self._member(row["id"], one.id), self._pinned(row))
            for row in named
        )

    def stays(self, device: str, hold: Row) -> bool:
        """Is the way back that this hold asks for not open to the device yet, or frozen?"""
        for row in self.tables.rollouts:
            flags = row["flags"] or {}
            if row["state"] != RolloutState.ROLLING_BACK or flags.get("hold") != hold["id"]:
                continue
            if flags.get("frozen"):
                return True
            if "back_step" not in flags:
                continue
            member = self._member(row["id"], device)
            if member is not None and member.step > flags["back_step"]:
                return True
        return False

    def _member(self, rollout: str, device: str) -> Member | None:
        for row in self.tables.members:
            if row["rollout"] == rollout and row["device"] == device:
                values = {f.name: row[f.name] for f in fields(Member)}
                return Member(
                    **{**values, "state": MemberState(row["state"]), "arm": Arm(row["arm"])}
                )
        return None

    @staticmethod
    def _pinned(row: Row) -> Pinned | None:
        return Pinned.from_json(row["pinned"]) if row["pinned"] else None

    def elsewhere(self, device: str, hold: Row, component: str) -> bool:
        """Is there another set that this device could run instead of the rejected one?"""
        if hold["to"] not in ("previous", "stay"):
            return True
        row, fleet = self.devices.get(device), hold["fleet"]
        if row is None:
            return False
        held = {d for one in self.in_force if self.covers(one, row) for d in one["artifacts"]}
        for member in self.tables.members:
            own = (member["previous"] or {}).get(component)
            if member["device"] == device and own and own["digest"] not in held:
                return True
        one = Device(id=device, fleet=fleet, labels=row["labels"] or {}, status=row["status"])
        return component in self._proofs.newest(one, rejected=frozenset(held))

    @cached_property
    def _proofs(self) -> Proofs:
        documents = [Release.model_validate(row["document"]) for row in self.tables.releases]
        return Proofs(
            {
                (row["fleet"], row["component"], row["hardware"]): Proven(
                    release=row["release"], digest=row["digest"], at=row["at"]
                )
                for row in self.tables.proven
            },
            [
                Rollout(**{f.name: row[f.name] for f in fields(Rollout)})
                for row in self.tables.rollouts
                if row["state"] == RolloutState.COMPLETED
            ],
            Catalog(releases={one.name: one for one in documents}),
            {
                row["fleet"]: row["pinned"]["fleet"].get("baseline", {})
                for row in self.tables.rollouts
                if row["pinned"]
            },
        )


def _signed(public: str, signature: str, body: bytes) -> bool:
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))
        key.verify(bytes.fromhex(signature), body)
    except (InvalidSignature, ValueError):
        return False
    return True
