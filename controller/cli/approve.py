"""`approve`, `approvals`, `recovery`: a second person's word; whom a rollback has not reached."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from controller.cli.errors import Failed
from controller.cli.options import SERVER, Format, Output, Server, Token, typed

_STATES = ("waiting", "granted", "void")


def register(app: typer.Typer) -> None:
    app.command("approve")(approve)
    app.command("approvals")(approvals)
    app.command("recovery")(recovery)


def approve(
    what: Annotated[str, typer.Argument(help="Id of the approval, or the rollout that waits.")],
    reason: Annotated[str, typer.Option(help="Stands in the audit.")] = "",
    digest: Annotated[
        str | None, typer.Option(help="Only if it is this; what is shown now without it.")
    ] = None,
    reject: Annotated[bool, typer.Option("--reject", help="Say no: it is void then.")] = False,
    break_glass: Annotated[
        bool, typer.Option("--break-glass", help="Alone and at once; is told to all.")
    ] = False,
    show_only: Annotated[
        bool, typer.Option("--show", help="Show what would be approved; answer nothing.")
    ] = False,
    server: Server = SERVER,
    token: Token = None,
    output: Format = Output.TABLE,
) -> None:
    """Approve what somebody else asked for: start, recall, promotion, lift, a looser rule."""
    from controller.cli import show
    from controller.cli.client import Api

    api = Api(server, token)
    asked = api.get(f"/approvals/{what}")
    if show_only:
        show.as_json(asked)
        return
    if output is Output.TABLE:
        print(f"{asked['kind']} by {asked['proposer']}: {_about(asked)}")
        print(f"plan {asked['digest']}")
    verb = "reject" if reject else "approve"
    if digest is None and not reject and sys.stdin.isatty():
        typer.confirm(f"Approve exactly this ({what} --show has all of it)?", abort=True)
    body = {"digest": digest or asked["digest"], "reason": typed(reason), "breakGlass": break_glass}
    done = api.post(f"/approvals/{asked['id']}:{verb}", body)
    if output is Output.JSON:
        show.as_json(done)
    else:
        print(f"{done['state']}: {done['sentence']}")


def approvals(
    state: Annotated[str, typer.Option(help="waiting, granted or void; empty: all.")] = "waiting",
    server: Server = SERVER,
    token: Token = None,
    output: Format = Output.TABLE,
) -> None:
    """List what waits for a second person."""
    from controller.cli import show
    from controller.cli.client import Api

    if state not in ("", *_STATES):
        raise Failed(f"--state {state}: one of {', '.join(_STATES)}", 2)
    rows = list(Api(server, token).every("/approvals", state=state))
    if output is Output.JSON:
        show.as_json(rows)
        return
    show.table(
        ("ID", "KIND", "FLEET", "ASKED BY", "NEEDS", "STATE", "WHAT"),
        [
            (r["id"], r["kind"], r["fleet"] or "all", r["proposer"],
             f"{len(r['approvedBy'])}/{r['needs']}", r["state"], _about(r))
            for r in rows
        ],
    )  # fmt: skip


def recovery(
    rollout: Annotated[str, typer.Argument(help="Id or name (its newest).")],
    server: Server = SERVER,
    token: Token = None,
    output: Format = Output.TABLE,
) -> None:
    """List the devices that a rollback has not reached, and why."""
    from controller.cli import show
    from controller.cli.client import Api

    api = Api(server, token)
    first = api.get(f"/rollouts/{rollout}/recovery", limit=1)
    rows = list(api.every(f"/rollouts/{rollout}/recovery"))
    if output is Output.JSON:
        show.as_json({**first, "items": rows, "next": None})
        return
    still = "device still runs" if first["count"] == 1 else "devices still run"
    print(f"{first['name']}: {first['count']} {still} {first['release']}")
    show.table(
        ("DEVICE", "STANDS", "WHY", "LAST CONTACT"),
        [(r["device"], r["word"], r["why"], r["lastContact"] or "never") for r in rows],
    )


def _about(asked: dict[str, Any]) -> str:
    seen = asked["seen"]
    if asked["kind"] == "rule":
        return f"{asked['fleet']}: {json.dumps(seen['from'])} → {json.dumps(seen['to'])}"
    release = seen.get("release")
    named = release["name"] if isinstance(release, dict) else release
    return " ".join(str(part) for part in (seen.get("name"), named, asked["reason"]) if part)
