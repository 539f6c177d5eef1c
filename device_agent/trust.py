"""May this order be obeyed? Pure: bytes and what the device remembers in, a verdict out.

Rules, in order (the first that speaks wins):

1. It reads as a desired message; else `malformed`.
2. A pinned director key has signed exactly these bytes; else `bad_signature`.
3. It is for this device; else `foreign_device`.
4. (term, generation) is not lower than the last accepted one (`lower_generation`); equal with the
   same bytes is the same order again, equal with others `conflicting_generation`.
5. Its security epoch is not below the device's (`security_epoch`): a rollback goes below versions,
   never below an epoch.
6. Its installers exist here (`unknown_installer`); a forward order carries a lease (`expired`).
7. A forward order names no digest that this generation or a later one ended (`known_bad`). A newer
   term counts its generations anew: what an older one ended does not bind it.

A lease that has passed is no refusal: the update is DEFERRED by `lease_expired`, and the controller
answers with a newer generation. Until rule 3 has passed the order is nobody's: it is reported as
refused, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256

from device_agent.protocol import (
    Desired,
    Kind,
    ProtocolError,
    Reason,
    Signature,
    open_envelope,
    parse_timestamp,
)

KEY_BYTES = 32
# A device whose battery-less clock starts at 1970 cannot tell whether a lease holds: it does not.
CLOCK_IS_WRONG_BEFORE = 1_704_067_200.0  # 2024-01-01


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What the device holds an order against."""

    device: str
    keys: Mapping[str, str]  # keyid → raw public key, hex
    term: int = 0
    generation: int = 0
    order_hash: str = ""
    security_epoch: int = 0
    known_bad: Mapping[str, int] = field(default_factory=dict)  # of this term, by generation
    installers: frozenset[str] = frozenset({"slots"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    order: Desired
    order_hash: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeated:
    """The order in force, once more (a retained message after a reconnect)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    reason: Reason
    detail: str
    order: Desired | None = None  # only when a director did sign it for this device
    order_hash: str = ""


Verdict = Accepted | Repeated | Refused


def keyring(public_keys: tuple[str, ...]) -> dict[str, str]:
    """Pinned keys by their id; raises ValueError for what is no Ed25519 key in hex."""
    ring = {}
    for text in public_keys:
        raw = bytes.fromhex(text)
        if len(raw) != KEY_BYTES:
            raise ValueError(f"{text[:80]!r} is no Ed25519 key: {KEY_BYTES} bytes in hex")
        ring[sha256(raw).hexdigest()] = text
    return ring


def judge(payload: bytes, known: Known) -> Verdict:
    """Accepted, Repeated or Refused, by the rules above."""
    try:
        order, signed, signatures = open_envelope(payload)
    except ProtocolError as error:
        return Refused(reason=Reason.MALFORMED, detail=str(error))
    if not any(_verifies(s, signed, known.keys) for s in signatures):
        return Refused(reason=Reason.BAD_SIGNATURE, detail="no pinned key signed this order")
    if order.device != known.device:
        return Refused(reason=Reason.FOREIGN_DEVICE, detail=f"an order for {order.device}")
    order_hash = sha256(signed).hexdigest()
    stale = _stale(order, order_hash, known)
    if stale is not None:
        return stale
    reason = _unfit(order, known)
    if reason is not None:
        return Refused(reason=reason, detail=str(reason), order=order, order_hash=order_hash)
    return Accepted(order=order, order_hash=order_hash)


def known_bad(order: Desired, ended: Mapping[str, int]) -> Reason | None:
    """KNOWN_BAD when a forward order is not newer than what ended one of its digests."""
    if order.kind is not Kind.INSTALL:
        return None
    for told in order.components.values():
        if ended.get(told.digest, -1) >= order.generation:
            return Reason.KNOWN_BAD
    return None


def lease_holds(order: Desired, now: float) -> bool:
    """May INSTALLING start now? Rollbacks need no lease."""
    if order.kind is not Kind.INSTALL:
        return True
    if order.not_after is None or now < CLOCK_IS_WRONG_BEFORE:
        return False
    return now <= parse_timestamp(order.not_after).timestamp()


def _stale(order: Desired, order_hash: str, known: Known) -> Verdict | None:
    place, last = (order.term, order.generation), (known.term, known.generation)
    if place < last:
        detail = f"{place} after {last}"
        return Refused(reason=Reason.LOWER_GENERATION, detail=detail)
    if place == last and known.order_hash:
        if order_hash == known.order_hash:
            return Repeated()
        detail = f"two orders claim term and generation {place}"
        return Refused(reason=Reason.CONFLICTING_GENERATION, detail=detail)
    return None


def _unfit(order: Desired, known: Known) -> Reason | None:
    if order.security_epoch < known.security_epoch:
        return Reason.SECURITY_EPOCH
    if any(told.installer not in known.installers for told in order.components.values()):
        return Reason.UNKNOWN_INSTALLER
    if order.kind is Kind.INSTALL and order.not_after is None:
        return Reason.EXPIRED
    return known_bad(order, known.known_bad) if order.term == known.term else None


def _verifies(signature: Signature, signed: bytes, keys: Mapping[str, str]) -> bool:
    public = keys.get(signature.keyid)
    if public is None:
        return False
    # Imported for the first order: it would hold up the first connection.
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))
        key.verify(bytes.fromhex(signature.sig), signed)
    except (InvalidSignature, ValueError):
        return False
    return True
