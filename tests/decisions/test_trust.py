"""Which orders a device obeys, and the reason of every refusal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from controller.keys import DirectorKey
from device_agent.codec import to_wire
from device_agent.protocol import ComponentOrder, Desired, Kind, Reason, canonical
from device_agent.trust import Accepted, Known, Refused, Repeated, judge, keyring, lease_holds

KEY = DirectorKey(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
OTHER = DirectorKey(Ed25519PrivateKey.from_private_bytes(bytes(32)))
DIGEST = "sha256:" + "a" * 64
KNOWN = Known(device="car-1", keys=keyring((KEY.public_hex,)), term=2, generation=5)


def order(**changes: Any) -> Desired:
    told = ComponentOrder(release="r", digest=DIGEST, size=1, urls=("http://x/a",))
    base = Desired(
        device="car-1",
        term=2,
        generation=6,
        attempt="try",
        kind=Kind.INSTALL,
        components={"app": told},
        issued_at="2027-01-15T08:00:00Z",
        not_after="2027-01-15T09:00:00Z",
    )
    return replace(base, **changes)


def refused(payload: bytes, known: Known = KNOWN) -> Reason:
    verdict = judge(payload, known)
    assert isinstance(verdict, Refused), verdict
    return verdict.reason


def test_a_newer_signed_order_is_accepted() -> None:
    assert isinstance(judge(KEY.sign(order()), KNOWN), Accepted)


@pytest.mark.parametrize("many", [0, 1, 127, 128, 129, 1000])
def test_many_orders_are_each_signed_for_their_device(many: int) -> None:
    names = [f"car-{n}" for n in range(many)]
    sealed = KEY.seal_all([canonical(to_wire(order(device=name))) for name in names])
    assert sealed == [KEY.sign(order(device=name)) for name in names]
    for name, body in zip(names, sealed, strict=True):
        assert isinstance(judge(body, replace(KNOWN, device=name)), Accepted)


def test_a_strangers_signature_is_refused() -> None:
    assert refused(OTHER.sign(order())) is Reason.BAD_SIGNATURE


def test_a_changed_byte_is_refused() -> None:
    forged = KEY.sign(order()).replace(b'"generation":6', b'"generation":7')
    assert refused(forged) is Reason.BAD_SIGNATURE


def test_an_order_for_another_device_is_refused() -> None:
    assert refused(KEY.sign(order(device="car-2"))) is Reason.FOREIGN_DEVICE


@pytest.mark.parametrize(("term", "generation"), [(2, 4), (1, 99), (0, 0)])
def test_a_lower_term_or_generation_is_refused(term: int, generation: int) -> None:
    payload = KEY.sign(order(term=term, generation=generation))
    assert refused(payload) is Reason.LOWER_GENERATION


def test_a_higher_term_wins_over_a_lower_generation() -> None:
    assert isinstance(judge(KEY.sign(order(term=3, generation=1)), KNOWN), Accepted)


def test_the_same_bytes_again_are_ignored_and_others_conflict() -> None:
    accepted = judge(KEY.sign(order()), KNOWN)
    assert isinstance(accepted, Accepted)
    known = replace(KNOWN, generation=6, order_hash=accepted.order_hash)
    assert isinstance(judge(KEY.sign(order()), known), Repeated)
    assert refused(KEY.sign(order(attempt="b")), known) is Reason.CONFLICTING_GENERATION


def test_a_lower_security_epoch_is_refused_even_for_a_rollback() -> None:
    known = replace(KNOWN, security_epoch=2)
    payload = KEY.sign(order(kind=Kind.ROLLBACK, not_after=None, security_epoch=1))
    assert refused(payload, known) is Reason.SECURITY_EPOCH


def test_a_forward_order_without_a_lease_is_refused() -> None:
    assert refused(KEY.sign(order(not_after=None))) is Reason.EXPIRED


def test_known_bad_is_lifted_by_a_newer_generation_only() -> None:
    assert refused(KEY.sign(order()), replace(KNOWN, known_bad={DIGEST: 6})) is Reason.KNOWN_BAD
    assert isinstance(judge(KEY.sign(order()), replace(KNOWN, known_bad={DIGEST: 5})), Accepted)


def test_a_newer_term_is_not_bound_by_what_an_older_one_ended() -> None:
    """A restored database counts its generations anew; its term is higher."""
    known = replace(KNOWN, known_bad={DIGEST: 9})
    newer = order(term=KNOWN.term + 1, generation=1)
    assert isinstance(judge(KEY.sign(newer), known), Accepted)


def test_a_rollback_passes_the_known_bad_list_and_needs_no_lease() -> None:
    back = order(kind=Kind.ROLLBACK, not_after=None)
    assert isinstance(judge(KEY.sign(back), replace(KNOWN, known_bad={DIGEST: 9})), Accepted)
    assert lease_holds(back, 4e9)


@pytest.mark.parametrize("clock", [0.0, 2_147_483_647.0])
def test_no_lease_holds_at_1970_or_2038(clock: float) -> None:
    assert not lease_holds(order(), clock)


@pytest.mark.parametrize(
    "payload", [b"", b"{}", b"[" * 40, b"\xff", b'{"signed":{},"signatures":[]}', b"x" * 70_000]
)
def test_what_is_no_order_is_malformed(payload: bytes) -> None:
    assert refused(payload) is Reason.MALFORMED


def test_an_unknown_installer_is_refused() -> None:
    told = replace(order().components["app"], installer="rauc")
    assert refused(KEY.sign(order(components={"app": told}))) is Reason.UNKNOWN_INSTALLER
