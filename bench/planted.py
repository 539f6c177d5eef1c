"""Fleets in the middle of a rollout, written straight into the tables: what a measurement starts
from when to get there by itself would take hours.

Every device ran `app-1`, was told `app-2` by its fleet's only rollout, and runs it in health. The
rows are those that controller and ingest would have written; orders are signed by the given key.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import JSON, Connection, Engine, Table, insert, update

from bench.world import texts
from controller.keys import DirectorKey
from controller.manifests.admission import admit
from controller.manifests.reader import Manifests, read
from controller.orders import Issuer
from controller.press import Press
from controller.rollout.desired import Catalog, Target
from controller.rollout.model import Device, Order, Told
from controller.rollout.waves import pin
from controller.store import tables
from device_agent.protocol import Kind
from telemetry.store import bulk
from telemetry.store import tables as telemetry
from telemetry.store.database import writing

COMPONENT, OLD, NEW = texts.COMPONENT, "1", "2"
STEP = 1  # everybody stands in the last one
CONTROLS = 10  # one device in so many of a rollout under way is control, and runs the old release


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    name: str
    size: int
    state: str = "Completed"  # of its rollout
    soak: str = "30d"

    @property
    def devices(self) -> Iterator[str]:
        return (f"{self.name}-{number:06d}" for number in range(self.size))

    @property
    def rollout(self) -> str:
        """The id of its rollout."""
        return f"01PLANTED{self.name.upper().replace('-', ''):0>17.17}"


def manifests(names: Sequence[str], soak: str = "30d") -> Manifests:
    """One Fleet and one Rollout of each name, and the two releases."""
    steps = [{"cohort": name, "soak": soak, "maxSoak": "60d"} for name in ("canary", "general")]
    documents = [texts.policy(), texts.release(OLD), texts.release(NEW)]
    for name in names:
        documents.append(texts.fleet(name=name))
        rollout = json.loads(texts.rollout(NEW, steps, {"progressDeadline": "90d"}))
        rollout["metadata"]["name"] = name
        rollout["spec"]["fleet"] = name
        documents.append(json.dumps(rollout) + "\n")
    found = read({f"{i}.yaml": text for i, text in enumerate(documents)})
    errors = [p for p in [*found.problems, *admit(found)] if p.severity == "error"]
    if errors:
        raise ValueError(f"planted manifests: {errors[0]}")
    return found.manifests


def plant(
    control: Engine, reports: Engine, fleets: Sequence[Fleet], key: DirectorKey | None, now: float
) -> None:
    """Write these fleets; without a key their orders carry no signature (nobody reads them)."""
    found = {fleet.name: manifests([fleet.name], fleet.soak) for fleet in fleets}
    any_ = next(iter(found.values()), None) or manifests([])
    with writing(control) as conn:
        for release in any_.releases.values():
            conn.execute(
                insert(tables.releases).values(
                    name=release.name,
                    digest=release.digest,
                    document=release.model_dump(mode="json"),
                    commit="0" * 40,
                    seen_at=now,
                )
            )
        change = 0
        for fleet in fleets:
            _rollout(conn, fleet, found[fleet.name], now)
            change = _devices(conn, fleet, change, now)
            _members(conn, fleet, now)
            _orders(conn, fleet, Catalog(releases=any_.releases), key, now)
    with writing(reports) as conn:
        conn.execute(update(telemetry.state).values(batch=1, hearing=1_000.0, hearing_at=now))
        for fleet in fleets:
            _reports(conn, fleet, now)


def _rollout(conn: Connection, fleet: Fleet, found: Manifests, now: float) -> None:
    wanted = found.rollouts[fleet.name]
    release = found.releases[wanted.release]
    declared = found.fleets[fleet.name]
    pinned = pin(wanted, declared, found.policies[declared.health_policy], release)
    done = fleet.state == "Completed"
    conn.execute(
        insert(tables.rollouts).values(
            id=fleet.rollout,
            name=fleet.name,
            fleet=fleet.name,
            release=release.name,
            digest=release.digest,
            artifacts={c: a.digest for c, a in release.components.items()},
            commit="0" * 40,
            author="bench",
            state=fleet.state,
            sentence="planted",
            revision=1,
            step=STEP,
            opened_at=now - 7_200,
            step_at=now - 7_200,
            soak=60.0,
            soak_mark=None if done else now,
            finished_at=now if done else None,
            updated_at=now,
            seed="5e" * 32,
            pinned=pinned.to_json(),
            flags={"drawn": STEP, "extended_at": 0.0, "before": {COMPONENT: texts.artifact(OLD)}},
        )
    )


def _devices(conn: Connection, fleet: Fleet, change: int, now: float) -> int:
    rows = (
        {
            "id": name,
            "fleet": fleet.name,
            "labels": {"model": "m3", "hardware": f"hw{number % 3}"},
            "status": "active",
            "password_issue": 1,
            "term": 0,
            "created_at": now - 86_400,
            "change": change + number + 1,
        }
        for number, name in enumerate(fleet.devices)
    )
    bulk.insert(conn, tables.devices, _columns(tables.devices, rows))
    return change + fleet.size


def _members(conn: Connection, fleet: Fleet, now: float) -> None:
    previous = {COMPONENT: {"release": f"app-{OLD}", "digest": texts.artifact(OLD)}}
    rows = []
    for number, name in enumerate(fleet.devices):
        control = _control(fleet, number)
        rows.append(
            {
                "rollout": fleet.rollout,
                "device": name,
                "step": STEP,
                "arm": "control" if control else "exposed",
                "drawn_at": now - 7_200,
                "hardware": f"hw{number % 3}",
                "band": -1,
                "previous": None if control else previous,
                "state": "drawn" if control else "updated",
                "reason": "",
                "attempt": None if control else f"{fleet.rollout}.{STEP}",
                "told_at": None if control else now - 7_200,
                "exposed_at": now - 7_100,
                "updated_at": now - 7_000,
            }
        )
    bulk.insert(conn, tables.members, _columns(tables.members, rows))
    controls = sum(row["arm"] == "control" for row in rows)
    counts = {("control", "drawn"): controls, ("exposed", "updated"): len(rows) - controls}
    for (arm, state), n in counts.items():
        key = {"rollout": fleet.rollout, "step": STEP, "arm": arm, "state": state}
        conn.execute(insert(tables.member_counts).values(**key, n=n))


def _orders(
    conn: Connection, fleet: Fleet, catalog: Catalog, key: DirectorKey | None, now: float
) -> None:
    rows: list[Mapping[str, Any]] = []
    for number, name in enumerate(fleet.devices):
        version = OLD if _control(fleet, number) else NEW
        told = Told(
            release=f"app-{version}",
            digest=texts.artifact(version),
            at=now - 7_200,
            rollout=fleet.rollout if version == NEW else None,
        )
        attempt = f"{fleet.rollout}.{STEP}"
        target = Target(kind=Kind.INSTALL, components={COMPONENT: told}, attempt=attempt)
        if key is not None:
            issuer = Issuer(key=key, term=1, base_url="http://127.0.0.1:1")
            device = Device(id=name, fleet=fleet.name, labels={}, status="active")
            press = Press(issuer, catalog, now - 7_200)
            values = press.order(device, target, None, None)[1]
            press.seal([values])
        else:
            values = _unsigned(name, told, attempt, now)
        rows.append({**values, "published": True})
    bulk.insert(conn, tables.desired, _columns(tables.desired, rows))


def _unsigned(device: str, told: Told, attempt: str, now: float) -> dict[str, Any]:
    part = {"release": told.release, "digest": told.digest, "at": told.at, "rollout": told.rollout}
    order = Order(
        device=device, term=1, generation=1, attempt=attempt, kind="install", components={}, at=now
    )
    return {
        "device": device,
        "term": order.term,
        "generation": order.generation,
        "attempt": attempt,
        "kind": order.kind,
        "components": {COMPONENT: part},
        "rollout": told.rollout,
        "body": b"{}",
        "at": now - 7_200,
    }


def _reports(conn: Connection, fleet: Fleet, now: float) -> None:
    contacts, said = [], []
    for number, name in enumerate(fleet.devices):
        version = OLD if _control(fleet, number) else NEW
        part = {"release": f"app-{version}", "digest": texts.artifact(version), "committed": True}
        contacts.append(
            {
                "device": name,
                "change": 1,
                "last_contact": now,
                "heard_clock": 1_000.0,
                "online": True,
                "boot": "b1",
                "boot_count": 1,
                "boot_floor": 0,
            }
        )
        said.append(
            {
                "device": name,
                "boot": "b1",
                "boot_count": 1,
                "seq": 1,
                "reported_at": now - 7_000,
                "state": "COMMITTED",
                "blocked_by": "[]",
                "attempt": f"{fleet.rollout}.{STEP}",
                "term": 1,
                "generation": 1,
                "components": json.dumps({COMPONENT: part}),
                "history": "[]",
                "log": "",
            }
        )
    bulk.insert(conn, telemetry.contacts, _columns(telemetry.contacts, contacts))
    bulk.insert(conn, telemetry.reports, _columns(telemetry.reports, said))


def _control(fleet: Fleet, number: int) -> bool:
    return fleet.state != "Completed" and number % CONTROLS == 0


def _columns(table: Table, rows: Any) -> list[tuple[Any, ...]]:
    """Rows in the table's order; what is not said is NULL, JSON is text."""
    columns = [(column.name, isinstance(column.type, JSON)) for column in table.columns]
    return [
        tuple(json.dumps(row.get(name)) if plain else row.get(name) for name, plain in columns)
        for row in rows
    ]
