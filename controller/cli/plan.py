"""`plan`: what a commit would do, before it is merged."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from controller.cli.errors import Failed
from controller.cli.options import Database, StateDir, Token

if TYPE_CHECKING:
    from controller.planner import Tree

CHANGES = 3


class PlanFormat(str, Enum):  # noqa: UP042 - typer reads the values of str enums
    TEXT = "table"
    JSON = "json"
    MARKDOWN = "markdown"


def register(app: typer.Typer) -> None:
    app.command("plan")(plan)


def plan(
    base: Annotated[str, typer.Option(help="Revision to compare with, e.g. origin/main.")],
    head: Annotated[
        str | None, typer.Option(help="Revision that is planned; without it the work tree.")
    ] = None,
    repo: Annotated[
        Path, typer.Option(exists=True, file_okay=False, help="A checkout of the fleet repository.")
    ] = Path(),
    path: Annotated[str, typer.Option(help="Folder of the manifests in it.")] = "",
    server: Annotated[
        str | None,
        typer.Option(envvar="BELLWETHER_SERVER", help="Plan with the fleet that it knows."),
    ] = None,
    token: Token = None,
    state_dir: StateDir = None,
    database: Database = None,
    detailed: Annotated[
        bool, typer.Option("--detailed-exitcode", help="3 when the commit changes something.")
    ] = False,
    comment: Annotated[
        int | None,
        typer.Option(min=1, help="Write it to this pull request too; a later plan replaces it."),
    ] = None,
    forge: Annotated[
        str | None,
        typer.Option(envvar="BELLWETHER_FORGE", help="API URL of the repository there."),
    ] = None,
    forge_token: Annotated[
        str | None,
        typer.Option(envvar="BELLWETHER_FORGE_TOKEN", help="Its token.", show_envvar=True),
    ] = None,
    output: Annotated[
        PlanFormat, typer.Option("--output", "-o", help="table, json or markdown.")
    ] = PlanFormat.TEXT,
) -> None:
    """Say what a commit would do: steps, devices, who is left out, downloads, earliest end.

    Ask a server (--server) or a state directory for the fleet as it is; without either, only the
    documents are compared. 0: fine · 1: the head has errors · with --detailed-exitcode 3: changes.
    """
    from controller.cli import show

    sides = _tree(repo, path, base), _tree(repo, path, head)
    text, found = _planned(*sides, server, token, state_dir, database)
    if output is PlanFormat.JSON:
        show.as_json(found)
    elif output is PlanFormat.MARKDOWN:
        typer.echo(found["markdown"], nl=False)
    else:
        typer.echo(text)
    if comment is not None:
        _comment(comment, found["markdown"], forge, forge_token)
    if found["errors"]:
        raise typer.Exit(1)
    if detailed and found["changes"]:
        raise typer.Exit(CHANGES)


def _comment(pull_request: int, body: str, forge: str | None, token: str | None) -> None:
    from controller.forge import ForgeUnavailable, open_forge

    if forge is None:
        raise Failed("--comment needs --forge URL (or BELLWETHER_FORGE)", 2)
    try:
        url = open_forge(forge, token).comment(pull_request, body)
    except ValueError as error:
        raise Failed(f"--forge: {error}", 2) from None
    except ForgeUnavailable as error:
        raise Failed(f"the plan could not be written to #{pull_request}: {error}") from None
    typer.echo(f"plan written to {url}", err=True)


def _planned(
    base: Tree,
    head: Tree,
    server: str | None,
    token: str | None,
    state_dir: Path | None,
    database: str | None,
) -> tuple[str, dict[str, Any]]:
    """(text for a terminal, the plan's document)."""
    import time

    from controller import planner
    from controller.rollout import plan_text

    if server:
        from controller.cli.client import Api

        body = {"base": _body(base), "head": _body(head)}
        found = Api(server, token).post("/plan", body)
        return found["text"], found
    if state_dir is not None:
        from controller.cli.direct import open_engine
        from controller.service import telemetry_store
        from controller.settings import Settings

        engine = open_engine(state_dir, database)
        given: dict[str, Any] = {"database": database} if database else {}
        reader = telemetry_store(Settings(state_dir=state_dir, **given))
        made = planner.against_fleet(base, head, engine, reader, time.time())
    else:
        made = planner.documents_only(base, head, time.time())
    return plan_text.plain(made), plan_text.document(made)


def _body(tree: Tree) -> dict[str, Any]:
    files = {}
    for name, content in tree.files.items():
        files[name] = content if isinstance(content, str) else content.decode(errors="replace")
    return {"revision": tree.revision, "commit": tree.commit, "files": files}


def _tree(repo: Path, path: str, revision: str | None) -> Tree:
    """The manifests of a revision, or of the work tree as it lies there."""
    from controller.fleetrepo import FleetRepo, RepoUnavailable
    from controller.planner import Tree

    if revision is None:
        return _work_tree(repo, path)
    here = FleetRepo(str(repo), "main", path, repo.resolve())
    try:
        commit = here.resolve(revision)
        author = here.info(commit).author
        return Tree(revision=revision, commit=commit, author=author, files=here.read(commit))
    except RepoUnavailable as error:
        raise Failed(
            f"{repo.resolve()}: {revision!r} cannot be read ({error}); is it a checkout, and was "
            "the revision fetched? (in CI: fetch with full history)"
        ) from None


def _work_tree(repo: Path, path: str) -> Tree:
    from controller.fleetrepo import is_manifest
    from controller.planner import Tree

    folder = repo / path
    if not folder.is_dir():
        raise Failed(f"{folder}: no such folder; name the manifests' folder with --path", 2)
    files = {
        name: file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if is_manifest(name := file.relative_to(repo).as_posix())
        and file.is_file()
        and not file.is_symlink()
    }
    return Tree(revision="work tree", commit="0" * 40, author="", files=files)
