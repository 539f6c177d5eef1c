"""`bellwether replay FILE`: judge exported decisions again and compare."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

_MOST_BYTES = 256 * 1024 * 1024


def register(app: typer.Typer) -> None:
    app.command("replay")(replay)


def replay(
    file: Annotated[Path, typer.Argument(help="Export of decisions (JSON); `-` reads stdin.")],
    output: Annotated[str, typer.Option(help="table or json")] = "table",
) -> None:
    """Judge recorded decisions again: 0 when every verdict is the same, 1 when one differs."""
    from controller.rollout.replay import Unreadable
    from controller.rollout.replay import replay as judged_again

    try:
        found = judged_again(json.loads(_read(file)))
    except (OSError, ValueError, RecursionError, Unreadable) as error:
        print(f"error: {file}: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    if output == "json":
        rows = [
            {
                "id": one.id,
                "recorded": one.recorded,
                "verdict": str(one.judgement.verdict),
                "same": one.same,
                "sentence": one.judgement.sentence,
                "numbers": one.judgement.numbers,
            }
            for one in found
        ]
        print(json.dumps({"v": 1, "decisions": rows}, ensure_ascii=False, indent=2))
    else:
        for one in found:
            print(f"{one.id}  {one.sentence}")
        print(f"{len(found)} verdicts judged again, {sum(not o.same for o in found)} differ")
    if not all(one.same for one in found):
        raise typer.Exit(1)


def _read(file: Path) -> str:
    if str(file) == "-":
        return sys.stdin.read(_MOST_BYTES)
    if file.stat().st_size > _MOST_BYTES:
        raise ValueError("the file is larger than 256 MiB")
    return file.read_text(encoding="utf-8")
