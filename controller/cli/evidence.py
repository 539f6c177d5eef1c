"""`evidence export|verify`: one rollout as a signed file, and the chain of the audit."""

from __future__ import annotations

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
    """Write all evidence of a rollout in one signed file, for `evidence verify` and `replay`."""
    import sys

    from controller.cli.client import Api

    data = Api(server, token).get_bytes(f"/rollouts/{rollout}/evidence:file")
    if out is None:
        sys.stdout.write(data.decode())
        return
    try:
        out.write_bytes(data)
    except OSError as error:
        raise Failed(f"{out}: {error.strerror}") from None


@group.command("verify")
def verify(
    file: Annotated[
        Path | None, typer.Argument(help="A file of `evidence export`; the audit itself without.")
    ] = None,
    key: Annotated[
        str | None, typer.Option(help="FILE: the director's public key in hex, as you know it.")
    ] = None,
    state_dir: Annotated[
        Path, typer.Option(envvar="BELLWETHER_STATE_DIR", help="State directory of `serve`.")
    ] = Path("bellwether-state"),
    database: Database = None,
    repo: Annotated[
        Path | None, typer.Option(help="A clone of the fleet repository with anchors of the audit.")
    ] = None,
    head: Annotated[
        list[str] | None, typer.Option(metavar="SEQ:HASH", help="A head that you kept; repeatable.")
    ] = None,
) -> None:
    """Check an evidence file, or the whole audit against heads kept outside. Needs no service."""
    if file is not None:
        _verify_file(file, key)
        return
    from controller import anchors, audit
    from controller.cli.direct import open_engine
    from telemetry.store.database import reading

    try:
        heads = [anchors.parse(text) for text in head or ()]
    except ValueError as error:
        raise Failed(f"--head: {error}", 2) from None
    kept = anchors.kept(state_dir)
    found = anchors.recorded(repo or state_dir / "git")
    with reading(open_engine(state_dir, database)) as conn:
        problems = audit.verify(conn, heads=[*heads, *kept, *found])
        newest = audit.head(conn)
    if problems:
        raise Failed("the audit is broken: " + "; ".join(problems[:10]))
    rows = newest[0] if newest else 0
    print(f"the audit chain is whole: {rows} rows")
    print(f"heads kept outside: {len(kept)} beside it, {len(found)} in Git, {len(heads)} given")


def _verify_file(file: Path, key: str | None) -> None:
    from controller import dossier

    try:
        if file.stat().st_size > dossier.MOST_BYTES:
            raise Failed(f"{file}: larger than {dossier.MOST_BYTES} bytes")
        problems = dossier.check(file.read_bytes(), public=key)
    except OSError as error:
        raise Failed(f"{file}: {error.strerror}") from None
    if problems:
        raise Failed(f"{file}: " + "; ".join(problems[:10]))
    print(f"{file}: as it was signed; every verdict comes out the same")
