"""Wakes the loop at once when somebody has recorded a command: a datagram on a local socket.

A lost poke costs at most one tick: the loop looks by itself too. On another machine's controller
the command is found by its next look.
"""

from __future__ import annotations

import contextlib
import select
import socket
import tempfile
from hashlib import sha256
from pathlib import Path


def poke(state_dir: Path) -> None:
    """Wake the controller that keeps its state here; silently nothing when none is running."""
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender,
    ):
        sender.setblocking(False)
        sender.sendto(b"!", str(_path(state_dir)))


class Bell:
    """The loop's side: waits for a poke or for the time to be over."""

    def __init__(self, state_dir: Path) -> None:
        self._file = _path(state_dir)
        self._file.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self._file))
        self._socket.setblocking(False)

    def wait(self, seconds: float) -> bool:
        """True when poked within `seconds`; further pokes that came meanwhile are taken too."""
        ready, _, _ = select.select([self._socket], [], [], max(0.0, seconds))
        if not ready:
            return False
        with contextlib.suppress(BlockingIOError):
            while self._socket.recv(16):
                pass
        return True

    def rung(self) -> bool:
        """Has somebody poked, and waits to be heard? Takes nothing: the next `wait` hears it."""
        return bool(select.select([self._socket], [], [], 0.0)[0])

    def close(self) -> None:
        self._socket.close()
        self._file.unlink(missing_ok=True)


def _path(state_dir: Path) -> Path:
    # Unix socket names are short (107 bytes): a deep state directory gets a name of its own.
    direct = state_dir.resolve() / "wake.sock"
    if len(str(direct)) < 100:
        return direct
    name = sha256(str(direct).encode()).hexdigest()[:24]
    return Path(tempfile.gettempdir()) / f"bellwether-{name}.sock"
