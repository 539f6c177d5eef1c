"""Which of several ingest processes on one state directory this one is.

A session at the broker belongs to one process at a time, and must be found again after a restart.
So each process takes the first free seat, holds it by a lock that ends with it, and derives its
client id from the seat and from a name that the state directory keeps: two machines never meet.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SEATS = 64


@dataclass(frozen=True, slots=True)
class Seat:
    number: int  # from 1
    client_id: str

    @property
    def session_expiry(self) -> int:
        """Seconds for which the broker keeps the session of a process that is gone.

        The first seat's keeps what comes while no ingest runs at all. Those of helpers must end
        soon: a shared subscription goes on to deal out messages to sessions that nobody attends.
        """
        return 7 * 86_400 if self.number == 1 else 60


@contextlib.contextmanager
def take(state_dir: Path) -> Iterator[Seat]:
    """Hold the first free seat; raises RuntimeError when there are `SEATS` processes already."""
    folder = state_dir / "ingest"
    folder.mkdir(parents=True, exist_ok=True)
    name = _name(folder / "name")
    for number in range(1, SEATS + 1):
        with (folder / f"seat-{number}.lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            yield Seat(number, f"bw-ingest-{name}-{number}")
            return
    raise RuntimeError(f"{SEATS} ingest processes work on {state_dir} already")


def _name(path: Path) -> str:
    """Made once; of two processes that begin at once, the first one names both."""
    if not path.exists():
        fresh = path.with_name(f".name.{os.getpid()}")
        fresh.write_text(secrets.token_hex(4))
        with contextlib.suppress(FileExistsError):
            os.link(fresh, path)
        fresh.unlink()
    return path.read_text().strip()
