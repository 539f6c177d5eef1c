"""`status`, `wait`: what moves, and how it ends."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from controller.cli.options import SERVER, Format, Output, Server, Token
from controller.rollout.model import quoted

if TYPE_CHECKING:
    from rich.console import RenderableType

    from controller.cli.client import Api

ROLLED_BACK, TIMED_OUT, DENIED = 4, 5, 6


def register(app: typer.Typer) -> None:
    app.command("status")(status)
    app.command("wait")(wait)


def status(
    rollout: Annotated[str | None, typer.Argument(help="Id or name; all without it.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again at every change.")] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
    server: Server = SERVER,
    token: Token = None,
    output: Format = Output.TABLE,
) -> None:
    """Show the rollouts, or one of them with its steps and latest decisions."""
    from controller.cli.client import Api

    api = Api(server, token)

    def look() -> dict[str, Any]:
        return _one(api, rollout) if rollout else _all(api)

    if watch and output is Output.TABLE and sys.stdout.isatty():
        _live(look, interval)
        return
    last: Any = None
    while True:
        found = look()
        if found != last:
            _show(found, output)
            last = found
        if not watch:
            return
        time.sleep(interval)


def _live(look: Callable[[], dict[str, Any]], interval: float) -> None:
    """The tree in place, until Ctrl-C; a server that is away for a moment is said, not the end."""
    from rich.live import Live
    from rich.text import Text

    from controller.cli.errors import Failed

    shown = _tree(look())
    with Live(shown, auto_refresh=False, vertical_overflow="visible") as live:
        while True:
            time.sleep(interval)
            try:
                shown = _tree(look())
                live.update(shown, refresh=True)
            except Failed as error:
                from rich.console import Group

                stale = Text(f"stale: {error}", style="bold yellow")
                live.update(Group(stale, shown), refresh=True)


def _tree(found: dict[str, Any]) -> RenderableType:
    from controller.cli import tree

    return tree.rollout(found) if "rollout" in found else tree.fleets(found)


def wait(
    rollout: Annotated[str, typer.Argument(help="Id or name; it need not exist yet.")],
    release: Annotated[str | None, typer.Option(help="Only a rollout of this release.")] = None,
    timeout: Annotated[float, typer.Option(min=0, help="Seconds.")] = 3600.0,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 0.5,
    server: Server = SERVER,
    token: Token = None,
    output: Format = Output.TABLE,
) -> None:
    """Wait for the end of a rollout: 0 completed, 4 rolled back, 5 timed out, 6 held or denied.

    A service that is away for a while is asked again, until the time is over.
    """
    from controller.cli import show
    from controller.cli.client import Api, NotFound
    from controller.cli.errors import Unreachable

    api, deadline = Api(server, token), time.monotonic() + timeout
    ends = {"Completed": 0, "RolledBack": ROLLED_BACK, "Held": DENIED, "Superseded": 1}
    found: dict[str, Any] | None = None
    answered = False
    while True:
        try:
            found = api.get(f"/rollouts/{rollout}")
            answered = True
        except NotFound:
            found, answered = None, True
        except Unreachable:
            # A service that is started again ends no pipeline; a wrong address does, at once.
            if not answered or time.monotonic() >= deadline:
                raise
        if found is not None and release in (None, found["release"]) and found["state"] in ends:
            break
        if time.monotonic() >= deadline:
            typer.echo(f"bellwether: {_not_yet(rollout, found, timeout)}", err=True)
            raise typer.Exit(TIMED_OUT)
        time.sleep(interval)
    if output is Output.JSON:
        show.as_json(found)
    else:
        print(f"{found['name']} → {found['release']}: {found['state']}: {found['sentence']}")
    raise typer.Exit(ends[found["state"]])


def _not_yet(rollout: str, found: dict[str, Any] | None, timeout: float) -> str:
    if found is None:
        return f"no rollout {rollout} after {timeout:.0f} s"
    return f"{rollout} is {found['state']} after {timeout:.0f} s: {found['sentence']}"


def _all(api: Api) -> dict[str, Any]:
    fleets = api.get("/fleets")
    rollouts = list(api.every("/rollouts"))
    return {"rollouts": rollouts, "git": fleets["git"], "stops": fleets["stops"]}


def _one(api: Api, rollout: str) -> dict[str, Any]:
    about = api.get(f"/rollouts/{rollout}")
    decisions = api.get(f"/rollouts/{about['id']}/decisions", limit=10)["items"]
    return {"rollout": about, "decisions": decisions}


def _show(found: dict[str, Any], output: Output) -> None:
    from controller.cli import show

    if output is Output.JSON:
        show.as_json(found)
    elif sys.stdout.isatty():
        from rich.console import Console

        Console().print(_tree(found))
    elif "rollout" in found:
        _show_one(found)
    else:
        _show_all(found)


def _show_all(found: dict[str, Any]) -> None:
    from controller.cli import show

    git = found["git"]
    for stop in found["stops"]:
        print(
            f"STOPPED {stop['scope']} {stop['value']}: {quoted(stop['reason'])} ({stop['actor']})"
        )
    print(f"Git: {git['accepted'] or 'no commit accepted yet'} {git['author']}".rstrip())
    if git["refused"]:
        print(f"Git: {git['refused']}")
    for problem in git["problems"]:
        print(f"  {problem.get('severity', 'error')}: {problem.get('text', problem)}")
    for name, sentence in git["notices"].items():
        print(f"  {name}: {sentence}")
    show.table(
        ("ROLLOUT", "FLEET", "RELEASE", "STATE", "STEP", "DEVICES", "SENTENCE"),
        [
            (
                r["name"],
                r["fleet"],
                r["release"],
                r["state"],
                f"{r['step'] + 1}/{len(r['steps']) + bool(r.get('fixes')) or '?'}",
                _counts(r["members"]["devices"]),
                r["sentence"],
            )
            for r in found["rollouts"]
        ],
    )


def _show_one(found: dict[str, Any]) -> None:
    about = found["rollout"]
    print(f"{about['name']} → {about['release']}: {about['state']} (revision {about['revision']})")
    print(about["sentence"])
    print(f"fleet {about['fleet']} · commit {about['commit'][:12]} by {about['author']}")
    for step, counts in sorted(about["members"]["steps"].items(), key=lambda item: int(item[0])):
        print(f"  step {int(step) + 1}: {_counts(counts)}")
    for hold in about["holds"]:
        ended = f", lifted by {hold['liftedBy']}" if hold["liftedAt"] else ""
        where = hold["commit"][:12] if hold["commit"] else "not yet in Git"
        print(f"  hold {hold['id']}: {quoted(hold['reason'])} ({hold['actor']}, {where}{ended})")
    for entry in found["decisions"]:
        print(f"  {entry['at']}  {entry['verdict']:<12} {entry['sentence']}")


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {state}" for state, n in sorted(counts.items())) or "none yet"
