"""Our signing keys, Ed25519, in files that only their owner reads: director's and recorder's."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from device_agent.codec import to_wire
from device_agent.protocol import Desired, Signature, canonical, sealed

_MANY = 128  # orders that are worth a second thread


class DirectorKey:
    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        raw = private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        self.public_hex = raw.hex()
        self.keyid = sha256(raw).hexdigest()
        # The envelope is the same around every order of this key, but for signature and order.
        self._envelope = sealed(b"%b", (Signature(keyid=self.keyid, sig="%b"),))
        self._second: ThreadPoolExecutor | None = None  # until there are many orders to sign

    @classmethod
    def load_or_create(cls, path: Path) -> DirectorKey:
        """The key in `path`, made at first use; raises ValueError for a file that is none."""
        if not path.exists():
            _create(path)
        key = load_pem_private_key(path.read_bytes(), password=None)
        if not isinstance(key, Ed25519PrivateKey):
            raise ValueError(f"{path}: an Ed25519 private key in PEM is expected")
        return cls(key)

    def sign(self, desired: Desired) -> bytes:
        """The `desired` message: the order in its envelope, with our signature."""
        return self.seal(canonical(to_wire(desired)))

    def seal(self, signed: bytes) -> bytes:
        """The envelope around the canonical bytes of an order."""
        return self._envelope % (self._private.sign(signed).hex().encode(), signed)

    def seal_all(self, signed: Sequence[bytes]) -> list[bytes]:
        """The envelopes around many: the second half on another processor, where one is free."""
        if len(signed) < _MANY:
            return [self.seal(each) for each in signed]
        if self._second is None:
            self._second = ThreadPoolExecutor(1, thread_name_prefix="signer")
        half = len(signed) // 2
        rest = self._second.submit(lambda: [self.seal(each) for each in signed[half:]])
        return [*(self.seal(each) for each in signed[:half]), *rest.result()]

    def sign_bytes(self, data: bytes) -> bytes:
        """A bare signature, for evidence that leaves the house."""
        return self._private.sign(data)


def recorder_key(path: Path) -> Path:
    """The SSH key that signs the holds that we record, made at first use with its `.pub` beside it.

    Hosts that ask for signed commits need the public part in their allowed signers.
    """
    if not path.exists():
        private = Ed25519PrivateKey.generate()
        public = private.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(path.name + ".pub").write_bytes(public + b" bellwether\n")
        _write(path, private.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    return path


def _create(path: Path) -> None:
    pem = Ed25519PrivateKey.generate().private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
    )
    _write(path, pem)


def _write(path: Path, pem: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written aside and linked: of two processes that start at once, one key wins, whole.
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(pem)
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(aside, path)
    except FileExistsError:
        pass
    finally:
        aside.unlink()
