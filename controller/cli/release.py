"""`release publish|list|show|sign|key`."""

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
    rows = [
        (r["name"], r["document"]["version"], ", ".join(_components(r)), r["digest"][:19])
        for r in found
    ]
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
    show.table(("FIELD", "VALUE"), _about(found))


@group.command("sign")
def sign(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The manifest with the Release.")],
    key: Annotated[Path, typer.Option(help="Your private key: Ed25519 in PEM.")],
    name: Annotated[str, typer.Option(help="Which Release. [the only one of the file]")] = "",
) -> None:
    """Write your signature into a Release: commit it then. No server has your key."""
    from controller import release_signing
    from controller.manifests.reader import read
    from controller.manifests.write import with_signatures

    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise Failed(f"{file}: {error}: name a readable file") from None
    content = read({file.name: text})
    broken = [str(problem) for problem in content.problems if problem.severity == "error"]
    if broken:
        raise Failed(broken[0])
    releases = content.manifests.releases
    if not name and len(releases) != 1:
        raise Failed(f"{file} has {len(releases)} releases: choose one by --name")
    release = releases.get(name or next(iter(releases), ""))
    if release is None:
        raise Failed(f"{file}: no release {name!r} in it")
    try:
        mine = release_signing.sign(release, release_signing.private_key(key))
        kept = [one for one in release.signatures if one.keyid != mine.keyid]
        signatures = [one.model_dump() for one in (*kept, mine)]
        file.write_text(with_signatures(text, release.name, signatures))
    except ValueError as error:
        raise Failed(str(error)) from None
    n = len(signatures)
    typer.echo(
        f"{release.name} is signed by key {mine.keyid[:16]} "
        f"({n} {'signature' if n == 1 else 'signatures'} in {file}): commit it"
    )


@group.command("key")
def new_key(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where the private key goes.")],
) -> None:
    """Make a key to sign releases with; prints what the file of release signers needs."""
    from controller.keys import DirectorKey

    if file.exists():
        raise Failed(f"{file} is there already: name a new file")
    public = DirectorKey.load_or_create(file).public_hex
    typer.echo(f'[[signer]]\nname = "{file.stem}"\npublic = "{public}"')


def _components(release: dict[str, Any]) -> list[str]:
    return sorted(artifact["component"] for artifact in release["document"]["artifacts"])


def _about(release: dict[str, Any]) -> list[tuple[str, Any]]:
    """What a person asks of a release; `-o json` has the whole document."""
    told = release["document"]
    back = told["rollback"]
    way_back = "allowed" if back["allowed"] else " ".join(("NOT allowed", back["reason"])).strip()
    signed = [one["keyid"][:16] for one in told["signatures"]]
    return [
        ("name", release["name"]),
        ("version", told["version"]),
        ("digest", release["digest"]),
        *(
            (f"artifact {a['component']}", f"{a['digest']}, {a['size']:,} bytes")
            for a in told["artifacts"]
        ),
        ("requires", ", ".join(f"{r['component']} {r['version']}" for r in told["requires"])),
        ("fixes", told["fixes"]),
        ("rollback", way_back),
        ("signed by", ", ".join(signed) or "nobody"),
        ("commit", f"{release['commit']}, accepted {release['seenAt']}"),
        ("notes", told["notes"]),
    ]
