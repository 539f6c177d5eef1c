"""Opens the control database of a state directory, for commands that do without the API."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from controller.cli.errors import Failed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sqlalchemy import Engine

    from telemetry.report import DeviceRow


def telemetry_rows(state_dir: Path, database: str | None) -> Callable[[], Mapping[str, DeviceRow]]:
    """Reads the devices' last words when it is called; raises what ails the telemetry then."""

    def heard() -> Mapping[str, DeviceRow]:
        from controller.settings import load
        from telemetry.store.database import open_engine as open_telemetry
        from telemetry.store.reports import Store

        settings = load({"state_dir": state_dir, "database": database})
        engine = open_telemetry(settings.telemetry_url)
        try:
            return {row.device: row for row in Store(engine).devices_changed(0)}
        finally:
            engine.dispose()

    return heard


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
