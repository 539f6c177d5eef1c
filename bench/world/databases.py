"""Both databases of the service: production schema and queries, files in memory, no fsync.

One set of engines serves a worker for all its histories, because compiled statements live with the
engine; `fresh` puts empty databases in place. Every BEGIN and every COMMIT is a point.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, event

from bench.world.points import Points
from controller.store.database import open_control
from telemetry.store.database import open_engine
from telemetry.store.reports import Store
from telemetry.store.tables import create_schema

_MEMORY = Path("/dev/shm")  # noqa: S108 - a directory of our own is made in it
NAMES = ("control", "telemetry")


@contextmanager
def memory_directory() -> Iterator[Path]:
    """A directory on the memory file system, where there is one; gone at the end."""
    where = str(_MEMORY) if _MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="bellwether-world-", dir=where) as name:
        yield Path(name)


class Databases:
    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.root = root
        self.points = Points()
        self.locked = False  # somebody is in the middle of writing to the control database
        self.control = self._open("control")
        self.telemetry = Store(self._open("telemetry"))
        self._save("template")

    def fresh(self, points: Points) -> None:
        """Empty databases, and the points of a new history."""
        self.points = Points()
        self._load("template")
        self.points = points

    def backup(self) -> None:
        """Keep both databases as they are now."""
        self._save("backup")

    def restore(self, name: str) -> None:
        """One database as it was at the last backup; nobody may have it open."""
        self._copy("backup", "now", (name,))

    def wipe(self, name: str) -> None:
        """An empty one in its place."""
        self._copy("template", "now", (name,))

    def close(self) -> None:
        for engine in (self.control, self.telemetry.engine):
            engine.dispose()

    def _open(self, name: str) -> Engine:
        url = f"sqlite:///{self.root / name}.now"
        if name == "control":
            engine = open_control(url)
        else:
            engine = open_engine(url)
            create_schema(engine)
        engine.dispose()
        event.listen(engine, "connect", _no_sync)
        event.listen(engine, "engine_connect", lambda _: self.points.reach(f"{name}.begin"))
        event.listen(engine, "commit", lambda _: self.points.reach(f"{name}.commit"))
        if name == "control":
            event.listen(engine, "begin", self._locks)
            event.listen(engine, "commit", self._unlocks)
            event.listen(engine, "rollback", self._unlocks)
        return engine

    def _locks(self, connection: Any) -> None:
        if not connection.get_execution_options().get("bellwether_reading"):
            self.locked = True

    def _unlocks(self, connection: Any) -> None:
        if not connection.get_execution_options().get("bellwether_reading"):
            self.locked = False

    def _save(self, label: str) -> None:
        self._copy("now", label, NAMES)

    def _load(self, label: str) -> None:
        self._copy(label, "now", NAMES)

    def _copy(self, source: str, target: str, names: tuple[str, ...]) -> None:
        for name in names:
            engine = self.control if name == "control" else self.telemetry.engine
            engine.dispose()  # the last connection folds the log into the file
            for suffix in ("-wal", "-shm"):
                (self.root / f"{name}.{target}{suffix}").unlink(missing_ok=True)
            shutil.copyfile(self.root / f"{name}.{source}", self.root / f"{name}.{target}")


def _no_sync(connection: Any, _record: Any) -> None:
    connection.execute("PRAGMA synchronous=OFF")
