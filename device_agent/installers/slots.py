"""Installs a bundle into two directories, a and b, and switches a symlink between them.

    components/<component>/{a,b}     the slots: one runs, the other takes the next artifact
    components/<component>/{a,b}.json  what the slot holds: release, digest, hash of its tree
    components/<component>/current   symlink to the slot that runs

Rules, in order:

1. Only the inactive slot is written; the other is what the device falls back to.
2. A bundle is a tar or tar.gz of plain files and directories. Absolute names, `..`, links, devices,
   too many or too large files refuse the whole bundle, before anything else is written.
3. The slot's description is written last, after every file and directory is synced; a slot without
   one, or with another tree than it says, is empty.
4. Switching is one rename of a symlink per component. A switch that fails for one component puts
   back those before it. What a power cut leaves half switched is switched again from the journal.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from device_agent.protocol import ID, Reason

if TYPE_CHECKING:  # imported by the first bundle
    import tarfile

_CHUNK = 1 << 20


class InstallRefused(Exception):
    """Nothing was switched; `reason` goes into the device's report."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleLimits:
    max_files: int = 10_000
    max_bytes: int = 4 << 30
    max_depth: int = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """A whole slot: what its description says."""

    name: str  # a | b
    path: Path
    release: str
    digest: str
    tree: str  # hash over names, modes and contents


class Slots:
    """The slots of all components below one directory."""

    def __init__(self, root: Path, limits: BundleLimits | None = None) -> None:
        self._root = root
        self._limits = limits or BundleLimits()

    def components(self) -> list[str]:
        if not self._root.is_dir():
            return []
        return sorted(entry.name for entry in self._root.iterdir() if entry.is_dir())

    def active(self, component: str) -> Slot | None:
        """What `current` points to; None before the first switch."""
        name = self._current(component)
        return None if name is None else self._read(component, name)

    def holding(self, component: str, digest: str) -> Slot | None:
        """The slot that says it holds this artifact, the active one first."""
        current = self._current(component)
        for name in sorted("ab", key=lambda n: n != current):
            slot = self._read(component, name)
            if slot is not None and slot.digest == digest:
                return slot
        return None

    def intact(self, slot: Slot) -> bool:
        """Read the slot back from the disk and hash it: what was written is what is there."""
        try:
            return _tree_hash(slot.path) == slot.tree
        except OSError:
            return False

    def install(self, component: str, release: str, digest: str, bundle: Path) -> Slot:
        """Unpack into the inactive slot; raises InstallRefused. A whole slot is left as it is."""
        here = self.holding(component, digest)
        if here is not None and self.intact(here):
            return here
        import tarfile

        name = "b" if self._current(component) == "a" else "a"
        path = self._home(component) / name
        try:
            self._empty(component, name)
            path.mkdir(parents=True)
            _unpack(bundle, path, self._limits)
            _sync_tree(path)
            slot = Slot(name=name, path=path, release=release, digest=digest, tree=_tree_hash(path))
            self._describe(component, slot)
        except (tarfile.TarError, EOFError, ValueError) as error:
            raise self._refused(component, name, Reason.UNSAFE_BUNDLE, error) from error
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            reason = Reason.DISK_FULL if full else Reason.INSTALL_FAILED
            raise self._refused(component, name, reason, error) from error
        if not self.intact(slot):
            raise InstallRefused(Reason.INSTALL_FAILED, f"{component}: read back differently")
        return slot

    def switch(self, to: Mapping[str, str | None]) -> None:
        """Point each component at the slot with this digest (None: at nothing): all or none.

        Raises InstallRefused(ACTIVATION_FAILED); what was switched before is switched back.
        """
        wanted: dict[str, str | None] = {}
        for component, digest in sorted(to.items()):
            slot = None if digest is None else self.holding(component, digest)
            if digest is not None and (slot is None or not self.intact(slot)):
                detail = f"{component}: no whole slot holds {digest}"
                raise InstallRefused(Reason.ACTIVATION_FAILED, detail)
            wanted[component] = None if slot is None else slot.name
        before = {component: self._current(component) for component in wanted}
        done: list[str] = []
        try:
            for component, name in wanted.items():
                done.append(component)
                self._point(component, name)
        except OSError as error:
            for component in reversed(done):
                self._point(component, before[component])
            raise InstallRefused(Reason.ACTIVATION_FAILED, f"{done[-1]}: {error}") from error

    # -- one component ----------------------------------------------------------------------------

    def _home(self, component: str) -> Path:
        if not ID.fullmatch(component):
            raise ValueError(f"{component!r} is no component name")
        return self._root / component

    def _current(self, component: str) -> str | None:
        try:
            name = os.readlink(self._home(component) / "current")
        except FileNotFoundError:
            return None
        return name if name in ("a", "b") else None

    def _read(self, component: str, name: str) -> Slot | None:
        home = self._home(component)
        try:
            body = json.loads((home / f"{name}.json").read_text())
            return Slot(
                name=name,
                path=home / name,
                release=str(body["release"]),
                digest=str(body["digest"]),
                tree=str(body["tree"]),
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _empty(self, component: str, name: str) -> None:
        home = self._home(component)
        home.mkdir(parents=True, exist_ok=True)
        (home / f"{name}.json").unlink(missing_ok=True)
        sync_directory(home)  # the description goes first: a half-emptied slot is empty
        if (home / name).exists():
            from shutil import rmtree

            rmtree(home / name)

    def _refused(
        self, component: str, name: str, reason: Reason, error: Exception
    ) -> InstallRefused:
        """What the slot was filled with is free again."""
        with suppress(OSError):
            self._empty(component, name)
        return InstallRefused(reason, f"{component}: {error}")

    def _describe(self, component: str, slot: Slot) -> None:
        body = {"release": slot.release, "digest": slot.digest, "tree": slot.tree}
        write_durably(self._home(component) / f"{slot.name}.json", json.dumps(body).encode())

    def _point(self, component: str, name: str | None) -> None:
        home = self._home(component)
        if name is None:
            (home / "current").unlink(missing_ok=True)
        else:
            aside = home / ".current.new"
            aside.unlink(missing_ok=True)
            aside.symlink_to(name)
            aside.replace(home / "current")
        if home.is_dir():
            sync_directory(home)


def write_durably(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Whole or not at all, and on the disk when this returns."""
    aside = path.with_name(f".{path.name}.new")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- bundles --------------------------------------------------------------------------------------


def _unpack(bundle: Path, target: Path, limits: BundleLimits) -> None:
    import tarfile

    files, size, seen = 0, 0, set()
    with tarfile.open(bundle, "r|*") as archive:
        for member in archive:
            files, size = files + 1, size + member.size
            if files > limits.max_files or size > limits.max_bytes:
                raise ValueError(
                    f"more than {limits.max_files} files or {limits.max_bytes} bytes unpacked"
                )
            parts = _safe(member, limits)
            if not parts:
                continue
            path = target.joinpath(*parts)
            if path in seen:
                raise ValueError(f"{member.name[:80]!r} comes twice")
            if member.isdir():
                path.mkdir(parents=True, exist_ok=True)
                continue
            seen.add(path)
            _extract(archive, member, path)


def _safe(member: tarfile.TarInfo, limits: BundleLimits) -> tuple[str, ...]:
    """The member's path as parts; raises ValueError for what does not belong into a slot."""
    name = member.name
    if not (member.isreg() or member.isdir()) or member.issparse():
        raise ValueError(f"{name[:80]!r} is neither a plain file nor a directory")
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name or "\\" in name:
        raise ValueError(f"{name[:80]!r} leads out of the slot")
    if len(path.parts) > limits.max_depth or any(len(p.encode()) > 255 for p in path.parts):
        raise ValueError(f"{name[:80]!r} is too deep or too long")
    return path.parts


def _extract(archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    from shutil import copyfileobj

    path.parent.mkdir(parents=True, exist_ok=True)
    source = archive.extractfile(member)
    if source is None:
        raise ValueError(f"{member.name[:80]!r} has no content")
    mode = 0o755 if member.mode & 0o111 else 0o644  # never set-uid, never writable by others
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    with os.fdopen(descriptor, "wb") as file:
        copyfileobj(source, file, _CHUNK)
        if file.tell() != member.size:
            raise ValueError(f"{member.name[:80]!r} is cut short")
        file.flush()
        os.fsync(file.fileno())


def _walk(root: Path) -> Iterator[Path]:
    for entry in sorted(root.iterdir()):
        yield entry
        if entry.is_dir() and not entry.is_symlink():
            yield from _walk(entry)


def _sync_tree(root: Path) -> None:
    sync_directory(root)
    for path in _walk(root):
        if path.is_dir():
            sync_directory(path)


def _tree_hash(root: Path) -> str:
    """sha256 over every name, whether it can be executed, and its content."""
    total = hashlib.sha256()
    for path in _walk(root):
        mode = path.lstat().st_mode
        kind = "d" if stat.S_ISDIR(mode) else "x" if mode & 0o111 else "f"
        if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
            kind = "?"
        name = path.relative_to(root).as_posix()
        content = hashlib.sha256()
        if kind in "xf":
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK):
                    content.update(chunk)
        total.update(f"{kind} {content.hexdigest()} {len(name)} {name}\n".encode())
    return total.hexdigest()
