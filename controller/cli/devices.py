"""`device list|show|enrol|move|retire|replace|quarantine`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from controller.cli.errors import Failed
from controller.cli.options import SERVER, Format, Output, Server, Token

group = typer.Typer(help="The registry of devices.", no_args_is_help=True)
Id = Annotated[str, typer.Argument(metavar="ID", help="Id of the device.")]
Labels = Annotated[
    list[str] | None, typer.Option("--label", metavar="KEY=VALUE", help="May be repeated.")
]
Reason = Annotated[str, typer.Option(help="Why: stands in the audit.")]


def register(app: typer.Typer) -> None:
    app.add_typer(group, name="device")


@group.command("list")
def list_devices(
    fleet: Annotated[str, typer.Option(help="Only this fleet.")] = "",
    status: Annotated[str, typer.Option(help="pending, active, retired, quarantined.")] = "",
    server: Server = SERVER,
    token: Token = None,
    output: Format = Output.TABLE,
) -> None:
    """List devices with what they run."""
    from controller.cli import show
    from controller.cli.client import Api

    found = list(Api(server, token).every("/devices", fleet=fleet, status=status))
    if output is Output.JSON:
        show.as_json(found)
        return
    show.table(
        ("ID", "FLEET", "STATUS", "COHORT", "SCORE", "STATE", "RUNS", "ONLINE"),
        [
            (
                d["id"],
                d["fleet"],
                d["status"],
                d["cohort"],
                _score(d),
                d["state"],
                _runs(d),
                "yes" if d["online"] else "no",
            )
            for d in found
        ],
    )


@group.command("show")
def show_device(
    device: Id, server: Server = SERVER, token: Token = None, output: Format = Output.TABLE
) -> None:
    """Show all that is known of one device."""
    from controller.cli import show
    from controller.cli.client import Api

    found = Api(server, token).get(f"/devices/{device}")
    if output is Output.JSON:
        show.as_json(found)
        return
    labels = ", ".join(f"{k}={v}" for k, v in sorted(found["labels"].items()))
    rows = [
        ("fleet", found["fleet"]),
        ("status", found["status"]),
        ("labels", labels),
        ("cohort", found["cohort"]),
        ("score", found["score"].get("sentence") or _score(found)),
        ("runs", _runs(found)),
        ("state", found["state"]),
        ("reason", found["reason"]),
        ("blocked by", ", ".join(found["blockedBy"])),
        ("last contact", found["lastContact"]),
        ("online", "yes" if found["online"] else "no"),
        ("history", " → ".join(entry["release"] for entry in found["history"])),
    ]
    for name, value in rows:
        print(f"{name:<13} {'' if value is None else value}".rstrip())


@group.command("enrol")
def enrol(
    device: Id,
    fleet: Annotated[str, typer.Option(help="The fleet it belongs to.")],
    label: Labels = None,
    server: Server = SERVER,
    token: Token = None,
    output: Format = Output.TABLE,
) -> None:
    """Take a device in; prints its one-time token."""
    from controller.cli import show
    from controller.cli.client import Api

    body = {"id": device, "fleet": fleet, "labels": _labels(label)}
    made = Api(server, token).post("/devices", body)
    if output is Output.JSON:
        show.as_json(made["items"][0])
    else:
        print(made["token"])


@group.command("move")
def move(
    device: Id,
    fleet: Annotated[str, typer.Option(help="The fleet it goes to.")],
    label: Labels = None,
    reason: Reason = "",
    server: Server = SERVER,
    token: Token = None,
    output: Format = Output.TABLE,
) -> None:
    """Give a device to another fleet; labels replace the old ones when given."""
    body: dict[str, Any] = {"fleet": fleet, "reason": reason}
    if label is not None:
        body["labels"] = _labels(label)
    _change(device, "move", body, server, token, output)


@group.command("retire")
def retire(
    device: Id,
    reason: Reason = "",
    server: Server = SERVER,
    token: Token = None,
    output: Format = Output.TABLE,
) -> None:
    """Take a device out for good."""
    _change(device, "retire", {"reason": reason}, server, token, output)


@group.command("quarantine")
def quarantine(
    device: Id,
    reason: Reason = "",
    server: Server = SERVER,
    token: Token = None,
    output: Format = Output.TABLE,
) -> None:
    """Cut a device off until `device enrol` takes it in again."""
    _change(device, "quarantine", {"reason": reason}, server, token, output)


@group.command("replace")
def replace(
    device: Id,
    reason: Reason = "",
    server: Server = SERVER,
    token: Token = None,
    output: Format = Output.TABLE,
) -> None:
    """Another board under the same id; prints its one-time token."""
    _change(device, "replace", {"reason": reason}, server, token, output)


def _change(
    device: str, verb: str, body: Any, server: str, token: str | None, output: Output
) -> None:
    from controller.cli import show
    from controller.cli.client import Api

    done = Api(server, token).post(f"/devices/{device}:{verb}", body)
    if output is Output.JSON:
        show.as_json(done)
    elif "token" in done:
        print(done["token"])
    else:
        print(f"{done['device']}: {done['status']}, fleet {done['fleet']}")


def _labels(given: list[str] | None) -> dict[str, str]:
    labels: dict[str, str] = {}
    for text in given or ():
        key, sign, value = text.partition("=")
        if not sign or not key:
            raise Failed(f"--label {text!r}: write key=value", 2)
        labels[key] = value
    return labels


def _runs(device: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {part['release']}{'' if part['committed'] else ' (trial)'}"
        for name, part in sorted(device["components"].items())
    )


def _score(device: dict[str, Any]) -> str:
    value = device["score"]["value"]
    return "unscored" if value is None else f"{value:.1f}"
