"""The evidence of one rollout in one signed file, and its check without any service.

The file is JSON: rollout, releases, holds, approvals, every decision with its inputs, the stretch
of the audit chain in which it all happened, and the director's signature over all the rest.
`check` reads it as hostile input. Rules, in order:

1. Its bytes are exactly the canonical writing of what they say: a flipped byte that JSON would
   forgive (a space, an escape, a second key of one name) is found as well.
2. The signature is the director's, by the key that was named, or the key in the file.
3. The stretch of the audit follows from row to row, and ends where the file says.
4. Every recorded verdict is judged again from its inputs, and comes out the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from sqlalchemy import Connection, select

from controller import audit as chain
from controller.keys import DirectorKey
from controller.rollout.replay import Unreadable, replay
from controller.store import approvals, views
from controller.store.tables import approvals as approval_rows
from controller.store.tables import audit, decisions, releases, rollouts

FORMAT = "bellwether.evidence/1"
MOST_BYTES = 512 * 1024 * 1024


def make(conn: Connection, rollout: str, key: DirectorKey, at: float) -> bytes:
    """The signed file of this rollout (its id), from one consistent view."""
    row = conn.execute(select(rollouts).where(rollouts.c.id == rollout)).one()
    decided = conn.execute(
        select(decisions).where(decisions.c.rollout == rollout).order_by(decisions.c.id)
    ).all()
    counts = views.count_members(conn, [rollout])[rollout]
    held = [h for h in views.holds_of(conn, [row.name])[row.name] if h["digest"] == row.digest]
    documents = conn.execute(select(releases).where(releases.c.name == row.release)).all()
    asked = conn.execute(select(approval_rows).where(approval_rows.c.rollout == rollout)).all()
    votes = approvals.voters(conn, [one.id for one in asked])
    body: dict[str, Any] = {
        "format": FORMAT,
        "v": 1,
        "at": views.when(at),
        "rollout": {**views.rollout(row, counts, held), "seed": row.seed, "pinned": row.pinned},
        "releases": [
            {"name": r.name, "digest": r.digest, "commit": r.commit, "document": r.document}
            for r in documents
        ],
        "approvals": [
            {
                "id": one.id, "kind": one.kind, "digest": one.digest, "proposer": one.proposer,
                "needs": one.needs, "state": one.state, "result": one.result,
                "approvedBy": votes[one.id],
            }
            for one in asked
        ],
        "decisions": [views.decision(one, whole=True) for one in decided],
        "audit": _stretch(conn, row.opened_at),
        "key": {"keyid": key.keyid, "public": key.public_hex},
    }  # fmt: skip
    signature = key.sign_bytes(_canonical(body))
    return _canonical({**body, "signature": signature.hex()})


def _stretch(conn: Connection, since: float) -> list[dict[str, Any]]:
    """The audit from the rollout's opening to now: all of it, so that its links can be checked."""
    query = select(audit).where(audit.c.at >= since).order_by(audit.c.seq).limit(1)
    first = conn.execute(query).first()
    if first is None:
        return []
    rows = conn.execute(select(audit).where(audit.c.seq >= first.seq).order_by(audit.c.seq))
    return [dict(row._mapping) for row in rows]


def check(data: bytes, *, public: str | None = None) -> list[str]:
    """What is wrong with the file, in sentences; `public`: the director's key in hex."""
    try:
        plain = json.loads(data)
    except (ValueError, RecursionError):
        return ["it is no JSON: a byte was changed, or the end is missing"]
    if not isinstance(plain, dict) or plain.get("format") != FORMAT:
        return [f"it is no evidence of ours ({FORMAT})"]
    problems = []
    if _canonical(plain) != data:
        problems.append("its bytes are not as they were written")
    problems += _signature(plain, public)
    problems += _chain(plain.get("audit"))
    problems += _verdicts(plain)
    return problems


def _signature(plain: Mapping[str, Any], public: str | None) -> list[str]:
    key = plain.get("key")
    named = key.get("public") if isinstance(key, Mapping) else None
    signature = plain.get("signature")
    if not isinstance(named, str) or not isinstance(signature, str):
        return ["it is not signed"]
    if public is not None and public != named:
        return ["it is signed by another key than the one that was named"]
    rest = {name: value for name, value in plain.items() if name != "signature"}
    try:
        raw, signed = bytes.fromhex(named), bytes.fromhex(signature)
        if signed.hex() != signature:  # hex has two ways to write a letter, we have one
            raise InvalidSignature
        if sha256(raw).hexdigest() != key.get("keyid"):  # type: ignore[union-attr]
            return ["its key and key id do not belong together"]
        Ed25519PublicKey.from_public_bytes(raw).verify(signed, _canonical(rest))
    except (ValueError, InvalidSignature):
        return ["the signature does not match: something in it was changed"]
    return []


def _chain(rows: Any) -> list[str]:
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        return ["its audit is no list of rows"]
    problems: list[str] = []
    before: Mapping[str, Any] | None = None
    for row in rows:
        try:
            right = chain.digest(row) == row["hash"]
        except (KeyError, ValueError, TypeError):
            right = False
        if not right:
            problems.append(f"audit row {row.get('seq')} was changed")
        if before is not None and (
            row.get("previous") != before.get("hash") or row.get("seq") != before.get("seq", 0) + 1
        ):
            problems.append(f"audit row {row.get('seq')} does not follow the row before it")
        before = row
    return problems[:20]


def _verdicts(plain: Mapping[str, Any]) -> list[str]:
    try:
        again = replay(plain)
    except (Unreadable, RecursionError) as error:
        return [f"its decisions cannot be judged again: {error}"]
    return [f"decision {one.id}: {one.sentence}"[:400] for one in again if not one.same]


def _canonical(plain: Mapping[str, Any]) -> bytes:
    return (json.dumps(plain, ensure_ascii=False, indent=1) + "\n").encode()
