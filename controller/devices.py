"""The registry: which devices exist, whose they are, and how they get in and out.

It alone changes device rows, each with an audit row in the same transaction. What a device runs is
telemetry's knowledge; what it must run is the loop's.

Rules, in order:

1. Ids match `protocol.ID`; the names of the broker's services are taken; labels are the server's.
2. A one-time token is shown once and kept hashed; a new one makes the older ones worthless.
3. An enrolled device gets no second token: `replace` says that the board is another one.
4. The database is written first, the broker second: a broker that missed it is filled by the claim
   of the device or by `sync`. Rights are taken away in the same order.
5. retire, quarantine and replace end the device's session at once.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from sqlalchemy import Connection, Engine

from controller import audit
from controller.broker_roles import SERVICES, device_password
from controller.store import devices as store
from device_agent.protocol import ID
from telemetry.store.database import reading, writing

TOKEN_LASTS = 24 * 3600.0
MOST_AT_ONCE = 10_000
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,62}")
_MOST_LABELS = 64


class Accounts(Protocol):
    """What the registry asks of the broker: `broker_admin.BrokerAdmin`."""

    def add_devices(self, devices: Iterable[tuple[str, str]]) -> None: ...

    def remove_devices(self, devices: Sequence[str]) -> None: ...

    def list_devices(self) -> set[str]: ...

    def ensure_services(self, secret: bytes) -> None: ...


class DeviceRefused(Exception):
    """A change of the registry that was not made. `code` is the HTTP status that says why."""

    def __init__(self, code: int, message: str, pointer: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.pointer = pointer


@dataclass(frozen=True, slots=True, kw_only=True)
class NewDevice:
    id: str
    fleet: str
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Issued:
    device: str
    token: str  # shown once
    expires_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    device: str
    fleet: str
    password: str


class Registry:
    def __init__(
        self,
        engine: Engine,
        accounts: Accounts,
        secret: bytes,
        *,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        """`changed` is called after each committed change: it keeps the registry's copy."""
        self._engine = engine
        self._changed = changed
        self._accounts = accounts
        self._secret = secret
        self._known: set[str] = set()  # devices that the broker is known to know
        self._lock = threading.Lock()

    def register(
        self,
        wanted: Sequence[NewDevice],
        *,
        actor: str,
        now: float,
        lifetime: float = TOKEN_LASTS,
    ) -> list[Issued]:
        """Take devices in and give out a one-time token for each; all of them or none."""
        _check(wanted)
        issued = [
            Issued(device=d.id, token=f"bwe_{secrets.token_urlsafe(32)}", expires_at=now + lifetime)
            for d in wanted
        ]
        with writing(self._engine) as conn:
            fresh = self._admit(conn, wanted, now)
            store.spend_tokens(conn, [d.id for d in wanted if d.id not in fresh], now)
            store.add_tokens(
                conn,
                [
                    {"hash": _hashed(i.token), "device": i.device, "expires_at": i.expires_at}
                    for i in issued
                ],
            )
            audit.append(
                conn,
                at=now,
                actor=actor,
                action="device.register",
                subject=wanted[0].id if len(wanted) == 1 else f"{len(wanted)} devices",
                detail={"devices": {d.id: d.fleet for d in wanted}},
            )
        self._changed()
        self._give_accounts([d.id for d in wanted])
        return issued

    def claim(self, token: str, *, now: float) -> Claim:
        """A device shows its one-time token: it is active from now on."""
        with writing(self._engine) as conn:
            device = store.take_token(conn, _hashed(token), now)
            row = store.get(conn, device) if device else None
            if row is None or row.status != "pending":
                raise DeviceRefused(
                    401, "token: unknown, expired or used; ask for a new one (device enrol)"
                )
            self._give_accounts([row.id], {row.id: row.password_issue})
            store.change(conn, row.id, status="active", enrolled_at=now)
            audit.append(
                conn,
                at=now,
                actor=f"device:{row.id}",
                action="device.claim",
                subject=row.id,
                detail={"fleet": row.fleet},
            )
        self._changed()
        password = device_password(self._secret, row.id, row.password_issue)
        return Claim(device=row.id, fleet=row.fleet, password=password)

    def move(
        self,
        device: str,
        *,
        fleet: str,
        labels: Mapping[str, str] | None,
        actor: str,
        reason: str,
        now: float,
    ) -> None:
        """Another fleet from this instant on; evidence before it stays with the fleet before."""
        _check([NewDevice(id=device, fleet=fleet, labels=labels or {})])
        with writing(self._engine) as conn:
            row = _existing(conn, device, "move", ("pending", "active"))
            new = dict(row.labels) if labels is None else dict(labels)
            store.change(conn, device, fleet=fleet, labels=new, moved_at=now)
            detail = {"from": row.fleet, "to": fleet, "labels": new, "reason": reason}
            _note(conn, now, actor, "move", device, detail)
        self._changed()

    def retire(self, device: str, *, actor: str, reason: str, now: float) -> None:
        """Out for good: no orders, no rights, in no denominator."""
        self._put_out(device, "retire", "retired", actor, reason, now)

    def quarantine(self, device: str, *, actor: str, reason: str, now: float) -> None:
        """Out until somebody has looked at it: `device enrol` takes it in again."""
        self._put_out(device, "quarantine", "quarantined", actor, reason, now)

    def replace(self, device: str, *, actor: str, reason: str, now: float) -> Issued:
        """Another board under the same id: new term, new password, a new one-time token."""
        token = f"bwe_{secrets.token_urlsafe(32)}"
        with writing(self._engine) as conn:
            row = _existing(conn, device, "replace", ("pending", "active", "quarantined"))
            store.change(
                conn,
                device,
                status="pending",
                password_issue=row.password_issue + 1,
                term=row.term + 1,
                moved_at=now,
                enrolled_at=None,
            )
            store.spend_tokens(conn, [device], now)
            expires = now + TOKEN_LASTS
            store.add_tokens(
                conn, [{"hash": _hashed(token), "device": device, "expires_at": expires}]
            )
            _note(conn, now, actor, "replace", device, {"reason": reason, "term": row.term + 1})
        self._changed()
        self._take_accounts([device])
        return Issued(device=device, token=token, expires_at=expires)

    def password_matches(self, device: str, password: str) -> bool:
        """Is this the broker password of an active device? (HTTP Basic of the agent's fallback.)"""
        if not ID.fullmatch(device):
            return False
        with reading(self._engine) as conn:
            row = store.get(conn, device)
        if row is None or row.status != "active":
            return False
        right = device_password(self._secret, device, row.password_issue)
        return secrets.compare_digest(right.encode(), password.encode())

    def passwords(self) -> list[tuple[str, str]]:
        """(device, password) of all that may connect: what a broker has to know."""
        with reading(self._engine) as conn:
            rows = store.accounts(conn)
        return [(row.id, device_password(self._secret, row.id, row.password_issue)) for row in rows]

    def sync(self) -> tuple[int, int]:
        """Make the broker's accounts equal to the registry's; answers (added, removed).

        The broker is asked first: an account is made after its row, so one that has no row now
        was put out, and is not one that is just being made.
        """
        self._changed()  # what other processes changed is copied, too
        with self._lock:
            self._accounts.ensure_services(self._secret)
            present = self._accounts.list_devices()
            wanted = dict(self.passwords())
            if not wanted and self._is_empty():
                # A wiped database knows nobody. That is no reason to cut off a fleet.
                return 0, 0
            missing = [(name, word) for name, word in wanted.items() if name not in present]
            surplus = sorted(present - wanted.keys())
            if missing:
                self._accounts.add_devices(missing)
            if surplus:
                self._accounts.remove_devices(surplus)
            self._known = set(wanted)
        return len(missing), len(surplus)

    def _is_empty(self) -> bool:
        with reading(self._engine) as conn:
            return store.count(conn) == 0

    def _admit(self, conn: Connection, wanted: Sequence[NewDevice], now: float) -> set[str]:
        """Write the rows; answers the ids that are new."""
        present = store.get_many(conn, [d.id for d in wanted])
        for index, device in enumerate(wanted):
            row = present.get(device.id)
            if row is not None and row.status == "active":
                raise DeviceRefused(
                    409,
                    f"{device.id}: is enrolled already; `device replace` gives its new board a "
                    "token, `device move` changes its fleet",
                    f"/{index}/id",
                )
        fresh = [d for d in wanted if d.id not in present]
        numbers = store.next_changes(conn, len(fresh))
        store.add(
            conn,
            [
                {
                    "id": d.id,
                    "fleet": d.fleet,
                    "labels": dict(d.labels),
                    "status": "pending",
                    "password_issue": 1,
                    "term": 0,
                    "created_at": now,
                    "change": number,
                }
                for d, number in zip(fresh, numbers, strict=True)
            ],
        )
        for device in wanted:
            row = present.get(device.id)
            if row is not None:
                again = row.status != "pending"  # it was put out: whoever comes now starts anew
                store.change(
                    conn,
                    device.id,
                    fleet=device.fleet,
                    labels=dict(device.labels),
                    status="pending",
                    password_issue=row.password_issue + (1 if again else 0),
                    term=row.term + (1 if again else 0),
                    moved_at=now if again or row.fleet != device.fleet else row.moved_at,
                )
        return {d.id for d in fresh}

    def _put_out(
        self, device: str, verb: str, status: str, actor: str, reason: str, now: float
    ) -> None:
        with writing(self._engine) as conn:
            _existing(conn, device, verb, ("pending", "active", "quarantined"))
            store.change(conn, device, status=status, moved_at=now)
            store.spend_tokens(conn, [device], now)
            _note(conn, now, actor, verb, device, {"reason": reason})
        self._changed()
        self._take_accounts([device])

    def _give_accounts(self, ids: Sequence[str], issues: Mapping[str, int] | None = None) -> None:
        with self._lock:
            missing = [device for device in ids if device not in self._known]
            if missing:
                self._known = set(self._accounts.list_devices())
                missing = [device for device in missing if device not in self._known]
            if not missing:
                return
            if issues is None:
                with reading(self._engine) as conn:
                    rows = store.get_many(conn, missing)
                issues = {device: rows[device].password_issue for device in missing}
            self._accounts.add_devices(
                (device, device_password(self._secret, device, issues[device]))
                for device in missing
            )
            self._known |= set(missing)

    def _take_accounts(self, ids: Sequence[str]) -> None:
        with self._lock:
            self._known -= set(ids)
            self._accounts.remove_devices(ids)


def _check(wanted: Sequence[NewDevice]) -> None:
    if not 1 <= len(wanted) <= MOST_AT_ONCE:
        raise DeviceRefused(422, f"1 to {MOST_AT_ONCE} devices at once")
    seen: set[str] = set()
    for index, device in enumerate(wanted):
        if not ID.fullmatch(device.id) or device.id in SERVICES:
            raise DeviceRefused(
                422, f"id: {device.id[:80]!r} must match {ID.pattern}", f"/{index}/id"
            )
        if not ID.fullmatch(device.fleet):
            raise DeviceRefused(
                422, f"fleet: {device.fleet[:80]!r} must match {ID.pattern}", f"/{index}/fleet"
            )
        if device.id in seen:
            raise DeviceRefused(422, f"id: {device.id} is named twice", f"/{index}/id")
        seen.add(device.id)
        _check_labels(device, index)


def _check_labels(device: NewDevice, index: int) -> None:
    if len(device.labels) > _MOST_LABELS:
        raise DeviceRefused(422, f"labels: at most {_MOST_LABELS}", f"/{index}/labels")
    for key, value in device.labels.items():
        bad = not _LABEL.fullmatch(key) or len(value) > 128 or not value.isprintable()
        if bad:
            raise DeviceRefused(
                422,
                f"labels: {key[:64]!r}: keys match {_LABEL.pattern}, values are at most 128 "
                "printable characters",
                f"/{index}/labels",
            )


def _existing(conn: Connection, device: str, verb: str, allowed: Sequence[str]) -> Any:
    row = store.get(conn, device)
    if row is None:
        raise DeviceRefused(404, f"device {device!r}: unknown; `device list` shows them")
    if row.status not in allowed:
        raise DeviceRefused(409, f"{device}: {verb} is not possible while it is {row.status}")
    return row


def _note(
    conn: Connection, now: float, actor: str, verb: str, device: str, detail: Mapping[str, Any]
) -> None:
    audit.append(
        conn, at=now, actor=actor, action=f"device.{verb}", subject=device, detail=dict(detail)
    )


def _hashed(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
