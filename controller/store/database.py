"""Opens the control database and brings its tables to the newest version."""

from __future__ import annotations

from sqlalchemy import Engine

from controller.store.tables import metadata
from telemetry.store.database import open_engine


def open_control(url: str) -> Engine:
    """An engine whose schema is there; raises ValueError for a URL that is neither backend."""
    engine = open_engine(url)
    migrate(engine)
    return engine


def migrate(engine: Engine) -> None:
    with engine.begin() as conn:
        metadata.create_all(conn)
