"""Prints results: a table for people, versioned JSON for programs, plain text when piped."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any


def as_json(value: Any) -> None:
    body = value if isinstance(value, dict) else {"items": value}
    print(json.dumps({"v": 1, **body}, indent=2, ensure_ascii=False))


def count(n: int, many: str) -> str:
    """`1 policy`, `2 policies`."""
    one = many.removesuffix("ies") + "y" if many.endswith("ies") else many.removesuffix("s")
    return f"{n:,} {one if n == 1 else many}"


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Rich on a terminal; columns padded with blanks elsewhere: nothing is cut off."""
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        _rich(columns, cells)
        return
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    for line in [list(columns), *cells]:
        print("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip())


def _rich(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        shown.add_column(name, overflow="fold")
    for row in rows:
        shown.add_row(*(Text(cell) for cell in row))
    Console().print(shown)
