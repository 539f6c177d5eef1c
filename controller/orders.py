"""Turns targets into signed orders, and brings them to the broker.

`build` makes the row of one order: signed for its device, its term and generation above all that
the device has seen. `Outbox.publish` sends what the database holds and the broker may not have;
it can be repeated at any time, because an order is level state and the broker is only its cache.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

from sqlalchemy import Connection, Engine

from controller.keys import DirectorKey
from controller.rollout.desired import Catalog, Target
from controller.rollout.model import Device, Order, Told
from controller.rollout.recovery import MOST
from controller.store import rollouts as store
from device_agent.protocol import Channel, ComponentOrder, Desired, Kind, timestamp, topic
from telemetry import metrics
from telemetry.report import DeviceRow
from telemetry.store.database import reading, writing


class Broker(Protocol):
    """What publishing needs: `telemetry.broker.Publisher`, or the simulation's."""

    def publish(
        self,
        messages: Sequence[tuple[str, bytes]],
        *,
        qos: int = 1,
        retain: bool = True,
        timeout: float = 10.0,
    ) -> list[bool]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Issuer:
    """What every order of this controller shares."""

    key: DirectorKey
    term: int
    base_url: str  # where devices fetch artifacts that name no other place
    lease: timedelta = timedelta(hours=1)


def build(
    issuer: Issuer,
    device: Device,
    target: Target,
    catalog: Catalog,
    last: Order | None,
    row: DeviceRow | None,
    now: float,
) -> tuple[Order, dict[str, Any]]:
    """(the order, its row for the desired table): signed, and newer than all the device knows."""
    known = row if row is not None and max(row.term, row.generation) <= MOST else None
    term = max(issuer.term + device.term, known.term if known else 0)
    generation = 1 + max(last.generation if last else 0, known.generation if known else 0)
    issued = datetime.fromtimestamp(now, UTC)
    forward = target.kind is Kind.INSTALL
    order = Order(
        device=device.id,
        term=term,
        generation=generation,
        attempt=target.attempt,
        kind=str(target.kind),
        components=target.components,
        at=now,
    )
    desired = Desired(
        device=device.id,
        term=term,
        generation=generation,
        attempt=target.attempt,
        kind=target.kind,
        components={
            component: _component(component, told, catalog, issuer.base_url)
            for component, told in sorted(target.components.items())
            if target.kind is not Kind.NONE and _known(component, told, catalog)
        },
        preconditions=target.preconditions if forward else (),
        security_epoch=target.security_epoch,
        issued_at=timestamp(issued),
        not_after=timestamp(issued + issuer.lease) if forward else None,
    )
    values = {
        "device": device.id,
        "term": term,
        "generation": generation,
        "attempt": target.attempt,
        "kind": str(target.kind),
        "components": {c: asdict(told) for c, told in target.components.items()},
        "rollout": next((t.rollout for t in target.components.values() if t.rollout), None),
        "body": issuer.key.sign(desired),
        "at": now,
        "published": False,
    }
    return order, values


def _known(component: str, told: Told, catalog: Catalog) -> bool:
    # A component that runs what no release document names cannot be ordered, only left alone.
    return catalog.owner(component, told.digest, told.release) is not None


def _component(component: str, told: Told, catalog: Catalog, base_url: str) -> ComponentOrder:
    release = catalog.owner(component, told.digest, told.release)
    assert release is not None  # noqa: S101 - _known filtered
    artifact = release.components[component]
    own = f"{base_url}/artifacts/{artifact.digest}"
    return ComponentOrder(
        release=release.name,
        digest=artifact.digest,
        size=artifact.size,
        urls=(artifact.url,) if artifact.url else (own,),
        installer=str(release.installer),
    )


class Outbox:
    """Publishes what is not published yet; a part that failed stays for the next time."""

    def __init__(
        self, engine: Engine, broker: Broker, *, term: int | None = None, batch: int = 2_000
    ) -> None:
        """`term`: the controller's; when it is over, nothing is sent any more (Fenced)."""
        self._engine = engine
        self._term = term
        self._broker = broker
        self._batch = batch
        self._taken: list[tuple[str, int]] = []  # by the broker, not noted yet
        self._away = False
        self._withheld: set[str] = set()  # devices whose order a hold rejects

    def send(
        self,
        rows: Sequence[Mapping[str, Any]],
        known: frozenset[str] | None = None,
        *,
        forward: bool = True,
    ) -> None:
        """Publish orders that were recorded a moment ago; `settle` notes which the broker took.

        Where the broker is away or slow, the rest of this turn waits in the database.
        """
        orders = [
            (row["device"], row["body"], row["generation"], row["kind"])
            for row in rows
            if forward or row["kind"] != Kind.INSTALL
        ]
        if not orders or self._away:
            return
        with reading(self._engine) as conn:
            if known is not None and not store.in_force(conn) <= known:
                return
            if self._term is not None:
                store.check(conn, self._term)
        taken = self._send(orders)
        self._taken += taken
        self._away = len(taken) < len(orders)

    def settle(self, conn: Connection) -> None:
        """Note in this transaction what was taken since the last one."""
        if self._taken:
            store.mark_published(conn, self._taken)
            self._taken = []

    def publish(
        self,
        known: frozenset[str] | None = None,
        *,
        forward: bool = True,
        withholds: Callable[[str], bool] = lambda device: False,
    ) -> int:
        """Send all that waits (without `forward`: what leads back); how many the broker took.

        `known`: the holds and stops (ids) that these orders were composed under. When another one
        has come since, nothing more leaves: the loop, woken by it, composes anew first.
        `withholds`: is this device's last order rejected, with no other one in its place? It
        waits no more, until `released`.
        """
        sent = 0
        if self._taken:
            self._note(self._taken)
            self._taken = []
        if self._away:
            self._away = False  # it was asked in this turn already
            return 0
        while True:
            with reading(self._engine) as conn:
                waiting = store.unpublished(conn, self._batch, forward=forward)
                if waiting and known is not None and not store.in_force(conn) <= known:
                    return sent
                if waiting and self._term is not None:
                    store.check(conn, self._term)
            if not waiting:
                return sent
            rejected = {order[0]: order[2] for order in waiting if withholds(order[0])}
            self._withheld.update(rejected)
            leaving = [order for order in waiting if order[0] not in rejected]
            done = self._send(leaving) if leaving else []
            self._note([*done, *rejected.items()])
            sent += len(done)
            if len(done) < len(leaving):
                return sent  # the broker is away or slow: the loop comes again

    def released(self) -> set[str]:
        """Whose orders were withheld, once: holds have changed, and they are to be asked about."""
        released, self._withheld = self._withheld, set()
        return released

    def _send(self, orders: Sequence[tuple[str, bytes, int, str]]) -> list[tuple[str, int]]:
        """(device, generation) of those that the broker took."""
        messages = [(topic(device, Channel.DESIRED), body) for device, body, _, _ in orders]
        taken = self._broker.publish(messages)
        done = [order for order, ok in zip(orders, taken, strict=True) if ok]
        for kind, n in Counter(order[3] for order in done).items():
            metrics.count("bellwether_orders_published_total", n, kind=kind)
        return [(device, generation) for device, _, generation, _ in done]

    def _note(self, done: Sequence[tuple[str, int]]) -> None:
        with writing(self._engine) as conn:
            if self._term is not None:
                store.fence(conn, self._term)
            store.mark_published(conn, done)
