"""Who vouches for a release: signatures by people's keys that no server of ours has.

The statement that is signed says what devices would run and from where they may come and go: name,
version, installer, artifacts with their sizes, what it requires, its security epoch, its way back.
Notes, labels, mirrors are not in it: editing them breaks no signature.

The keys that count stand in a file outside of the fleet repository, so that who may commit cannot
vouch:

    threshold = 2                        # so many different people for each release; 1 by default

    [[signer]]
    name = "ann"
    public = "<64 hex digits>"           # as `bellwether release key` prints it
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
)

from controller.manifests.kinds import Release, ReleaseSignature
from device_agent.protocol import canonical

_FORM = "write threshold = N and, for each person, [[signer]] with name and public"


def statement(release: Release) -> bytes:
    """The canonical bytes that a signature is over."""
    document = release.model_dump(mode="json")
    rule = document["rollback"]
    return canonical(
        {
            "type": "bellwether.dev/release/v1",
            "name": release.name,
            "version": release.version,
            "installer": release.installer,
            "artifacts": sorted([a.component, a.digest, a.size] for a in release.artifacts),
            "requires": document["requires"],
            "upgradesFrom": list(release.upgrades_from),
            "securityEpoch": release.security_epoch,
            "rollback": {"allowed": rule["allowed"], "to": rule["to"]},
        }
    )


def sign(release: Release, private: Ed25519PrivateKey) -> ReleaseSignature:
    raw = private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    return ReleaseSignature(keyid=keyid(raw), sig=private.sign(statement(release)).hex())


def keyid(public: bytes) -> str:
    return sha256(public).hexdigest()


def private_key(path: Path) -> Ed25519PrivateKey:
    """The key in a PEM file; raises ValueError for a file that has none."""
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: no private key to be read: {error}") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError(f"{path}: an Ed25519 private key in PEM is expected")
    return key


@dataclass(frozen=True, kw_only=True)
class Signers:
    """The people whose signatures count, and how many of them a release needs."""

    people: Mapping[str, tuple[str, bytes]]  # keyid → (name, public key)
    threshold: int = 1

    @classmethod
    def load(cls, path: Path) -> Signers:
        """Raises ValueError that says what to write."""
        try:
            plain = tomllib.loads(path.read_text())
        except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: {error}: {_FORM}") from None
        people = dict(_person(path, one) for one in _listed(path, plain))
        threshold = plain.get("threshold", 1)
        names = {name for name, _ in people.values()}
        if type(threshold) is not int or not 1 <= threshold <= len(names):
            raise ValueError(f"{path}: threshold: from 1 to {len(names)}, the people listed")
        return cls(people=people, threshold=threshold)

    @cached_property
    def _keys(self) -> Mapping[str, Ed25519PublicKey]:
        return {
            name: Ed25519PublicKey.from_public_bytes(raw) for name, (_, raw) in self.people.items()
        }

    def vouching(self, release: Release) -> list[str]:
        """The names of who has signed exactly this release; a person with two keys is one."""
        said, found = statement(release), set()
        for one in release.signatures:
            key = self._keys.get(one.keyid)
            if key is None:
                continue
            try:
                key.verify(bytes.fromhex(one.sig), said)
            except InvalidSignature:
                continue
            found.add(self.people[one.keyid][0])
        return sorted(found)

    def lacking(self, release: Release) -> str:
        """Why this release may not be rolled out; empty when it may."""
        names = self.vouching(release)
        if len(names) >= self.threshold:
            return ""
        who = f" ({', '.join(names)})" if names else ""
        return (
            f"release {release.name} is signed by {len(names)} of {self.threshold} people{who}: "
            "`bellwether release sign FILE --key KEY`, then commit it"
        )


def _listed(path: Path, plain: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    listed, unknown = plain.get("signer"), set(plain) - {"signer", "threshold"}
    if unknown or not isinstance(listed, list) or not listed:
        raise ValueError(f"{path}: {', '.join(sorted(unknown)) or 'no signer'}: {_FORM}")
    for one in listed:
        if not isinstance(one, dict) or set(one) != {"name", "public"}:
            raise ValueError(f"{path}: [[signer]] has name and public, and nothing else")
        yield one


def _person(path: Path, one: Mapping[str, Any]) -> tuple[str, tuple[str, bytes]]:
    name, public = one["name"], one["public"]
    try:
        raw = bytes.fromhex(public)
        Ed25519PublicKey.from_public_bytes(raw)
    except (TypeError, ValueError):
        raise ValueError(f"{path}: {name}: public: 64 hex digits of an Ed25519 key") from None
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{path}: name: who it is")
    return keyid(raw), (name.strip(), raw)
