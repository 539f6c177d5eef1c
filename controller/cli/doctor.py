"""`doctor`: holds the promises I1–I14 against the databases of a live system; changes nothing.

What it finds it looks at again a moment later: half-done work is no finding. Exit codes: 0 nothing
found, 1 findings, 2 usage.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from controller.cli.errors import Failed
from controller.cli.options import Database, Format, Output

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from controller.facts import Finding, Tables
    from telemetry.store.reports import Store

AGAIN = 3.0  # seconds until what was found is looked at again


def register(app: typer.Typer) -> None:
    app.command("doctor")(doctor)


def doctor(
    state_dir: Annotated[
        Path, typer.Option(envvar="BELLWETHER_STATE_DIR", help="State directory of `serve`.")
    ] = Path("bellwether-state"),
    database: Database = None,
    grace: Annotated[
        float, typer.Option(min=0, help="Seconds that work may be under way before it is judged.")
    ] = 30.0,
    output: Format = Output.TABLE,
) -> None:
    """Check every invariant on the databases themselves; each finding says what to do."""
    import time

    control, telemetry = _open(state_dir, database)
    keys = _keys(state_dir)
    tables, found = _look(control, telemetry, keys, grace)
    if found:
        time.sleep(AGAIN)
        tables, again = _look(control, telemetry, keys, grace)
        found = [one for one in again if one in found]
    _tell(tables, found, output, signed=bool(keys))
    if found:
        raise typer.Exit(1)


def _open(state_dir: Path, database: str | None) -> tuple[Engine, Store]:
    from controller.settings import Settings
    from telemetry.store.database import open_engine
    from telemetry.store.reports import Store

    try:
        values = {"repo": "-", "state_dir": state_dir, "database": database}
        settings = Settings.model_validate(values)
        urls = settings.control_url, settings.telemetry_url
    except ValueError as error:
        raise Failed(str(error).splitlines()[0], 2) from None
    for url in urls:  # SQLite would make an empty file: a doctor leaves nothing behind
        file = Path(url.removeprefix("sqlite:///"))
        if url.startswith("sqlite:") and not file.is_file():
            raise Failed(f"{file}: no such file; name --state-dir or --database of `serve`", 2)
    return open_engine(urls[0]), Store(open_engine(urls[1]))


def _keys(state_dir: Path) -> dict[str, str]:
    from controller.keys import DirectorKey

    file = state_dir / "keys" / "director.pem"
    if not file.is_file():
        return {}
    key = DirectorKey.load_or_create(file)
    return {key.keyid: key.public_hex}


def _look(
    control: Engine, telemetry: Store, keys: dict[str, str], grace: float
) -> tuple[Tables, list[Finding]]:
    import time

    from controller import invariants
    from controller.facts import Observed
    from controller.store import snapshot

    tables = snapshot.read(control, telemetry)
    return tables, invariants.check(tables, Observed(keys=keys), now=time.time(), grace=grace)


def _tell(tables: Tables, found: list[Finding], output: Output, *, signed: bool) -> None:
    from controller import invariants
    from controller.cli import show

    notes = invariants.notes(tables)
    looked_at = {
        "devices": len(tables.devices),
        "rollouts": len(tables.rollouts),
        "orders": len(tables.desired),
        "decisions": len(tables.decisions),
        "messages": len(tables.health),
        "audit records": len(tables.audit),
    }
    if output is Output.JSON:
        findings = [{"invariant": f.invariant, "what": f.what, "do": f.do} for f in found]
        show.as_json(
            {
                "v": 1,
                "findings": findings,
                "notes": notes,
                "looked_at": looked_at,
                "signatures_checked": signed,
            }
        )
        return
    counts = ", ".join(show.count(n, name) for name, n in looked_at.items())
    if not signed:
        counts += "; signatures not checked: keys/director.pem is not in --state-dir"
    for note in notes:
        print(f"note: {note}")
    if not found:
        print(f"every promise is kept: {counts}")
        return
    for one in found:
        print(f"{one.invariant:<4} {one.what}\n     → {one.do}")
    print(f"{show.count(len(found), 'findings')}: {counts}")
