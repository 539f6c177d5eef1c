"""Whom a rollback reaches, read by column and composed by kind, is what each device alone says."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from sqlalchemy import Engine, update

from bench import estate
from controller.reach import Fleet, load, reached
from controller.rollout.model import ActiveHold, Member, MemberState, Rollout
from controller.store import reach as rows
from controller.store import rollouts as store
from controller.store.database import open_control
from controller.store.tables import members
from telemetry.report import DeviceRow
from telemetry.store.database import open_engine, reading, writing
from telemetry.store.reports import Store
from telemetry.store.tables import create_schema

NOW = time.time()


@pytest.fixture
def planted(
    tmp_path: Path, database_url: str
) -> Iterator[tuple[Engine, estate.Estate, dict[str, DeviceRow]]]:
    control = open_control(database_url)
    telemetry = open_engine(f"sqlite:///{tmp_path / 'telemetry.db'}")
    create_schema(telemetry)
    filled = estate.fill(control, telemetry, devices=300, rollouts=30, now=NOW)
    with writing(control) as conn:  # devices whose newest rollout does not know what they ran
        ids = filled.devices["model-3-eu"][4:40:3]
        newest = filled.rollouts["model-3-eu"][-1]
        ours = members.c.rollout == newest
        conn.execute(update(members).where(ours, members.c.device.in_(ids)).values(previous=None))
    seen = {row.device: row for row in Store(telemetry).devices_changed(0)}
    yield control, filled, seen
    control.dispose()
    telemetry.dispose()


@pytest.mark.parametrize("spoilt", [False, True])
def test_the_newest_membership_that_knows(
    planted: tuple[Engine, estate.Estate, dict[str, DeviceRow]], spoilt: bool
) -> None:
    """`spoilt`: what most devices ran before their newest rollout is rejected by now."""
    control, filled, _ = planted
    for (fleet, ids), few in product(filled.rollouts.items(), (0, 7, 10_000)):
        names, wanted = filled.devices[fleet], dict[str, Member]()
        with reading(control) as conn:
            every = store.load_members_of(conn, ids)
            newest = [m for m in every[ids[-1]].values() if m.previous]
            rejected = {part["digest"] for m in newest for part in (m.previous or {}).values()}
            rejected = rejected if spoilt else set()
            found = rows.newest_told(conn, ids[::-1], names, rejected, few)
        for (
            rollout
        ) in ids:  # oldest first: the newest one wins, unless it leads to what is rejected
            for name, member in every[rollout].items():
                if not member.previous or member.state is MemberState.DRAWN:
                    continue
                known = wanted.get(name)
                if member.leads_back(rejected) or not (known and known.leads_back(rejected)):
                    wanted[name] = member
        assert {name: (m.step, m.previous, m.told_at) for name, m in found.items()} == {
            name: (m.step, m.previous, m.told_at) for name, m in wanted.items()
        }


def test_devices_that_are_alike_are_composed_as_each_alone_would_be(
    planted: tuple[Engine, estate.Estate, dict[str, DeviceRow]],
) -> None:
    control, filled, seen = planted
    words: set[str] = set()
    devices = 0
    for ids in filled.rollouts.values():
        with reading(control) as conn:
            fleet = load(conn, ids[-1], lambda: seen)
            hold = _hold(fleet.rollout)
            together = reached(conn, fleet, hold, NOW)
            for one in together:
                assert reached(conn, _only(fleet, one.device), hold, NOW) == [one]
        words |= {one.word for one in together}
        devices += len(together)
    assert devices > 100
    assert {"changes", "offline"} <= words


def _only(fleet: Fleet, device: str) -> Fleet:
    return replace(fleet, devices={device: fleet.devices[device]})


def _hold(rollout: Rollout) -> ActiveHold:
    return ActiveHold(
        id="preview",
        rollout=rollout.name,
        fleet=rollout.fleet,
        release=rollout.release,
        digest=rollout.digest,
        artifacts=frozenset(rollout.artifacts.values()),
        to="previous",
        reason="",
        actor="",
        created_at=NOW,
        scope={"all": True},
    )
