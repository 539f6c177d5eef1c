"""I13 one audit record per change, chained · I5 decisions stay as they were recorded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from controller.audit import FIRST, intact
from controller.facts import Finding, Look


def chain(look: Look) -> Iterator[Finding]:
    previous, seq = FIRST, 0
    for row in sorted(look.tables.audit, key=lambda row: int(row["seq"])):
        if row["seq"] != seq + 1:
            yield _chain(f"rows {seq + 1} to {row['seq'] - 1} are missing")
        if row["previous"] != previous:
            yield _chain(f"row {row['seq']} does not follow the row before it")
        if not intact(row):
            yield _chain(f"row {row['seq']} was changed")
        previous, seq = row["hash"], row["seq"]


def records(look: Look) -> Iterator[Finding]:
    named: Counter[str] = Counter()
    sentences: dict[str, str] = {}
    for row in look.tables.audit:
        detail = row["detail"] or {}
        named.update(str(detail[key]) for key in ("decision", "command") if detail.get(key))
        if detail.get("decision"):
            sentences[str(detail["decision"])] = str(detail.get("sentence", ""))
    for row in look.tables.decisions:
        if named[row["id"]] != 1:
            yield _chain(f"decision {row['id']} has {named[row['id']]} records, not one")
        elif sentences[row["id"]] != row["sentence"]:
            yield Finding(
                invariant="I5",
                what=f"decision {row['id']} was rewritten: the audit holds another sentence",
                do="Restore the decisions table; the audit is the older word",
            )
    for row in look.tables.commands:
        if not named[row["id"]]:
            yield _chain(f"command {row['id']} of {row['actor']} has no record")


def _chain(what: str) -> Finding:
    return Finding(
        invariant="I13",
        what=f"the audit: {what}",
        do="Restore the control database; compare the head that was kept outside",
    )
