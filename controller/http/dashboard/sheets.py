"""The tables of the pages as JSON or CSV: the same rows, for a spreadsheet or a script. Pure.

A cell that a spreadsheet would take for a formula is written as text: names and reasons come from
people and devices.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
FORMATS = {"json": "application/json", "csv": "text/csv; charset=utf-8"}
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def sheet(name: str, rows: Sequence[Row], kind: str) -> bytes:
    """The rows of the list of this name, as the page has them."""
    plain = [{head: read(row) for head, read in _COLUMNS[name].items()} for row in rows]
    if kind == "json":
        return json.dumps({"items": plain}, ensure_ascii=False, default=str).encode()
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerow(_COLUMNS[name])
    writer.writerows([_cell(value) for value in row.values()] for row in plain)
    return text.getvalue().encode()


def _cell(value: Any) -> str:
    if isinstance(value, Mapping | list):
        value = json.dumps(value, ensure_ascii=False)
    text = "" if value is None else str(value).replace("\0", "�")
    return f"'{text}" if text.startswith(_FORMULA) and not _number(text) else text


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _told(*path: str) -> Callable[[Row], Any]:
    def read(row: Row) -> Any:
        found: Any = row["told"]
        for key in path:
            found = found.get(key) if isinstance(found, Mapping) else None
        return found

    return read


def _of(*path: str) -> Callable[[Row], Any]:
    def read(row: Row) -> Any:
        found: Any = row
        for key in path:
            found = found.get(key) if isinstance(found, Mapping) else None
        return found

    return read


_COLUMNS: Mapping[str, Mapping[str, Callable[[Row], Any]]] = {
    "rollouts": {
        "id": _told("id"), "name": _told("name"), "fleet": _told("fleet"),
        "release": _told("release"), "state": _told("state"),
        "step": lambda row: row["told"]["step"] + 1, "steps": _of("steps"),
        "sentence": _told("sentence"), "devices": _told("members", "devices"),
        "control": _told("members", "control"), "openedAt": _told("openedAt"),
        "finishedAt": _told("finishedAt"), "commit": _told("commit"), "author": _told("author"),
    },
    "devices": {
        "id": _of("one", "id"), "fleet": _of("one", "fleet"), "status": _of("one", "status"),
        "state": _of("one", "state"), "reason": _of("one", "reason"),
        "online": _of("one", "online"), "lastContact": _of("one", "lastContact"),
        "cohort": _of("one", "cohort"), "score": _of("one", "score", "value"),
        "runs": _of("runs"), "rollout": _of("one", "membership", "name"),
        "member": _of("one", "membership", "state"), "labels": _of("one", "labels"),
    },
    "releases": {
        key: _of(key)
        for key in ("name", "version", "components", "fixes", "digest", "commit", "at", "held")
    },
    "decisions": {
        key: _of(key)
        for key in ("id", "at", "name", "release", "kind", "sentence", "commit", "rollout")
    },
    "audit": {
        key: _of(key)
        for key in ("seq", "at", "actor", "action", "subject", "detail", "previous", "hash")
    },
}  # fmt: skip
