"""`token create|list|revoke`: on the state directory itself, so that the first one can be made."""

from __future__ import annotations

import getpass
import time
from pathlib import Path
from typing import Annotated

import typer

from controller.cli.errors import Failed
from controller.cli.options import Database, Format, Output

group = typer.Typer(help="API tokens of people and programs.", no_args_is_help=True)
Where = Annotated[
    Path,
    typer.Option("--state-dir", envvar="BELLWETHER_STATE_DIR", help="State directory of `serve`."),
]
HERE = Path("bellwether-state")


def register(app: typer.Typer) -> None:
    app.add_typer(group, name="token")


@group.command("create")
def create(
    name: Annotated[str, typer.Argument(help="Whose it is: stands in the audit.")],
    role: Annotated[
        str, typer.Option(help="viewer, release-manager, on-call, admin or auditor.")
    ] = "viewer",
    fleet: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only this fleet; repeatable.")
    ] = None,
    days: Annotated[float | None, typer.Option(min=0, help="Days until it expires.")] = None,
    state_dir: Where = HERE,
    database: Database = None,
    output: Format = Output.TABLE,
) -> None:
    """Make a token and print it: it is shown this once."""
    from controller import tokens
    from controller.cli import show
    from controller.cli.direct import open_engine

    if role not in list(tokens.Role):
        raise Failed(f"--role {role}: one of {', '.join(tokens.Role)}", 2)
    if not name.strip() or len(name) > 128 or not name.isprintable():
        raise Failed("NAME: 1 to 128 printable characters", 2)
    made = tokens.create(
        open_engine(state_dir, database),
        name=name,
        role=tokens.Role(role),
        fleets=fleet or (),
        actor=f"{getpass.getuser()} (cli)",
        now=time.time(),
        lifetime=None if days is None else days * 86400,
    )
    if output is Output.JSON:
        show.as_json({"id": made.row.id, "name": name, "role": role, "token": made.token})
    else:
        print(made.token)


@group.command("list")
def list_tokens(
    state_dir: Where = HERE, database: Database = None, output: Format = Output.TABLE
) -> None:
    """List tokens; the tokens themselves are not kept."""
    from controller import tokens
    from controller.cli import show
    from controller.cli.direct import open_engine
    from controller.store.views import when

    rows = [
        {
            "id": row.id,
            "name": row.name,
            "role": row.role,
            "fleets": ",".join(row.fleets) or "all",
            "createdAt": when(row.created_at),
            "expiresAt": when(row.expires_at),
            "revokedAt": when(row.revoked_at),
        }
        for row in tokens.every(open_engine(state_dir, database))
    ]
    if output is Output.JSON:
        show.as_json(rows)
        return
    show.table(
        ("ID", "NAME", "ROLE", "FLEETS", "EXPIRES", "REVOKED"),
        [
            (r["id"], r["name"], r["role"], r["fleets"], r["expiresAt"],
             r["revokedAt"])
            for r in rows
        ],
    )  # fmt: skip


@group.command("revoke")
def revoke(
    token: Annotated[str, typer.Argument(metavar="ID", help="Id or name of the token.")],
    state_dir: Where = HERE,
    database: Database = None,
) -> None:
    """End a token at once."""
    from controller import tokens
    from controller.cli.direct import open_engine

    actor = f"{getpass.getuser()} (cli)"
    engine = open_engine(state_dir, database)
    if not tokens.revoke(engine, token, actor=actor, now=time.time()):
        raise Failed(f"{token}: no token in force has this id or name; see `token list`")
    print(f"{token}: revoked")
