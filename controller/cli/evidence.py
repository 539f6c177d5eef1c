"""`evidence export|verify`: the decisions of a rollout as a file, and the chain of the audit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from controller.cli.errors import Failed
from controller.cli.options import SERVER, Database, Server, Token

group = typer.Typer(help="Evidence of what was decided, and from what.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    app.add_typer(group, name="evidence")


@group.command("export")
def export(
    rollout: Annotated[str, typer.Argument(help="Id or name.")],
    out: Annotated[Path | None, typer.Option(help="File to write; stdout without it.")] = None,
    server: Server = SERVER,
    token: Token = None,
) -> None:
    """Write every decision with its inputs and policy, oldest first: `replay` judges them again."""
    from controller.cli.client import Api

    api = Api(server, token)
    about = api.get(f"/rollouts/{rollout}")
    decisions = list(api.every(f"/rollouts/{about['id']}/evidence", limit=20))
    text = json.dumps(
        {"v": 1, "rollout": about, "decisions": decisions[::-1]}, indent=1, ensure_ascii=False
    )
    if out is None:
        print(text)
        return
    try:
        out.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise Failed(f"{out}: {error.strerror}") from None


@group.command("verify")
def verify(
    state_dir: Annotated[
        Path, typer.Option(envvar="BELLWETHER_STATE_DIR", help="State directory of `serve`.")
    ] = Path("bellwether-state"),
    database: Database = None,
) -> None:
    """Check the chain of the audit rows; needs no running service."""
    from controller import audit
    from controller.cli.direct import open_engine
    from telemetry.store.database import reading

    with reading(open_engine(state_dir, database)) as conn:
        problems = audit.verify(conn)
    if problems:
        raise Failed("the audit is broken: " + "; ".join(problems[:10]))
    print("the audit chain is whole")
