"""The content store: artifacts as files named by their digest, whole or not there at all.

A slots bundle (tar, tar.gz) is looked through before it is taken: what a device would refuse to
unpack is refused here, where a person reads the message.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from pathlib import Path, PurePosixPath

MOST_FILES = 100_000
MOST_UNPACKED = 16 << 30  # bytes
MOST_RATIO = 200  # unpacked bytes for each packed one
_CHUNK = 1 << 20


class Unfit(ValueError):
    """A bundle that no device would unpack; the message says which member and why."""


class ContentStore:
    def __init__(self, root: Path) -> None:
        self._root = root

    def path(self, digest: str) -> Path:
        """Where the bytes of a digest are, if they are here."""
        kind, _, name = digest.partition(":")
        return self._root / kind / name[:2] / name

    def add(self, source: Path) -> tuple[str, int]:
        """Keep a copy; answers (digest, bytes). Raises Unfit for a bundle that is unsafe."""
        check_bundle(source)
        self._root.mkdir(parents=True, exist_ok=True)
        aside = self._root / f".{os.getpid()}.{os.urandom(6).hex()}"
        try:
            digest, size = _copy(source, aside)
            target = self.path(digest)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(aside, target)
            _sync_directory(target.parent)
        finally:
            aside.unlink(missing_ok=True)
        return digest, size


def check_bundle(file: Path) -> None:
    """Raise Unfit when `file` is a tar whose members are unsafe; other files are taken as is."""
    if not tarfile.is_tarfile(file):
        return
    packed, unpacked, count = file.stat().st_size, 0, 0
    try:
        with tarfile.open(file) as bundle:
            for member in bundle:
                count, unpacked = count + 1, unpacked + member.size
                _check_member(member)
                too_big = unpacked > MOST_UNPACKED or unpacked > MOST_RATIO * packed + (1 << 20)
                if count > MOST_FILES or too_big:
                    raise Unfit(f"the bundle unpacks to too much ({unpacked} bytes, {count} files)")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise Unfit(f"the bundle cannot be read: {error}") from None


def _check_member(member: tarfile.TarInfo) -> None:
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or "\0" in member.name:
        raise Unfit(f"{member.name!r} leaves its folder: use relative names without ..")
    if not (member.isfile() or member.isdir()):
        raise Unfit(f"{member.name!r} is a link or a device: bundles hold files and folders")


def _copy(source: Path, target: Path) -> tuple[str, int]:
    digest = hashlib.sha256()
    with source.open("rb") as read, target.open("wb") as write:
        while chunk := read.read(_CHUNK):
            digest.update(chunk)
            write.write(chunk)
        write.flush()
        os.fsync(write.fileno())
    return f"sha256:{digest.hexdigest()}", target.stat().st_size


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
