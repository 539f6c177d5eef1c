"""Opens the control database of a state directory, for commands that do without the API."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from controller.cli.errors import Failed

if TYPE_CHECKING:
    from sqlalchemy import Engine


def open_engine(state_dir: Path, database: str | None) -> Engine:
    from sqlalchemy.exc import SQLAlchemyError

    from controller.store.database import open_control
    from telemetry.store.schema import NewerSchema

    if database is None and not state_dir.is_dir():
        raise Failed(f"{state_dir}: no such directory; name the --state-dir of `serve`", 2)
    try:
        return open_control(database or f"sqlite:///{state_dir.resolve() / 'control.db'}")
    except NewerSchema as error:
        raise Failed(str(error)) from None
    except (SQLAlchemyError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise Failed(f"the database cannot be opened: {first}") from None
