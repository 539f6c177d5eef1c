"""The row that says which controller may write: its term, who holds it, and a beat while it lives.

One transaction of the leader = one `fence`: it raises the beat where the term is still its own, and
so locks the row until the commit. Whoever takes over waits for that commit or comes before it;
either way nothing of the old term is written after the new one has begun. The beat is compared
for change only, never with a clock: two machines need not agree about the time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sqlalchemy import Connection, Engine, bindparam, insert, select, update

from controller.store.tables import leases
from telemetry.store.database import writing
from telemetry.store.prepared import Prepared

_CONTROLLER = leases.c.name == "controller"
_LOOK = Prepared(select(leases).where(_CONTROLLER))  # every transaction asks
_BEAT = Prepared(
    update(leases)
    .where(_CONTROLLER & (leases.c.term == bindparam("mine")))
    .values(beat=leases.c.beat + 1)
)


class Fenced(Exception):
    """Another controller has taken over: its term is higher. This one must stop writing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseRow:
    term: int
    holder: str  # empty: given back, free for anybody
    beat: int
    seconds: float  # without a beat after which it may be taken


FREE = LeaseRow(term=0, holder="", beat=0, seconds=0.0)


def look(conn: Connection) -> LeaseRow:
    row = _LOOK.first(conn)
    if row is None:
        return FREE
    return LeaseRow(term=row.term, holder=row.holder, beat=row.beat, seconds=row.seconds)


def take(conn: Connection, seen: LeaseRow, *, holder: str, seconds: float, at_least: int) -> int:
    """A new term, above the last one and not below `at_least`; Fenced when `seen` is not so now."""
    term = max(seen.term + 1, at_least)
    values = {"term": term, "holder": holder, "beat": seen.beat + 1, "seconds": seconds}
    unchanged = _CONTROLLER & (leases.c.term == seen.term) & (leases.c.beat == seen.beat)
    if conn.execute(update(leases).where(unchanged).values(**values)).rowcount:
        return term
    if seen != FREE or look(conn) != FREE:
        raise Fenced("another controller was faster")
    conn.execute(insert(leases).values(name="controller", **values))
    return term


def take_over(conn: Connection, at_least: int, *, holder: str = "", seconds: float = 0.0) -> int:
    """Raise the term whoever holds it: for a controller that knows that it is the only one."""
    conn.execute(select(leases).where(_CONTROLLER).with_for_update())
    return take(conn, look(conn), holder=holder, seconds=seconds, at_least=at_least)


def fence(conn: Connection, term: int) -> None:
    """Stay the one writer until this transaction ends; raises Fenced when `term` is over."""
    if not _BEAT.run(conn, mine=term):
        raise _over(conn, term)


def check(conn: Connection, term: int) -> None:
    """Raise Fenced when `term` is over; takes no lock: for what is read and then told."""
    if look(conn).term != term:
        raise _over(conn, term)


def give_back(conn: Connection, term: int) -> None:
    """Let the next one begin at once; nothing when the term is over already."""
    mine = _CONTROLLER & (leases.c.term == term)
    conn.execute(update(leases).where(mine).values(holder="", beat=leases.c.beat + 1))


def _over(conn: Connection, term: int) -> Fenced:
    now = look(conn)
    return Fenced(f"term {term} was taken over by term {now.term} of {now.holder or 'nobody'}")


@contextmanager
def writing_as(engine: Engine, term: int) -> Iterator[Connection]:
    """One transaction of the leader of this term; raises Fenced when the term is over."""
    with writing(engine) as conn:
        fence(conn, term)
        yield conn
