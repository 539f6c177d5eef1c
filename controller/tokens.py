"""Makes, checks and revokes the tokens of people and programs: 256 random bits, stored hashed.

Rules: a token that is presented is always checked; unknown, expired and revoked look the same from
outside; roles are viewer · release-manager · on-call · admin · auditor, for all fleets or some.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Engine

from controller import audit, ulid
from controller.roles import Grant, Principal, Role
from controller.store import tokens as store
from controller.store.tokens import TokenRow
from telemetry.store.database import reading, writing

PREFIX = "bwt_"

__all__ = ["Created", "Role", "check", "create", "every", "hashed", "principal", "revoke"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Created:
    token: str  # shown once
    row: TokenRow


def create(
    engine: Engine,
    *,
    name: str,
    role: Role,
    fleets: Sequence[str],
    actor: str,
    now: float,
    lifetime: float | None = None,
) -> Created:
    token = PREFIX + secrets.token_urlsafe(32)
    row = TokenRow(
        id=ulid.new(now, secrets.token_bytes(10)),
        name=name,
        role=str(role),
        fleets=tuple(fleets),
        created_at=now,
        expires_at=None if lifetime is None else now + lifetime,
        revoked_at=None,
    )
    with writing(engine) as conn:
        store.add(conn, row, hashed(token))
        audit.append(
            conn,
            at=now,
            actor=actor,
            action="token.create",
            subject=name,
            detail={"id": row.id, "role": row.role, "fleets": list(fleets)},
        )
    return Created(token=token, row=row)


def check(engine: Engine, token: str, now: float) -> TokenRow | None:
    """The row of a token in force, else None."""
    if not token.startswith(PREFIX) or len(token) > 128:
        return None
    with reading(engine) as conn:
        row = store.by_hash(conn, hashed(token))
    if row is None or row.revoked_at is not None:
        return None
    return None if row.expires_at is not None and row.expires_at <= now else row


def principal(row: TokenRow) -> Principal:
    """Who shows this token."""
    grant = Grant(role=Role(row.role), fleets=frozenset(row.fleets))
    return Principal(name=row.name, grants=(grant,), via="token")


def every(engine: Engine) -> Sequence[TokenRow]:
    with reading(engine) as conn:
        return store.every(conn)


def revoke(engine: Engine, token: str, *, actor: str, now: float) -> bool:
    """False when no token in force has this id or name."""
    with writing(engine) as conn:
        done = store.revoke(conn, token, now)
        if done:
            audit.append(conn, at=now, actor=actor, action="token.revoke", subject=token, detail={})
    return done


def hashed(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
