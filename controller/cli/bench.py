"""`bench NAME`: measures, and prints each figure beside its limit or its peer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from controller.cli.options import Format, Output

if TYPE_CHECKING:
    from bench.report import Row

NAMES = (
    "ingest",
    "rollback",
    "reconcile",
    "score",
    "manifests",
    "agent",
    "simulation",
    "decisions",
    "pages",
    "soak",
)


def register(app: typer.Typer) -> None:
    app.command("bench")(bench)


def bench(
    name: Annotated[str, typer.Argument(help=f"One of: {' '.join(NAMES)}.")],
    seed: Annotated[int, typer.Option(help="All chance follows from it.")] = 1,
    runs: Annotated[
        int | None, typer.Option(min=1, help="Repetitions; each has its default.")
    ] = None,
    scenario: Annotated[
        str | None, typer.Option(help="decisions: only these, separated by commas.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="decisions: only these, separated by commas.")
    ] = None,
    real: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="decisions: a fleet's own history (CSV)."),
    ] = None,
    database: Annotated[
        str | None, typer.Option(help="ingest: a PostgreSQL URL instead of SQLite.")
    ] = None,
    seconds: Annotated[float | None, typer.Option(min=1, help="soak: how long.")] = None,
    devices: Annotated[int | None, typer.Option(min=1, help="Size of the fleet.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes at once.")] = 2,
    keep: Annotated[bool, typer.Option("--keep", help="Write to bench/results/ too.")] = False,
    output: Format = Output.TABLE,
) -> None:
    """Measure one thing: each figure stands beside its limit or a peer from the same run."""
    import importlib
    import importlib.util
    import signal
    import sys

    from bench import report
    from controller.cli import show
    from controller.cli.errors import Failed

    if name not in NAMES or importlib.util.find_spec(f"bench.{name}") is None:
        raise Failed(f"{name}: no such benchmark; one of {', '.join(NAMES)}", code=2)
    options = report.Options(
        seed=seed,
        runs=runs,
        scenario=scenario,
        method=method,
        real=real,
        database=database,
        seconds=seconds,
        devices=devices,
        jobs=jobs,
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # in order: its children end with it
    try:
        rows = importlib.import_module(f"bench.{name}").run(options)
    except ValueError as error:  # an option or a file that the benchmark cannot use
        raise Failed(str(error), code=2) from error
    result = report.document(name, options, rows)
    if output is Output.JSON:
        show.as_json(result)
    else:
        _print(rows)
    if keep:
        print(f"kept as {report.keep(result)}", file=sys.stderr)


def _print(rows: Sequence[Row]) -> None:
    from controller.cli import show

    extra = list(dict.fromkeys(k for row in rows for k in row.more))
    lines = [
        [
            row.name,
            f"{row.value:,.4g}",
            row.unit,
            ""
            if row.limit is None
            else f"{'≤' if row.better == 'lower' else '≥'} {row.limit:,.4g}",
            "" if row.ratio is None else f"{row.ratio:.2f}",
            {True: "yes", False: "NO", None: ""}[row.met],
            row.peer,
            *(row.more.get(key, "") for key in extra),
        ]
        for row in rows
    ]
    show.table(["name", "value", "unit", "limit", "ratio", "met", "against", *extra], lines)
