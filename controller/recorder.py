"""Brings holds and lifts into Git: one additive commit for all that wait, tried until it is there.

A hold is in force from the transaction that recorded it; this is only its memory in Git, so that a
wiped database finds it again. A file that is in Git already is simply marked as recorded: a commit
that was pushed just before a kill is not pushed twice.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy import Engine, select, update

from controller import anchors, audit
from controller.fleetrepo import FleetRepo, RecordRefused, RepoUnavailable, moment
from controller.forge import Forge, ForgeUnavailable
from controller.manifests.text import CONTROL
from controller.store.lease import fence
from controller.store.rollouts import get_meta, put_meta
from controller.store.tables import holds
from telemetry.store.database import reading, writing
from telemetry.store.prepared import Prepared

log = structlog.get_logger()


_PENDING = Prepared(  # every look at Git asks
    select(holds)
    .where(holds.c.commit.is_(None) | (holds.c.lift.is_not(None) & holds.c.lift_commit.is_(None)))
    .order_by(holds.c.id)
)


class Recorder:
    def __init__(
        self,
        engine: Engine,
        repo: FleetRepo,
        *,
        term: int | None = None,
        forge: Forge | None = None,
        base: str = "main",
        state_dir: Path | None = None,
        anchor_every: float = 0.0,
    ) -> None:
        """`term`: the controller's, by which its writes are fenced. `base`: the branch followed.

        `state_dir`: where heads of the audit are kept; `anchor_every`: seconds, 0: never alone.
        """
        self._state_dir, self._anchor_every = state_dir, anchor_every
        self._head: anchors.Head | None = None
        self._engine, self._repo, self._term = engine, repo, term
        self._forge, self._base = forge, base
        self._refused: frozenset[str] = frozenset()

    def pending(self) -> dict[str, str]:
        """path → text of every hold and lift that Git does not have yet."""
        files: dict[str, str] = {}
        with reading(self._engine) as conn:
            for row in _PENDING.all(conn):
                if row.commit is None:
                    files[f"holds/{row.id}.yaml"] = hold_text(row._asdict())
                if row.lift is not None and row.lift_commit is None:
                    files[f"holds/{row.lift}.yaml"] = lift_text(row._asdict())
        return files

    def run_once(self, now: float) -> bool:
        """Record what waits; True when a commit was made or found."""
        files = self.pending() or self._anchor(now)
        if not files or frozenset(files) <= self._refused:
            return False  # on a protected branch: people were asked to merge ours
        name = max(files).removeprefix("holds/").removesuffix(".yaml")
        try:
            commit = self._repo.record(files, self._message(list(files)), name)
        except RepoUnavailable as error:
            log.warning("hold_not_recorded", reason=str(error))
            return False
        except RecordRefused as error:
            log.warning("hold_not_recorded", reason=str(error), branch=error.side_branch)
            if error.side_branch is not None:
                self._refused = self._refused | frozenset(files)
                self._propose(error.side_branch, self._message(list(files)))
            return False
        self._mark(list(files), commit)
        log.info("hold_recorded", commit=commit, files=len(files))
        return True

    def keep_head(self) -> None:
        """The head of the audit, in a file beside the database."""
        if self._state_dir is None:
            return
        with reading(self._engine) as conn:
            head = audit.head(conn)
        if head is None:
            return
        try:
            anchors.keep(self._state_dir, head, self._head)
            self._head = head
        except OSError as error:
            log.warning("audit_head_not_kept", reason=str(error))

    def _anchor(self, now: float) -> dict[str, str]:
        """The file of an anchor that is due; empty when none is."""
        if self._anchor_every <= 0:
            return {}
        with writing(self._engine) as conn:
            head = audit.head(conn)
            last = get_meta(conn, "audit_anchor")
            if last is not None and now - last["at"] < self._anchor_every:
                return {}
            put_meta(conn, "audit_anchor", {"at": now, "seq": head[0] if head else 0})
            if last is None or head is None or head[0] == last["seq"]:
                return {}  # the first look only starts the clock
        return {f"audit/{head[0]}.json": anchors.document(head, moment(now))}

    def _propose(self, branch: str, message: str) -> None:
        """The branch is protected: ask people to merge ours. The hold is in force meanwhile."""
        if self._forge is None:
            return
        title, _, body = message.partition("\n\n")
        body += "\n\nIn force already; this is its memory in Git: a wiped database finds it again."
        try:
            url = self._forge.propose(branch, self._base, title=title, body=body)
            log.info("hold_proposed", branch=branch, url=url)
        except ForgeUnavailable as error:
            log.warning("hold_not_proposed", branch=branch, reason=str(error))

    def _mark(self, files: list[str], commit: str) -> None:
        ids = [file.removeprefix("holds/").removesuffix(".yaml") for file in files]
        with writing(self._engine) as conn:
            if self._term is not None:
                fence(conn, self._term)
            conn.execute(
                update(holds)
                .where(holds.c.id.in_(ids), holds.c.commit.is_(None))
                .values(commit=commit)
            )
            conn.execute(
                update(holds)
                .where(holds.c.lift.in_(ids), holds.c.lift_commit.is_(None))
                .values(lift_commit=commit)
            )

    def _message(self, files: list[str]) -> str:
        ids = {file.removeprefix("holds/").removesuffix(".yaml") for file in files}
        lines, trailers = [], []
        with reading(self._engine) as conn:
            for row in conn.execute(select(holds).order_by(holds.c.id)):
                if row.id in ids:
                    lines.append(f"Hold {row.release} on {row.rollout}: {_line(row.reason)}")
                    trailers.append(f"Hold: {row.id}")
                    trailers.append(f"Actor: {_line(row.actor)}")
                if row.lift in ids:
                    lines.append(f"Lift {row.release} on {row.rollout}: {_line(row.lift_reason)}")
                    trailers.append(f"Lift: {row.lift}")
                    trailers.append(f"Actor: {_line(row.lifted_by)}")
            head = audit.head(conn)
        if head is not None:
            trailers.append(f"{anchors.TRAILER}: {anchors.words(head)}")
        subject = lines[0][:72] if len(lines) == 1 else f"Record {len(lines)} holds and lifts"
        if not lines:
            subject, lines = "Anchor the audit", ["Its head, kept where its database is not."]
        return "\n\n".join([subject, "\n".join(lines), "\n".join(trailers)])


def _line(text: str | None) -> str:
    """One printable line: nobody's words forge a trailer."""
    return "".join(c if c.isprintable() else " " for c in text or "")


def hold_text(row: Any) -> str:
    spec = {
        "rollout": row["rollout"],
        "rejects": {"release": row["release"], "digest": row["digest"]},
        "to": row["to"],
        "scope": row["scope"],
        "reason": row["reason"],
        "actor": row["actor"],
        "incident": row["incident"],
        "createdAt": moment(row["created_at"]),
    }
    return _document("Hold", row["id"], spec)


def lift_text(row: Any) -> str:
    spec = {
        "hold": row["id"],
        "reason": row["lift_reason"] or "no reason given",
        "actor": row["lifted_by"],
        "createdAt": moment(row["lifted_at"]),
    }
    return _document("Lift", row["lift"], spec)


def _document(kind: str, name: str, spec: dict[str, Any]) -> str:
    # JSON in ASCII is YAML: no text of a person can break out of its quotes. Manifests refuse
    # control characters: whatever was taken as a reason once, its hold must be readable.
    lines = ["apiVersion: bellwether.dev/v1", f"kind: {kind}", f"metadata: {{name: {name}}}"]
    lines.append("spec:")
    for key, value in spec.items():
        if value is not None:
            said = (
                CONTROL.sub("\N{REPLACEMENT CHARACTER}", value) if isinstance(value, str) else value
            )
            lines.append(f"  {key}: {json.dumps(said)}")
    return "\n".join(lines) + "\n"
