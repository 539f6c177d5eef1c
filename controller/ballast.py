"""Room for the last word: a file beside the control database, freed when a stop finds a full disk.

A rollback must work when the disk is full, and a database cannot write one row without room. Only
stops (`commands`) and the loop's turn that carries one out free it: everything else may fail. It is
laid again when the controller begins and there is room. PostgreSQL's disk is another machine's.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError

log = structlog.get_logger()

SIZE = 16 * 1024 * 1024  # bytes: orders for some ten thousand devices, with their WAL
_LITTLE = 1024 * 1024  # bytes: with less room, any failed write is for want of it
T = TypeVar("T")


def lay(engine: Engine) -> None:
    """Take the room, when there is plenty; silently nothing otherwise."""
    path = _path(engine)
    if path is None or path.exists() or shutil.disk_usage(path.parent).free < 3 * SIZE:
        return
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            os.posix_fallocate(file.fileno(), 0, SIZE)
    except OSError as error:
        log.warning("ballast", detail=str(error), file=str(path))


def urgently(engine: Engine, act: Callable[[], T]) -> T:
    """Do it; when the disk is full, free the room that was kept for it, and do it again."""
    try:
        return act()
    except OperationalError as error:
        if not _is_full(engine, error) or not _free(engine):
            raise
    return act()


def _free(engine: Engine) -> bool:
    path = _path(engine)
    if path is None or not path.exists():
        return False
    path.unlink()
    log.error("ballast_freed", file=str(path), detail="the disk is full: make room")
    return True


def _is_full(engine: Engine, error: OperationalError) -> bool:
    path = _path(engine)
    if path is None:
        return False
    said = str(error.orig)
    return "full" in said or ("disk I/O" in said and shutil.disk_usage(path.parent).free < _LITTLE)


def _path(engine: Engine) -> Path | None:
    database = engine.url.database
    if engine.dialect.name != "sqlite" or not database or database == ":memory:":
        return None
    return Path(f"{database}.ballast")
