"""Judges recorded decisions again: the same inputs must give the same verdict.

Pure. `exported` makes the file that leaves the house, `replay` reads it as hostile input. A verdict
differs when an input, a number or the engine was changed since; the replay says what it is now.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from controller.rollout.gate import Case, Judgement, Verdict, judge

FORMAT = "bellwether.decisions/1"
_BY_PEOPLE = "complete"  # the last step completes whatever the gate would wait for
_KEPT = ("id", "rollout", "at", "kind", "verdict", "sentence", "inputs", "numbers", "commit")


class Unreadable(ValueError):
    """The file is no export of decisions; the message says where."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    id: str
    recorded: str
    judgement: Judgement
    same: bool

    @property
    def sentence(self) -> str:
        if self.same:
            return f"SAME — {self.recorded}: {self.judgement.sentence}"
        now = self.judgement
        return f"DIFFERENT — recorded {self.recorded}, judged now {now.verdict}: {now.sentence}"


def exported(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The export of decision rows, oldest first; only what a replay and a reader need."""
    decisions = [{name: row[name] for name in _KEPT if name in row} for row in rows]
    return {"format": FORMAT, "decisions": decisions}


def replay(data: object) -> tuple[Replayed, ...]:
    """Judge every recorded verdict again; raises Unreadable for what is no export.

    Accepts an export, one decision, a list of decisions, or a bare case (nothing recorded).
    """
    return tuple(_again(row, i) for i, row in enumerate(_rows(data)) if _judged(row))


def _rows(data: object) -> list[Mapping[str, Any]]:
    if isinstance(data, Mapping):
        for name in ("decisions", "items"):
            if isinstance(data.get(name), list):
                return _rows(data[name])
        if "inputs" in data:
            return [data]
        if "policy" in data and "step" in data:
            return [{"kind": "verdict", "inputs": data}]
    if isinstance(data, list) and all(isinstance(row, Mapping) for row in data):
        return list(data)
    raise Unreadable("this is no export of decisions: write it with `bellwether evidence export`")


def _judged(row: Mapping[str, Any]) -> bool:
    inputs = row.get("inputs")
    return row.get("kind", "verdict") == "verdict" and isinstance(inputs, Mapping) and bool(inputs)


def _again(row: Mapping[str, Any], index: int) -> Replayed:
    try:
        judgement = judge(Case.from_json(row["inputs"]))
    except (ValueError, OverflowError) as error:
        raise Unreadable(f"decisions[{index}]: {error}") from None
    recorded = str(row.get("verdict", ""))
    return Replayed(
        id=str(row.get("id", index)),
        recorded=recorded or "nothing",
        judgement=judgement,
        same=_same(row, recorded, judgement),
    )


def _same(row: Mapping[str, Any], recorded: str, judgement: Judgement) -> bool:
    numbers = row.get("numbers")
    if isinstance(numbers, Mapping) and not _equal(numbers, judgement.numbers):
        return False
    if recorded in ("", str(judgement.verdict)):
        return True
    # A person may widen what the gate would wait for: the sentence then quotes the gate.
    said = str(row.get("sentence", ""))
    overruled = recorded in (_BY_PEOPLE, str(Verdict.WIDEN)) and judgement.sentence in said
    return overruled or recorded == _BY_PEOPLE


def _equal(a: object, b: object) -> bool:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, int | float) and isinstance(b, int | float):
        return math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9)
    return a == b
