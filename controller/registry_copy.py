"""A copy of the registry beside the database: `registry.jsonl` in the state directory.

Fleets and labels of devices stand nowhere else: not in Git, not in reports, not at the broker. When
the control database is wiped, or restored from an older backup, this copy brings them back, so that
devices keep their accounts, their fleets and their place.

Form: a first line {"database": ID}; then a line a changed device, in the order of the registry's
change numbers; the last line of a device counts. Lines are added after the commit that they are
of: the copy is never ahead of a database that has lost nothing.

Rules of `open`, in order:

1. The copy of another database that has devices is put aside: never mix two registries.
2. An empty database, or the same one with a lower counter, has lost something: it gets back every
   device that it lacks, or knows in an older state. Each gets a new change number.
3. What the database has and the copy has not is added to the copy.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

import structlog
from sqlalchemy import Connection, Engine, RowMapping, insert, select, update

from controller import audit
from controller.store import devices as store
from controller.store.rollouts import get_meta, put_meta
from controller.store.tables import devices
from telemetry.store.database import reading, writing

log = structlog.get_logger()

RECOVERED = "recovered"  # key in `meta`: the database is new, and devices were told things before
_TAIL = 64 * 1024  # bytes: longer than any line
_COLUMNS = [column.name for column in devices.columns]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Copied:
    """What the file says of itself."""

    database: str
    last: int  # the highest change number in it


class RegistryCopy:
    def __init__(self, engine: Engine, state_dir: Path) -> None:
        self._engine = engine
        self._path = state_dir / "registry.jsonl"

    def open(self, now: float) -> int:
        """At start, before anybody uses the registry: answers how many devices it gave back."""
        with self._locked() as file:
            with writing(self._engine) as conn:
                database = _identity(conn)
                back = 0
                copied = _copied(file)
                if copied is not None:
                    back = self._bring_back(conn, file, copied, database, now)
            if copied is None or copied.database != database:
                _begin(file, database)
            self._add(file)
        if back:
            log.warning("registry_recovered", devices=back, file=str(self._path))
        return back

    def catch_up(self) -> None:
        """Add what was committed since; a full disk is no reason to refuse a device."""
        try:
            with self._locked() as file:
                self._add(file)
        except OSError as error:
            log.error("registry_copy", detail=str(error), file=str(self._path))

    def _bring_back(
        self, conn: Connection, file: IO[str], copied: _Copied, database: str, now: float
    ) -> int:
        empty = store.count(conn) == 0
        if copied.database != database and not empty:
            aside = self._path.with_name(f"registry.{copied.database[:8]}.jsonl")
            aside.write_text(_whole(file))
            log.warning("registry_copy_of_another_database", kept=str(aside))
            return 0
        counter = int(get_meta(conn, store.COUNTER, 0))
        if copied.database == database and copied.last <= counter:
            return 0
        known = {row.id: row.change for row in conn.execute(select(devices.c.id, devices.c.change))}
        lost = [row for row in _latest(file).values() if row["change"] > known.get(row["id"], -1)]
        if not lost:
            return 0
        put_meta(conn, store.COUNTER, max(counter, copied.last))
        for row, number in zip(lost, store.next_changes(conn, len(lost)), strict=True):
            values = {**{name: row.get(name) for name in _COLUMNS}, "change": number}
            if row["id"] in known:
                conn.execute(update(devices).where(devices.c.id == row["id"]).values(**values))
            else:
                conn.execute(insert(devices).values(**values))
        if empty:
            put_meta(conn, RECOVERED, {"at": now, "devices": len(lost)})
        detail = {"devices": len(lost), "emptyDatabase": empty}
        audit.append(
            conn, at=now, actor="controller", action="registry.recover",
            subject=f"{len(lost)} devices", detail=detail,
        )  # fmt: skip
        return len(lost)

    def _add(self, file: IO[str]) -> None:
        copied = _copied(file)
        if copied is None:
            return  # nobody opened it: `open` decides whose it is
        with reading(self._engine) as conn:
            newer = select(devices).where(devices.c.change > copied.last)
            rows = conn.execute(newer.order_by(devices.c.change)).all()
        if not rows:
            return
        file.seek(0, os.SEEK_END)
        file.write("".join(_line(row._mapping) for row in rows))
        _sync(file)

    @contextmanager
    def _locked(self) -> Iterator[IO[str]]:
        with open(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600), "r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file


def _identity(conn: Connection) -> str:
    found = get_meta(conn, "database")
    if found is None:
        found = uuid4().hex
        put_meta(conn, "database", found)
    return str(found)


def _copied(file: IO[str]) -> _Copied | None:
    """From the first and the last whole line; None for an empty or foreign file."""
    file.seek(0)
    first = file.readline()
    head = _parsed(first)
    if head is None or "database" not in head:
        return None
    size = file.seek(0, os.SEEK_END)
    tail = os.pread(file.fileno(), _TAIL, max(0, size - _TAIL))
    lines = tail.decode(errors="replace").split("\n")
    if lines[-1]:  # a write was cut off: the next one begins on a new line
        file.write("\n")
    changes = [row["change"] for line in lines if (row := _parsed(line)) and "change" in row]
    return _Copied(database=str(head["database"]), last=changes[-1] if changes else 0)


def _latest(file: IO[str]) -> dict[str, dict[str, Any]]:
    file.seek(0)
    found: dict[str, dict[str, Any]] = {}
    for line in file:
        row = _parsed(line)
        if row is not None and "id" in row:
            found[row["id"]] = row
    return found


def _parsed(line: str) -> dict[str, Any] | None:
    """A line that a kill cut off is none."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _whole(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def _begin(file: IO[str], database: str) -> None:
    file.seek(0)
    file.truncate()
    file.write(json.dumps({"database": database}) + "\n")
    _sync(file)


def _sync(file: IO[str]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _line(row: RowMapping) -> str:
    return json.dumps({name: row[name] for name in _COLUMNS}) + "\n"
