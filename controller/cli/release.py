"""`release publish|list|show`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from controller.cli.errors import Failed
from controller.cli.options import SERVER, Format, Output, Server, Token

group = typer.Typer(help="Releases and their artifacts.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    app.add_typer(group, name="release")


@group.command("publish")
def publish(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The artifact: tar, tar.gz, image.")],
    component: Annotated[str, typer.Option(help="The component that it is for.")],
    version: Annotated[str, typer.Option(help="Its version, as devices and people know it.")],
    name: Annotated[str, typer.Option(help="Name of the Release. [COMPONENT-VERSION]")] = "",
    server: Server = SERVER,
    token: Token = None,
    output: Format = Output.TABLE,
) -> None:
    """Store an artifact by its digest and print the Release document to commit."""
    from controller.cli import show
    from controller.cli.client import Api
    from controller.manifests.write import document_text

    try:
        content = file.read_bytes()
    except OSError as error:
        raise Failed(f"{file}: {error.strerror or error}: name a readable file") from None
    if not content:
        raise Failed(f"{file} is empty: name the artifact that devices install")
    from controller.artifacts import Unfit, check_bundle

    try:
        check_bundle(file)
    except Unfit as error:
        raise Failed(f"{file}: {error}") from None
    answer = Api(server, token, timeout=600).send(
        "/releases:publish", content, component=component, version=version, name=name
    )
    if output is Output.JSON:
        show.as_json(answer)
        return
    typer.echo(document_text(answer["document"]), nl=False)


@group.command("list")
def list_releases(
    server: Server = SERVER, token: Token = None, output: Format = Output.TABLE
) -> None:
    """List the releases that accepted commits have named."""
    from controller.cli import show
    from controller.cli.client import Api

    found = list(Api(server, token).every("/releases"))
    if output is Output.JSON:
        show.as_json(found)
        return
    rows = [(r["name"], r["version"], ", ".join(_components(r)), r["digest"][:19]) for r in found]
    show.table(("NAME", "VERSION", "COMPONENTS", "DIGEST"), rows)


@group.command("show")
def show_release(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    server: Server = SERVER,
    token: Token = None,
    output: Format = Output.TABLE,
) -> None:
    """Show one release: its digest, and each artifact."""
    from controller.cli import show
    from controller.cli.client import Api

    found = next((r for r in Api(server, token).every("/releases") if r["name"] == name), None)
    if found is None:
        raise Failed(f"release {name!r}: unknown; `bellwether release list` lists them")
    if output is Output.JSON:
        show.as_json(found)
        return
    show.table(("FIELD", "VALUE"), [(key, value) for key, value in found.items()])


def _components(release: dict[str, Any]) -> list[str]:
    listed = release.get("components") or release.get("artifacts") or []
    return sorted(c["component"] if isinstance(c, dict) else str(c) for c in listed)
