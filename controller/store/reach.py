"""The rows that bear on whom a verb reaches, read by column: no more than the devices in question.

A fleet of years has millions of memberships, and a preview is asked for at night. What is the same
text in many rows (the set before, an order's components) is parsed once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any

from sqlalchemy import ColumnElement, Connection, Text, cast, select

from controller.rollout.model import Arm, Device, Member, MemberState, Order, Told
from controller.store.tables import desired, devices, members

_FEW = 500  # devices that are asked for by name; more are read with the whole rollout
_MANY = 5_000  # names in one question
_STATES = {state.value: state for state in MemberState}
_ARMS = {arm.value: arm for arm in Arm}


def registry(conn: Connection, fleet: str, only: Collection[str] | None) -> dict[str, Device]:
    """The fleet's devices; `only`: those of these names."""
    parse = _parser()
    query = select(
        devices.c.id, cast(devices.c.labels, Text), devices.c.status, devices.c.moved_at,
        devices.c.term,
    ).where(devices.c.fleet == fleet, *_named(devices.c.id, only))  # fmt: skip
    return {
        name: Device(
            id=name, fleet=fleet, labels=parse(labels), status=status, moved_at=moved_at, term=term
        )
        for name, labels, status, moved_at, term in conn.execute(query)
    }


def orders(conn: Connection, fleet: str, only: Collection[str] | None) -> dict[str, Order]:
    """The last order of each device of the fleet."""
    parse = _parser(_told)
    columns = (
        desired.c.device, desired.c.term, desired.c.generation, desired.c.attempt, desired.c.kind,
        cast(desired.c.components, Text), desired.c.at,
    )  # fmt: skip
    query = select(*columns).join(devices, devices.c.id == desired.c.device)
    return {
        device: Order(
            device=device, term=term, generation=generation, attempt=attempt, kind=kind,
            components=parse(components), at=at,
        )
        for device, term, generation, attempt, kind, components, at in conn.execute(
            query.where(devices.c.fleet == fleet, *_named(devices.c.id, only))
        )
    }  # fmt: skip


def _told(plain: Mapping[str, Any]) -> dict[str, Told]:
    return {
        component: Told(
            release=item["release"], digest=item["digest"], at=item["at"],
            rollout=item.get("rollout"),
        )
        for component, item in plain.items()
    }  # fmt: skip


def members_of(
    conn: Connection, rollout: str, only: Collection[str] | None = None
) -> dict[str, Member]:
    found = _members(conn, members.c.rollout == rollout, *_named(members.c.device, only))
    return {member.device: member for _, member in found}


def newest_told(
    conn: Connection,
    rollouts: Sequence[str],
    names: Collection[str],
    rejected: Collection[str] = frozenset(),
    few: int = _FEW,
) -> dict[str, Member]:
    """For each of these devices its membership in the newest of these rollouts (newest first) that
    told it something and knows what it ran before: none of these digests, if there is such a one.
    """
    left, older = set(names), list(rollouts)
    found, spoilt = dict[str, Member](), dict[str, Member]()
    told = members.c.state != MemberState.DRAWN.value
    while older and len(left) > few:
        for _, member in _members(conn, told, members.c.rollout == older.pop(0)):
            if member.device not in left or not member.previous:
                continue
            if member.leads_back(rejected):
                found[member.device] = member
                left.discard(member.device)
            else:
                spoilt.setdefault(member.device, member)
    if older and left:
        age = {rollout: n for n, rollout in enumerate(older)}
        rows = _members(conn, told, members.c.device.in_(sorted(left)))
        for rollout, member in sorted(rows, key=lambda row: age.get(row[0], len(age))):
            if rollout in age and member.previous:
                into = found if member.leads_back(rejected) else spoilt
                into.setdefault(member.device, member)
    return spoilt | found


def _members(conn: Connection, *where: ColumnElement[bool]) -> list[tuple[str, Member]]:
    """(rollout, member)"""
    table, parse = members.c, _parser()
    query = select(
        table.rollout, table.device, table.step, table.arm, table.drawn_at, table.hardware,
        table.band, table.score, cast(table.previous, Text), table.state, table.attempt,
        table.told_at,
    ).where(*where)  # fmt: skip
    return [
        (
            rollout,
            Member(
                device=device, step=step, arm=_ARMS[arm], drawn_at=drawn_at, hardware=hardware,
                band=band, score=score, previous=None if previous is None else parse(previous),
                state=_STATES[state], attempt=attempt, told_at=told_at,
            ),
        )
        for rollout, device, step, arm, drawn_at, hardware, band, score, previous, state, attempt,
        told_at in conn.execute(query)
    ]  # fmt: skip


def _named(
    column: ColumnElement[str], only: Collection[str] | None
) -> tuple[ColumnElement[bool], ...]:
    """Asked for by name where they are few; where they are many, the others do no harm."""
    return () if only is None or len(only) > _MANY else (column.in_(sorted(only)),)


def _parser(shape: Callable[[Any], Any] = lambda plain: plain) -> Callable[[str], Any]:
    return lru_cache(maxsize=4096)(lambda text: shape(json.loads(text)))
