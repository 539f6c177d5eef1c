"""The stops in force, and what their words mean: whose product it is, what a digest is made of.

A person names what they know. The digest on a release's page is the release's, the orders carry
those of its artifacts; a product is a label of devices, or of their fleet. What cannot be told from
a device and its order alone is looked up here.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Row, func, or_, select

from controller.rollout.model import ActiveStop
from controller.store.tables import artifacts, devices, releases, rollouts, stops
from telemetry.store.prepared import Prepared

_IN_FORCE = Prepared(select(stops).where(stops.c.lifted_at.is_(None)).order_by(stops.c.id))


def load(conn: Connection) -> list[ActiveStop]:
    """Every turn of the loop asks: without a stop it is one question."""
    return [_looked_up(conn, row) for row in _IN_FORCE.all(conn)]


def _looked_up(conn: Connection, row: Row[Any]) -> ActiveStop:
    scope, value = row.scope, row.value
    return ActiveStop(
        id=row.id, scope=scope, value=value, reason=row.reason, actor=row.actor,
        artifacts=released(conn, value) if scope == "digest" else frozenset(),
        fleets=labelled(conn, value) if scope == "product" else frozenset(),
    )  # fmt: skip


def released(conn: Connection, digest: str) -> frozenset[str]:
    """The digests of the artifacts of the releases with this digest."""
    documents = conn.execute(select(releases.c.document).where(releases.c.digest == digest))
    return frozenset(
        str(artifact["digest"])
        for document in documents.scalars()
        for artifact in document.get("artifacts", ())
    )


def labelled(conn: Connection, product: str) -> frozenset[str]:
    """Fleets of this product, by what their newest rollout pinned."""
    newest = select(func.max(rollouts.c.id)).group_by(rollouts.c.fleet)
    label = rollouts.c.pinned["fleet"]["labels"]["product"].as_string()
    query = select(rollouts.c.fleet).where(rollouts.c.id.in_(newest), label == product)
    return frozenset(conn.execute(query).scalars())


def fleets(conn: Connection, scope: str, value: str) -> frozenset[str]:
    """The fleets with a device in this scope (product, hardware)."""
    named = devices.c.labels[scope].as_string() == value
    if scope == "product":
        named = or_(named, devices.c.fleet.in_([value, *labelled(conn, value)]))
    return frozenset(conn.execute(select(devices.c.fleet).where(named).distinct()).scalars())


def known(conn: Connection, scope: str, value: str) -> bool:
    """Is there anything in this scope that we know of? A slip of the pen stops nothing."""
    if scope == "all":
        return True
    if scope == "digest":
        stored = select(artifacts.c.digest).where(artifacts.c.digest == value)
        return bool(
            released(conn, value)
            or conn.execute(stored).first()
            or any(value in told.values() for told in conn.scalars(select(rollouts.c.artifacts)))
        )
    return bool(fleets(conn, scope, value))
