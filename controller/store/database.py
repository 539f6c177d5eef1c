"""Opens the control database and brings its tables to the newest version."""

from __future__ import annotations

from sqlalchemy import Engine

from controller.store.tables import SCHEMA
from telemetry.store.database import open_engine
from telemetry.store.schema import bring_to_head


def open_control(url: str) -> Engine:
    """An engine whose schema is the newest.

    Raises ValueError for a URL that is neither backend, NewerSchema for a database of a newer
    version.
    """
    engine = open_engine(url)
    try:
        bring_to_head(engine, SCHEMA)
    except BaseException:
        engine.dispose()
        raise
    return engine
