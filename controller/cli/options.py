"""The options that many commands share."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Output(str, Enum):  # noqa: UP042 - typer reads the values of str enums
    TABLE = "table"
    JSON = "json"


Server = Annotated[
    str, typer.Option("--server", envvar="BELLWETHER_SERVER", help="URL of the service.")
]
Token = Annotated[
    str | None,
    typer.Option("--token", envvar="BELLWETHER_TOKEN", help="API token.", show_envvar=True),
]
Format = Annotated[Output, typer.Option("--output", "-o", help="table or json.")]
StateDir = Annotated[
    Path | None,
    typer.Option("--state-dir", help="Work on this state directory itself; the API may be down."),
]
Database = Annotated[
    str | None, typer.Option("--database", help="With --state-dir: its PostgreSQL or SQLite URL.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what it would reach; change nothing.")]
SERVER = "http://127.0.0.1:8420"


def typed(text: str) -> str:
    """As it can be sent and stored: bytes of another encoding keep no rollback waiting."""
    return text.encode(errors="replace").decode()
