"""Brings orders to the broker.

`Outbox.publish` sends what the database holds and the broker may not have; it can be repeated at
any time, because an order is level state and the broker is only its cache.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, runtime_checkable

from sqlalchemy import Connection, Engine

from controller.keys import DirectorKey
from controller.store import rollouts as store
from device_agent.protocol import (
    Channel,
    Kind,
    topic,
)
from telemetry import metrics
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


@runtime_checkable
class Pipelined(Protocol):
    """A broker that takes the next part while it still answers for the one before."""

    def begin(self, messages: Sequence[tuple[str, bytes]]) -> Callable[[], list[bool]]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Issuer:
    """What every order of this controller shares."""

    key: DirectorKey
    term: int
    base_url: str  # where devices fetch artifacts that name no other place
    lease: timedelta = timedelta(hours=1)


_Order = tuple[str, bytes, int, str]  # device, envelope, generation, kind


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
        self._offered = True  # may anything wait? Until the database was asked
        self._under_way: tuple[Sequence[_Order], Callable[[], list[bool]]] | None = None

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
        self._offered = self._offered or bool(rows)
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
        self._land()
        if self._away:
            return
        if isinstance(self._broker, Pipelined):
            self._under_way = orders, self._broker.begin(_messages(orders))
            return
        taken = self._send(orders)
        self._taken += taken
        self._away = len(taken) < len(orders)

    def _land(self) -> None:
        """Hear how many of the part that is under way the broker has taken."""
        if self._under_way is None:
            return
        (orders, answer), self._under_way = self._under_way, None
        taken = _counted(orders, answer())
        self._taken += taken
        self._away = len(taken) < len(orders)

    def settle(self, conn: Connection) -> None:
        """Note in this transaction what was taken since the last one."""
        if self._taken:
            store.mark_published(conn, self._taken)
            self._taken = []

    @property
    def idle(self) -> bool:
        """Was everything that we know of sent and noted?"""
        return not (self._offered or self._taken or self._away or self._under_way)

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
        self._land()
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
                self._offered = False
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

    def _send(self, orders: Sequence[_Order]) -> list[tuple[str, int]]:
        return _counted(orders, self._broker.publish(_messages(orders)))

    def _note(self, done: Sequence[tuple[str, int]]) -> None:
        with writing(self._engine) as conn:
            if self._term is not None:
                store.fence(conn, self._term)
            store.mark_published(conn, done)


def _messages(orders: Sequence[_Order]) -> list[tuple[str, bytes]]:
    return [(topic(device, Channel.DESIRED), body) for device, body, _, _ in orders]


def _counted(orders: Sequence[_Order], taken: Sequence[bool]) -> list[tuple[str, int]]:
    """(device, generation) of those that the broker took."""
    done = [order for order, ok in zip(orders, taken, strict=True) if ok]
    for kind, n in Counter(order[3] for order in done).items():
        metrics.count("bellwether_orders_published_total", n, kind=kind)
    return [(device, generation) for device, _, generation, _ in done]
