"""Sessions of people on the pages: opened by a login, kept in the database, ended by logout.

Rules:

1. The cookie is 256 random bits, stored hashed; a stolen database opens no session.
2. A login makes a new session: no value that a browser brought with it becomes one.
3. A session ends at its time, at logout, and with the API token that opened it.
4. Every session has its own CSRF token; forms send it back.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass

from sqlalchemy import Connection, Engine, delete, insert, select, update

from controller import audit, roles
from controller.roles import Principal
from controller.store.tables import api_tokens, sessions
from telemetry.store.database import reading, writing

LASTS = 12 * 3600.0  # seconds: one shift


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    cookie: str  # for the browser alone
    expires_at: float


def open_session(
    engine: Engine, who: Principal, *, via: str, now: float, token: str | None = None
) -> Opened:
    """Open a session for somebody who has just shown who they are; audited."""
    cookie = secrets.token_urlsafe(32)
    with writing(engine) as conn:
        _forget(conn, now)
        conn.execute(
            insert(sessions).values(
                hash=_hashed(cookie),
                name=who.name,
                grants=roles.to_json(who.grants),
                via=via,
                token=token,
                csrf=secrets.token_urlsafe(32),
                created_at=now,
                expires_at=now + LASTS,
            )
        )
        audit.append(
            conn,
            at=now,
            actor=who.name[:128],
            action="session.login",
            subject=who.name[:128],
            detail={"via": via, "roles": who.roles},
        )
    return Opened(cookie=cookie, expires_at=now + LASTS)


def find(engine: Engine, cookie: str, now: float) -> Principal | None:
    """Who the cookie stands for; None when it is unknown, ended, expired or its token revoked."""
    if not 0 < len(cookie) <= 128:
        return None
    query = (
        select(sessions, api_tokens.c.revoked_at, api_tokens.c.expires_at.label("token_expires"))
        .outerjoin(api_tokens, api_tokens.c.id == sessions.c.token)
        .where(sessions.c.hash == _hashed(cookie))
    )
    with reading(engine) as conn:
        row = conn.execute(query).first()
    if row is None or row.ended_at is not None or row.revoked_at is not None:
        return None
    if min(row.expires_at, row.token_expires or row.expires_at) <= now:
        return None
    return Principal(
        name=row.name, grants=roles.from_json(row.grants), via="session", csrf=row.csrf
    )


def end(engine: Engine, cookie: str, now: float) -> None:
    """Logout: the cookie opens nothing any more."""
    with writing(engine) as conn:
        row = conn.execute(
            update(sessions)
            .where(sessions.c.hash == _hashed(cookie), sessions.c.ended_at.is_(None))
            .values(ended_at=now)
            .returning(sessions.c.name)
        ).first()
        if row is not None:
            name = row.name[:128]
            audit.append(conn, at=now, actor=name, action="session.logout", subject=name, detail={})


def _forget(conn: Connection, now: float) -> None:
    """Rows that were over a day ago: the audit remembers, this table need not."""
    conn.execute(delete(sessions).where(sessions.c.expires_at < now - 86_400))


def _hashed(cookie: str) -> str:
    return hashlib.sha256(cookie.encode()).hexdigest()
