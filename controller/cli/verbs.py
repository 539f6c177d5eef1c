"""`rollback`, `stop`, `hold`, `lift`, `pause`, `resume`, `promote`: what people want of a rollout.

Over the API with the revision that was seen; with `--state-dir` the same command is written into
the database itself, for the hour in which the API is down.
"""

from __future__ import annotations

import getpass
import time
from collections.abc import Callable
from typing import Annotated, Any

import typer

from controller.cli.errors import Failed
from controller.cli.options import (
    SERVER,
    Database,
    DryRun,
    Format,
    Output,
    Server,
    StateDir,
    Token,
    typed,
)

_HELP = {
    "rollback": "Take devices back to what each ran before, and reject the digest.",
    "hold": "Reject the digest of a rollout; devices stay as they are.",
    "pause": "Stop widening until `resume`.",
    "lift": "End the hold of a rollout's digest: it may be tried again.",
    "resume": "Go on with a paused or inconclusive rollout.",
    "promote": "Pass the pause or the soak of the current step.",
}
_SCOPES = ("all", "product", "hardware", "digest")
_STOPPED = (
    "Which: a product (a label, or a fleet), a hardware, a digest (of a release or an artifact)."
)


def register(app: typer.Typer) -> None:
    for kind, text in _HELP.items():
        app.command(kind, help=text)(_command(kind))
    app.command("stop")(stop)


def _command(kind: str) -> Callable[..., None]:
    def command(
        rollout: Annotated[str, typer.Argument(help="Id or name (its newest).")],
        reason: Annotated[str, typer.Option(help="Why: stands in the audit and in Git.")] = "",
        incident: Annotated[str | None, typer.Option(help="As in INC-1.")] = None,
        to: Annotated[
            str | None, typer.Option(help="rollback: previous, or the name of a release.")
        ] = None,
        hold: Annotated[str | None, typer.Option(help="lift: the id of one hold.")] = None,
        cohort: Annotated[
            str | None, typer.Option(help="rollback, hold: this cohort's devices alone.")
        ] = None,
        step: Annotated[
            int | None, typer.Option(min=1, help="rollback, hold: this step's devices alone.")
        ] = None,
        device: Annotated[
            list[str] | None,
            typer.Option(metavar="ID", help="rollback, hold: this device alone; repeatable."),
        ] = None,
        label: Annotated[
            list[str] | None,
            typer.Option(
                metavar="KEY=VALUE",
                help="rollback, hold: devices with this label alone; repeatable.",
            ),
        ] = None,
        break_glass: Annotated[
            bool, typer.Option("--break-glass", help="Without the second person; is told to all.")
        ] = False,
        if_revision: Annotated[
            int | None, typer.Option(help="Refuse when the rollout has moved on since.")
        ] = None,
        dry_run: DryRun = False,
        server: Server = SERVER,
        token: Token = None,
        state_dir: StateDir = None,
        database: Database = None,
        output: Format = Output.TABLE,
    ) -> None:
        body = {"reason": reason, "incident": incident, "to": to, "hold": hold}
        given: dict[str, Any] = {name: typed(text) for name, text in body.items() if text}
        if scope := _scope(cohort, step, device, label):
            given["scope"] = scope
        _belongs(kind, given)
        if break_glass:
            given["breakGlass"] = True
        if state_dir is not None:
            done = _direct(kind, rollout, given, if_revision, dry_run, state_dir, database)
        else:
            done = _remote(kind, rollout, given, if_revision, dry_run, server, token)
        _show(done, output)

    command.__name__ = kind
    return command


def _belongs(kind: str, given: dict[str, Any]) -> None:
    """An option of another verb is refused: a part that was named must not be taken for all."""
    of = {"to": ("rollback",), "hold": ("lift",), "scope": ("rollback", "hold")}
    for name, kinds in of.items():
        if name in given and kind not in kinds:
            options = "--cohort, --step, --device, --label" if name == "scope" else f"--{name}"
            raise Failed(f"{kind} has no {options}: only {' and '.join(kinds)} can take it", 2)


def _scope(
    cohort: str | None, step: int | None, device: list[str] | None, label: list[str] | None
) -> dict[str, Any]:
    """The part of the fleet that was named; empty for all of it."""
    found: dict[str, Any] = {}
    if cohort:
        found["cohort"] = typed(cohort)
    if step is not None:
        found["step"] = step - 1
    if device:
        found["devices"] = [typed(one) for one in device]
    if label:
        pairs = [typed(one).partition("=") for one in label]
        if not all(key and sign for key, sign, _ in pairs):
            raise Failed("--label: write KEY=VALUE", 2)
        found["selector"] = {"matchLabels": {key: value for key, _, value in pairs}}
    if len(found) > 1:
        raise Failed("one of --cohort, --step, --device, --label", 2)
    return found


def stop(
    reason: Annotated[str, typer.Option(help="Why: stands in the audit.")],
    scope: Annotated[str, typer.Option(help="all, product, hardware or digest.")] = "all",
    value: Annotated[str, typer.Option(help=_STOPPED)] = "",
    end: Annotated[bool, typer.Option("--end", help="End this stop.")] = False,
    incident: Annotated[str | None, typer.Option(help="As in INC-1.")] = None,
    break_glass: Annotated[
        bool, typer.Option("--break-glass", help="--end without the second person; told to all.")
    ] = False,
    dry_run: DryRun = False,
    server: Server = SERVER,
    token: Token = None,
    state_dir: StateDir = None,
    database: Database = None,
    output: Format = Output.TABLE,
) -> None:
    """Stop everything in scope: no new activation anywhere. Needs no preview, no Git, no broker."""
    if scope not in _SCOPES:
        raise Failed(f"--scope {scope}: one of {', '.join(_SCOPES)}", 2)
    body = {"scope": scope, "value": value, "reason": reason, "incident": incident or ""}
    given: dict[str, Any] = {name: typed(text) for name, text in body.items() if text}
    if end:
        given["lift"] = True
    if break_glass:
        given["breakGlass"] = True
    if state_dir is not None:
        _show(_direct("stop", None, given, None, dry_run, state_dir, database), output)
        return
    from controller.cli.client import Api

    _show(Api(server, token).post("/stop", given, dry_run=dry_run), output)


def _remote(
    kind: str,
    rollout: str,
    body: dict[str, Any],
    if_revision: int | None,
    dry_run: bool,
    server: str,
    token: str | None,
) -> dict[str, Any]:
    from controller.cli.client import Api

    api = Api(server, token)
    found, seen = api.get_with_revision(f"/rollouts/{rollout}")
    wanted = seen if if_revision is None else f'"{if_revision}"'
    done = api.post(f"/rollouts/{found['id']}:{kind}", body, if_match=wanted, dry_run=dry_run)
    return dict(done)


def _direct(
    kind: str,
    rollout: str | None,
    body: dict[str, Any],
    if_revision: int | None,
    dry_run: bool,
    state_dir: Any,
    database: str | None,
) -> dict[str, Any]:
    from controller import commands, wake
    from controller.cli.direct import open_engine

    engine = open_engine(state_dir, database)
    rest = {k: v for k, v in body.items() if k not in ("reason", "incident", "breakGlass")}
    try:
        if dry_run and rollout is None:
            return commands.preview_stop(engine, rest)
        if dry_run and rollout is not None:
            return _preview(engine, kind, rollout, rest, state_dir, database)
        recorded = commands.record(
            engine,
            kind=kind,
            rollout=rollout,
            body=rest,
            actor=f"{getpass.getuser()} (cli)",
            reason=body.get("reason", ""),
            incident=body.get("incident"),
            if_revision=if_revision,
            now=time.time(),
            break_glass=bool(body.get("breakGlass")),
        )
    except commands.Refused as error:
        raise Failed(error.message) from None
    finally:
        engine.dispose()
    wake.poke(state_dir)
    return {
        "id": recorded.id,
        "revision": recorded.revision,
        "state": recorded.state,
        "sentence": recorded.sentence,
    }


def _preview(
    engine: Any, kind: str, rollout: str, body: dict[str, Any], state_dir: Any, database: str | None
) -> dict[str, Any]:
    """The blast radius by the databases themselves; without telemetry it says so."""
    from controller import preview
    from controller.cli.direct import telemetry_rows

    heard = telemetry_rows(state_dir, database)
    return preview.preview(engine, heard, kind=kind, rollout=rollout, body=body, now=time.time())


def _show(done: dict[str, Any], output: Output) -> None:
    from controller.cli import show

    if output is Output.JSON:
        show.as_json(done)
    else:
        print(done["sentence"])
