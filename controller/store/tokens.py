"""Rows of API tokens. Only hashes are kept: a token is shown once, when it is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, insert, select, update

from controller.store.tables import api_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRow:
    id: str
    name: str
    role: str
    fleets: tuple[str, ...]  # empty: all
    created_at: float
    expires_at: float | None
    revoked_at: float | None


def add(conn: Connection, row: TokenRow, digest: str) -> None:
    conn.execute(
        insert(api_tokens).values(
            id=row.id,
            hash=digest,
            name=row.name,
            role=row.role,
            fleets=list(row.fleets),
            created_at=row.created_at,
            expires_at=row.expires_at,
        )
    )


def by_hash(conn: Connection, digest: str) -> TokenRow | None:
    row = conn.execute(select(api_tokens).where(api_tokens.c.hash == digest)).first()
    return None if row is None else _row(row)


def every(conn: Connection) -> Sequence[TokenRow]:
    return [_row(row) for row in conn.execute(select(api_tokens).order_by(api_tokens.c.id))]


def revoke(conn: Connection, token: str, now: float) -> bool:
    """True when a token with this id (or name) was in force until now."""
    match = (api_tokens.c.id == token) | (api_tokens.c.name == token)
    done = conn.execute(
        update(api_tokens).where(match, api_tokens.c.revoked_at.is_(None)).values(revoked_at=now)
    )
    return bool(done.rowcount)


def _row(row: object) -> TokenRow:
    values = dict(row._mapping)  # type: ignore[attr-defined]
    values.pop("hash")
    return TokenRow(**{**values, "fleets": tuple(values["fleets"])})
