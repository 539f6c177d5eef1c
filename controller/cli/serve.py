"""`bellwether serve`: run the service, or one role of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def register(app: typer.Typer) -> None:
    app.command("serve")(serve)


def serve(
    repo: Annotated[
        str | None, typer.Option(help="Fleet repository: a path, file://, https:// or ssh:// URL.")
    ] = None,
    branch: Annotated[str | None, typer.Option(help="Branch to follow. [default: main]")] = None,
    path: Annotated[str | None, typer.Option(help="Folder of the manifests in it.")] = None,
    state_dir: Annotated[
        Path | None, typer.Option(help="Where databases, keys and artifacts are kept.")
    ] = None,
    database: Annotated[
        str | None, typer.Option(help="postgresql+psycopg://… ; SQLite files without it.")
    ] = None,
    broker: Annotated[
        str | None, typer.Option(help="mqtt://host:port ; a Mosquitto child without it.")
    ] = None,
    listen: Annotated[
        str | None, typer.Option(help="ADDRESS:PORT for HTTP. [default: 127.0.0.1:8420]")
    ] = None,
    role: Annotated[
        str | None, typer.Option(help="all, api, ingest or controller. [default: all]")
    ] = None,
    auth: Annotated[
        str | None,
        typer.Option(help="loopback (this machine's users are trusted) or required."),
    ] = None,
    public_url: Annotated[
        str | None, typer.Option(help="How devices reach this server's HTTP.")
    ] = None,
    oidc_issuer: Annotated[
        str | None, typer.Option(help="Identity provider: its issuer URL.")
    ] = None,
    oidc_audience: Annotated[
        str | None, typer.Option(help="Audience of bearer JWTs for the API.")
    ] = None,
    oidc_client_id: Annotated[
        str | None, typer.Option(help="Our client at the provider, for the login of pages.")
    ] = None,
    oidc_client_secret_file: Annotated[
        Path | None, typer.Option(help="The secret of that client.")
    ] = None,
    oidc_jwks: Annotated[
        str | None, typer.Option(help="File or URL of its keys; by discovery without it.")
    ] = None,
    oidc_roles: Annotated[
        Path | None, typer.Option(help="TOML file: which claims give which roles.")
    ] = None,
    notify: Annotated[Path | None, typer.Option(help="TOML file: who is told of what.")] = None,
    rate_limit: Annotated[
        float | None, typer.Option(help="Requests a second of one caller; 0: any. [default: 50]")
    ] = None,
    webhook_secret_file: Annotated[
        Path | None, typer.Option(help="Secret that signs the Git webhook.")
    ] = None,
    allowed_signers: Annotated[
        Path | None, typer.Option(help="SSH allowed-signers file: commits must be signed.")
    ] = None,
    release_signers: Annotated[
        Path | None, typer.Option(help="TOML file: whose signatures a release needs.")
    ] = None,
    forge: Annotated[
        str | None,
        typer.Option(help="Commit statuses: the repository's API URL (GitHub, Gitea), or file:///"),
    ] = None,
    forge_token_file: Annotated[
        Path | None, typer.Option(help="Token of the forge; it writes statuses and pull requests.")
    ] = None,
    poll_interval: Annotated[
        float | None, typer.Option(help="Seconds between two looks at Git. [default: 15]")
    ] = None,
    tick_interval: Annotated[
        float | None, typer.Option(help="Seconds between turns of the loop. [default: 0.5]")
    ] = None,
    lease: Annotated[
        float | None,
        typer.Option(help="Seconds until another controller takes over. [default: 10]"),
    ] = None,
    retention: Annotated[
        float | None, typer.Option(help="Seconds that raw health is kept. [default: 1209600]")
    ] = None,
    audit_anchor: Annotated[
        float | None, typer.Option(help="Seconds between audit anchors in Git. [default: 86400]")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file with settings; flags and variables win.")
    ] = None,
    show_settings: Annotated[
        bool, typer.Option("--show-settings", help="Print the settings in force, and end.")
    ] = False,
) -> None:
    """Run Bellwether: watch Git, roll releases out, take telemetry in, serve the API.

    Flags are strongest, then BELLWETHER_* variables, then the TOML file. Ends in order on SIGTERM.
    """
    from controller.settings import SettingsError, load

    flags: dict[str, Any] = {
        "repo": repo,
        "branch": branch,
        "path": path,
        "state_dir": state_dir,
        "database": database,
        "broker": broker,
        "listen": listen,
        "role": role,
        "auth": auth,
        "public_url": public_url,
        "oidc_issuer": oidc_issuer,
        "oidc_audience": oidc_audience,
        "oidc_client_id": oidc_client_id,
        "oidc_client_secret_file": oidc_client_secret_file,
        "oidc_jwks": oidc_jwks,
        "oidc_roles": oidc_roles,
        "notify": notify,
        "rate_limit": rate_limit,
        "lease": lease,
        "retention": retention,
        "audit_anchor": audit_anchor,
        "webhook_secret_file": webhook_secret_file,
        "allowed_signers": allowed_signers,
        "release_signers": release_signers,
        "forge": forge,
        "forge_token_file": forge_token_file,
        "poll_interval": poll_interval,
        "tick_interval": tick_interval,
    }
    try:
        settings = load(flags, config)
    except SettingsError as error:
        typer.echo(f"bellwether serve: {error}", err=True)
        raise typer.Exit(2) from None
    try:
        _files(settings)
    except ValueError as error:
        typer.echo(f"bellwether serve: {error}", err=True)
        raise typer.Exit(2) from None
    if show_settings:
        typer.echo(json.dumps(settings.shown(), indent=2))
        return
    if not settings.repo and settings.role in ("all", "controller"):
        typer.echo("bellwether serve: --repo: say which repository to follow", err=True)
        raise typer.Exit(2)
    from controller.service import serve as run

    raise typer.Exit(run(settings))


def _files(settings: Any) -> None:
    """Files that a role would stumble over later are read now; raises ValueError."""
    from controller import notify, rolemap

    if settings.oidc_roles is not None:
        rolemap.load(settings.oidc_roles)
    if settings.notify is not None:
        notify.load(settings.notify)
