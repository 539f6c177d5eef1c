"""A small file system for a test, and a way to fill it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small(place: Path, mebibytes: int) -> Iterator[bool]:
    """Mounted there; False, and an ordinary folder, where we may not mount."""
    place.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(place)]
    mounted = os.geteuid() == 0 and not subprocess.run(mount, capture_output=True).returncode
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(place)], check=True)


@contextmanager
def small_or_skip(place: Path, mebibytes: int) -> Iterator[Path]:
    """The same, for a test that says nothing without it."""
    with small(place, mebibytes) as mounted:
        if not mounted:
            pytest.skip("only root may mount a small file system here")
        yield place


def fill(place: Path) -> Path:
    """Take the last byte; deleting the answered file gives them back."""
    filler = place / "filler"
    with filler.open("ab", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue
    return filler
