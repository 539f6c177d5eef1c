"""`demo`: the whole story on real parts, in about two minutes; then it is your turn."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from controller.cli.options import Format, Output

if TYPE_CHECKING:
    from controller.cli.story import Story


class FaultKind(str, Enum):  # noqa: UP042 - typer reads the values of str enums
    INTERVENTIONS = "interventions"
    BOOT = "boot"
    SILENT = "silent"
    NONE = "none"


def register(app: typer.Typer) -> None:
    app.command("demo")(demo)


def demo(
    check: Annotated[
        bool, typer.Option("--check", help="No audience: exit 0 only if every act went as told.")
    ] = False,
    devices: Annotated[int, typer.Option(min=90, max=3000, help="Simulated cars.")] = 300,
    seed: Annotated[int, typer.Option(help="The same seed, the same drivers.")] = 7,
    fault: Annotated[FaultKind, typer.Option(help="What is wrong with 10.3.0.")] = (
        FaultKind.INTERVENTIONS
    ),
    rise: Annotated[
        float, typer.Option(min=1.0, max=100.0, help="Interventions: how many times as often.")
    ] = 6.0,
    keep: Annotated[
        Path | None, typer.Option(help="Keep everything in this new or empty directory.")
    ] = None,
    database: Annotated[
        str | None, typer.Option(help="postgresql+psycopg://… ; SQLite without it.")
    ] = None,
    pids: Annotated[
        Path | None,
        typer.Option(help="Name our processes in this JSON file, kept current: serve.ingest, …"),
    ] = None,
    output: Format = Output.TABLE,
) -> None:
    """Play the whole story: a commit, a canary, a fault, a rollback, a fix.

    Real parts: Git, Mosquitto, a database, `bellwether serve`, and cars that each run the agent.
    """
    import shutil
    import sys
    import tempfile

    from controller.cli.errors import Failed
    from controller.cli.story import Story, Wish

    if keep is not None and keep.exists() and any(keep.iterdir()):
        raise Failed(f"--keep {keep}: not empty; name a new directory", 2)
    root = Path(keep or tempfile.mkdtemp(prefix="bellwether-demo-")).resolve()
    root.mkdir(parents=True, exist_ok=True)
    wish = Wish(devices=devices, seed=seed, fault=fault.value, rise=rise, database=database)
    quiet = output is Output.JSON
    story = Story(wish, root, tell=(_to_stderr if quiet else _to_stdout))
    error = ""
    try:
        error = _play(story, pids)
        found = story.devices() if not error else _devices_if_any(story)
        if quiet:
            sys.stdout.write(json.dumps(_document(story, error, found), ensure_ascii=False) + "\n")
            sys.stdout.flush()
        if error:
            sys.stderr.write(f"bellwether demo: {error}\n")
        else:
            story.tell(f"All {len(story.acts)} acts happened as told.")
            if not check:
                _your_turn(story)
    except KeyboardInterrupt:
        sys.stderr.write("\n")
    finally:
        story.children.stop()
        if keep is None:
            shutil.rmtree(root, ignore_errors=True)
    raise typer.Exit(1 if error else 0)


def _play(story: Story, pids: Path | None) -> str:
    """Empty when everything happened as told; otherwise what did not."""
    import signal
    import sys

    from controller.cli.errors import Failed

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # `finally` ends the children
    try:
        story.children.pid_file = pids
        story.set_up()
        story.baseline()
        story.acts_of_releases()
    except Failed as failed:
        return str(failed)
    return ""


def _devices_if_any(story: Story) -> list[dict[str, Any]]:
    from controller.cli.errors import Failed

    try:
        return story.devices()
    except Failed:
        return []


def _document(story: Story, error: str, devices: list[dict[str, Any]]) -> dict[str, Any]:
    document: dict[str, Any] = {
        "ok": not error,
        "seed": story.wish.seed,
        "fault": story.wish.fault,
        "acts": story.acts,
        "devices": devices,
    }
    return document | ({"error": error} if error else {})


def _your_turn(story: Story) -> None:
    import time

    clone = story.repository.clone
    story.tell(
        f"""
Your turn. Everything stays up until Ctrl-C.
  dashboard {story.server}/
  rollout   {story.server}/rollouts/model-3-autopilot
  on call   {story.server}/oncall
  watch     BELLWETHER_SERVER={story.server} .venv/bin/bellwether status --watch
  explain   BELLWETHER_SERVER={story.server} .venv/bin/bellwether explain model-3-autopilot
  cars      BELLWETHER_SERVER={story.server} .venv/bin/bellwether device list
  commit    edit {clone}/rollout.yaml, then git -C {clone} commit -a and push
"""
    )
    while True:
        story.children.check()
        time.sleep(1)


def _to_stdout(words: str) -> None:
    typer.echo(words)


def _to_stderr(words: str) -> None:
    typer.echo(words, err=True)
