"""Reconcile: what a turn of the loop costs when nothing changed, and how that grows with the fleet.

The production loop on real SQLite files: one rollout soaks on a whole fleet, of which a tenth is
control, and every device was heard. "Nothing changed": time goes on, and our own probe is heard.
"1 % changed": so many devices report again, half of them a bare heartbeat, half a new attempt; the
turn reads, follows and answers all of them. The floor is the same turn for an empty fleet: its
questions to two databases. The growth is the exponent of the turn's cost in the size of the fleet:
0 costs nothing more, 1 grows with it.
"""

from __future__ import annotations

import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import Engine, update

from bench import planted
from bench.report import Options, Row
from controller.keys import DirectorKey
from controller.loop import Loop, Ports
from controller.orders import Issuer
from controller.rollout.world import Head
from controller.store import rollouts as store
from controller.store.database import open_control
from telemetry.store import tables
from telemetry.store.database import open_engine, writing
from telemetry.store.reports import Store
from telemetry.store.tables import create_schema

SIZES = (1_000, 10_000, 100_000, 1_000_000)
LIMITS = {1_000: 5.0, 100_000: 20.0}  # milliseconds
TICKS = 200
TICK = 0.5  # seconds between two turns, as `serve` has it


def run(options: Options) -> list[Row]:
    sizes = [options.devices] if options.devices else list(SIZES)
    ticks = options.runs or TICKS
    rows: list[Row] = []
    idle: dict[int, float] = {}
    with _bench(0) as floor:
        empty = statistics.median(floor.ticks(ticks, lambda: None))
    for size in sizes:
        with _bench(size) as here:
            rows.append(_row("cold load and first turn", size, here.cold, "s"))
            times = here.ticks(ticks, lambda: None)
            idle[size] = statistics.median(times)
            more = {"p99_ms": round(_p99(times), 2), "peer_ms": round(empty, 2)}
            rows.append(
                Row(
                    name=f"turn, nothing changed, {size:,} devices",
                    value=idle[size],
                    unit="ms",
                    limit=LIMITS.get(size),
                    peer="promise" if size in LIMITS else "",
                    more=more,
                )
            )
            share = max(1, size // 100)
            here.beats = itertools.cycle(range(size))
            changed = here.ticks(max(8, ticks // 20), partial(here.beat, share))
            rows.append(_row("turn, 1 % changed", size, statistics.median(changed), "ms"))
            each = statistics.median(changed) / share * 1_000
            rows.append(_row("each device that changed", size, each, "µs"))
    rows.append(Row(name="turn, no devices: the floor", value=empty, unit="ms"))
    if len(sizes) > 1:
        small, large = sizes[0], sizes[-1]
        ratio = idle[large] / idle[small]
        exponent = math.log(ratio) / math.log(large / small)
        name = f"growth of an idle turn, {small:,} to {large:,}"
        rows.append(
            Row(name=name, value=exponent, unit="exponent", more={"times": round(ratio, 2)})
        )
    return rows


def _row(name: str, size: int, value: float, unit: str) -> Row:
    return Row(name=f"{name}, {size:,} devices", value=value, unit=unit)


def _p99(times: Sequence[float]) -> float:
    return sorted(times)[min(len(times) - 1, math.ceil(0.99 * len(times)) - 1)]


class _Git:
    """No commit: what is under way goes on."""

    def current(self) -> Head | None:
        return None


class _Broker:
    """Takes everything at once: publishing is measured elsewhere."""

    def publish(
        self,
        messages: Sequence[tuple[str, bytes]],
        *,
        qos: int = 1,
        retain: bool = True,
        timeout: float = 10.0,
    ) -> list[bool]:
        return [True] * len(messages)


@dataclass
class _Here:
    loop: Loop
    reports: Engine
    fleet: planted.Fleet
    now: float
    cold: float = 0.0
    hearing: float = 1_000.0
    batch: int = 1
    beats: Iterator[int] = field(default_factory=lambda: iter(()))

    def ticks(self, n: int, between: Callable[[], None]) -> list[float]:
        """Milliseconds of each of n turns; what happens between them is not measured."""
        times = []
        for _ in range(n):
            self._probe()
            between()
            began = time.perf_counter()
            self.turn()
            times.append((time.perf_counter() - began) * 1_000)
        return times

    def turn(self) -> None:
        self.loop.tick(self.now)
        while self.loop.behind:
            self.loop.tick(self.now)

    def _probe(self) -> None:
        self.now, self.hearing, self.batch = self.now + TICK, self.hearing + TICK, self.batch + 1
        with writing(self.reports) as conn:
            values = {"batch": self.batch, "hearing": self.hearing, "hearing_at": self.now}
            conn.execute(update(tables.state).values(**values))

    def beat(self, n: int) -> None:
        """So many devices report: every second one something new."""
        contacts, reports = tables.contacts, tables.reports
        heard = (self.now, self.hearing, self.batch)
        names = [f"{self.fleet.name}-{next(self.beats):06d}" for _ in range(n)]
        with writing(self.reports) as conn:
            cursor = conn.connection.cursor()
            cursor.executemany(
                f"UPDATE {contacts.name} SET last_contact=?, heard_clock=?, change=? "  # noqa: S608
                "WHERE device=?",
                [(*heard, name) for name in names],
            )
            cursor.executemany(
                f"UPDATE {reports.name} SET seq=seq+1, state='IDLE', reason=? "  # noqa: S608
                "WHERE device=?",
                [(f"r{self.batch}", name) for name in names[::2]],
            )


@contextmanager
def _bench(size: int) -> Iterator[_Here]:
    """A loop that has taken its first turn on a fleet of this size."""
    with tempfile.TemporaryDirectory(prefix="bellwether-bench-") as folder:
        control = open_control(f"sqlite:///{Path(folder) / 'control.db'}")
        reports = open_engine(f"sqlite:///{Path(folder) / 'telemetry.db'}")
        create_schema(reports)
        now = time.time()
        fleet = planted.Fleet(name="cars", size=size, state="Soaking")
        planted.plant(control, reports, [fleet] if size else [], None, now)
        with writing(control) as conn:
            term = store.take_over(conn, 2)
        key = DirectorKey(Ed25519PrivateKey.generate())
        ports = Ports(engine=control, reader=Store(reports), heads=_Git(), broker=_Broker())
        loop = Loop(ports, Issuer(key=key, term=term, base_url="http://127.0.0.1:1"))
        here = _Here(loop=loop, reports=reports, fleet=fleet, now=now)
        began = time.perf_counter()
        here.turn()
        here.cold = time.perf_counter() - began
        here.ticks(5, lambda: None)
        yield here
        control.dispose()
        reports.dispose()
