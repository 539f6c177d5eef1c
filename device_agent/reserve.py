"""Room for the last word: a file beside the journal, freed when a write finds a full disk.

A device whose disk somebody filled must still obey a rollback, and tell of it: its journal and its
reports free the room; samples do not, and leave the last of it alone. They are lost then, and
counted. The room is taken again when there is plenty.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

SIZE = 2 << 20  # bytes: journal and reports of some ten updates
LAST = 512 << 10  # bytes that samples leave alone; with less, a failed write is for want of room
T = TypeVar("T")


class Reserve:
    """`path` None keeps nothing: writes then fail as they fail."""

    def __init__(self, path: Path | None = None, size: int = SIZE) -> None:
        self._path, self._size = path, size
        self.lay()

    def lay(self) -> None:
        """Take the room, when there is plenty; silently nothing otherwise."""
        path = self._path
        if path is None or path.exists() or room(path.parent) < 3 * self._size:
            return
        begun = path.with_name(path.name + ".new")
        try:
            begun.write_bytes(bytes(self._size))
            begun.rename(path)
        except OSError:  # somebody was faster than we: at the next look
            begun.unlink(missing_ok=True)

    @property
    def scarce(self) -> bool:
        """Is only so much left as journal and reports may need?"""
        path = self._path
        return path is not None and not path.exists() and room(path.parent) < LAST

    def urgently(self, act: Callable[[], T]) -> T:
        """Do it; when the disk is full, free the room that was kept for it, and do it again."""
        try:
            return act()
        except sqlite3.OperationalError as error:
            if not self.is_full(error) or not self._free():
                raise
        return act()

    def is_full(self, error: sqlite3.OperationalError) -> bool:
        """Did a write fail for want of room?"""
        if self._path is None:
            return False
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN):
            return room(self._path.parent) < LAST
        return code == sqlite3.SQLITE_FULL

    def _free(self) -> bool:
        if self._path is None or not self._path.exists():
            return False
        self._path.unlink()
        return True


def room(directory: Path) -> int:
    """Bytes that we may still write here."""
    disk = os.statvfs(directory)
    return disk.f_bavail * disk.f_frsize
