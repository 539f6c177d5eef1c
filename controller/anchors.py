"""Keeps the head of the audit chain outside of its database, so that a cut tail is found.

Two places: a file beside the databases (a line at each look of the recorder that finds a new head),
and the fleet repository: each commit of ours carries `Audit-Head: SEQ HASH`, and once in
`audit_anchor` seconds one is made for it alone. Who cuts the tail must cut both, and the second one
stands on other machines, signed.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

TRAILER = "Audit-Head"
FILE = "audit-heads.log"
_HEAD = re.compile(r"(\d{1,15})[ :]([0-9a-f]{64})")
_MOST = 4 * 1024 * 1024  # bytes of the file that are read: its newest lines

Head = tuple[int, str]


def parse(text: str) -> Head:
    """`SEQ HASH` or `SEQ:HASH`; raises ValueError."""
    match = _HEAD.match(text.strip())
    if match is None:
        raise ValueError(f"{text[:40]!r}: write SEQ:HASH, as the audit has them")
    return int(match[1]), match[2]


def words(head: Head) -> str:
    return f"{head[0]} {head[1]}"


def document(head: Head, at: str) -> str:
    """The file of a commit that is made for the anchor alone."""
    return json.dumps({"seq": head[0], "hash": head[1], "at": at}) + "\n"


def keep(state_dir: Path, head: Head, last: Head | None) -> None:
    """Add a line for a new head; what cannot be written now is written at the next look."""
    if head == last:
        return
    with (state_dir / FILE).open("a", encoding="ascii") as file:
        file.write(words(head) + "\n")


def kept(state_dir: Path) -> list[Head]:
    """The heads of the file; a torn or foreign line is none."""
    try:
        with (state_dir / FILE).open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _MOST))
            lines = file.read().decode("ascii", errors="replace").splitlines()
    except OSError:
        return []
    return list(_heads(lines))


def recorded(clone: Path) -> list[Head]:
    """The heads that our commits carry, by the controller's own clone (or any other)."""
    if not clone.exists():
        return []
    done = subprocess.run(
        ["git", "-C", str(clone), "log", "--all", f"--format=%(trailers:key={TRAILER},valueonly)"],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=60,
        check=False,
    )
    return list(_heads(done.stdout.splitlines()))


def _heads(lines: Iterable[str]) -> Iterable[Head]:
    for line in lines:
        if match := _HEAD.fullmatch(line.strip()):
            yield int(match[1]), match[2]
