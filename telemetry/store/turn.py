"""Whose turn it is to write: every transaction that changes what is known of devices takes one.

A turn is one number, or several that follow each other, taken by updating the one row of
`telemetry_state` before anything else. So the commits of two processes follow each other, the
watermark has no gap, and who finds its own last number just below its new one knows that nobody
wrote in between.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import BigInteger, Connection, bindparam, update

from telemetry.store import tables
from telemetry.store.prepared import Prepared

HEARING_GAP = 5.0  # seconds between two probes that still count as heard without a break


@dataclass(frozen=True, slots=True)
class Turn:
    first: int  # of its numbers
    number: int  # the last one: the watermark, once it is committed
    clock: float  # seconds in which the server could hear


def take(connection: Connection, *, probe: bool, now: float, numbers: int = 1) -> Turn:
    """The next turn, of so many numbers.

    With `probe`, the hearing clock advances by the time since it last did.
    """
    number, clock, at = _NEXT.one(connection, numbers=numbers)
    if probe:
        gap = now - at
        clock += gap if 0 < gap <= HEARING_GAP else 0.0
        _HEARD.run(connection, clock=clock, at=max(now, at))
    return Turn(int(number) - numbers + 1, int(number), float(clock))


_STATE = tables.state.c
_NEXT = Prepared(  # it is part of every batch
    update(tables.state)
    .values(batch=_STATE.batch + bindparam("numbers", type_=BigInteger))
    .returning(_STATE.batch, _STATE.hearing, _STATE.hearing_at)
)
_HEARD = Prepared(
    update(tables.state).values(hearing=bindparam("clock"), hearing_at=bindparam("at"))
)
