"""`validate`, `schema`, `init`: manifests without a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from controller.cli.errors import Failed
from controller.cli.options import Format, Output


def register(app: typer.Typer) -> None:
    app.command("validate")(validate)
    app.command("schema")(schema)
    app.command("init")(init)


def validate(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A folder, or one file.")],
    strict: Annotated[
        bool, typer.Option("--strict", help="Notices (not in force yet) are errors too.")
    ] = False,
    output: Format = Output.TABLE,
) -> None:
    """Check manifests: every problem with its file, line and column. 0 when there is no error."""
    from controller.cli import show
    from controller.manifests.admission import admit
    from controller.manifests.reader import read

    reading = read(_files(path))
    problems = [*reading.problems, *admit(reading)]
    errors = [p for p in problems if p.severity == "error" or strict]
    manifests = reading.manifests
    counts = {
        "fleets": len(manifests.fleets),
        "releases": len(manifests.releases),
        "rollouts": len(manifests.rollouts),
        "policies": len(manifests.policies),
        "holds": len(manifests.holds),
        "lifts": len(manifests.lifts),
    }
    if output is Output.JSON:
        listed = [
            {
                "path": p.path,
                "line": p.line,
                "col": p.col,
                "field": p.field,
                "message": p.message,
                "severity": p.severity,
            }
            for p in problems
        ]
        show.as_json({"ok": not errors, "counts": counts, "problems": listed})
    else:
        for problem in sorted(problems, key=lambda p: (p.path, p.line, p.col)):
            word = "" if problem.severity == "error" else "notice: "
            where, _, rest = str(problem).partition(": ")
            typer.echo(f"{where}: {word}{rest}", err=problem in errors)
        words = ", ".join(show.count(n, name) for name, n in counts.items() if n) or "no documents"
        typer.echo(f"{words}: {show.count(len(errors), 'errors') if errors else 'valid'}")
    if errors or not any(counts.values()):
        raise typer.Exit(1)


def schema(
    name: Annotated[str, typer.Argument(metavar="KIND|MESSAGE", help="e.g. Rollout, or health.")],
) -> None:
    """Print the JSON Schema of a manifest kind or of a wire message."""
    import json

    from controller.manifests.schema import names
    from controller.manifests.schema import schema as made

    known = {each.lower(): each for each in names()}
    if name.lower() not in known:
        raise Failed(f"{name!r}: unknown; one of {', '.join(known.values())}", 2)
    typer.echo(json.dumps(made(known[name.lower()]), indent=2))


def init(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")],
) -> None:
    """Write a first fleet to start from: fleet, policy, release, rollout; schemas for editors; CI.

    The folder may be an empty clone. Nothing that is there is overwritten.
    """
    import json

    from controller.manifests.schema import schema as made
    from controller.starter import files

    if directory.exists() and any(entry.name != ".git" for entry in directory.iterdir()):
        raise Failed(f"{directory} is not empty: name a new folder, or an empty clone")
    written = files()
    for name, text in written.items():
        file = directory / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    for kind in ("Fleet", "Release", "Rollout", "HealthPolicy", "Hold", "Lift"):
        file = directory / "schemas" / f"{kind}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(made(kind), indent=2) + "\n")
    typer.echo(f"{directory}: {', '.join(written)} and schemas/")
    typer.echo(
        "Next:\n"
        f"  bellwether validate {directory}\n"
        "  bellwether release publish FILE --component app --version 1.0.0 "
        f"> {directory}/releases/app-1.0.0.yaml\n"
        "  bellwether device enrol car-1 --fleet my-fleet --label model=m1 --label ring=canary\n"
        "  git add -A && git commit && git push    # the rollout begins"
    )


def _files(path: Path) -> dict[str, str | bytes]:
    from controller.fleetrepo import is_manifest

    if path.is_file():
        return {str(path): path.read_bytes()}
    if not path.is_dir():
        raise Failed(f"{path}: no such file or folder")
    found = sorted(
        p for p in path.rglob("*") if is_manifest(p.relative_to(path).as_posix()) and p.is_file()
    )
    return {str(p): p.read_bytes() for p in found if not p.is_symlink()}
