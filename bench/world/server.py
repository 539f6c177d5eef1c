"""The service's processes: controller, ingest, people at the API. Each may die at any port call.

A process is a name and what it had in memory; `Process.run` does something in it, and starts it
again a little later when it died. What is started is what `controller.service` starts, over ports
of the simulation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta
from random import Random
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import select

from bench.world.databases import Databases
from bench.world.heap import Heap
from bench.world.points import Killed, Points
from bench.world.repository import Clone, Repository
from bench.world.wire import Wire
from controller import commands
from controller.gitwatch import GitWatch
from controller.keys import DirectorKey
from controller.lease import lowest
from controller.loop import Loop, Ports
from controller.orders import Issuer
from controller.recorder import Recorder
from controller.store import rollouts as store
from controller.store.lease import writing_as
from controller.store.tables import devices, holds
from telemetry.ingest import PROBE_TOPIC, Ingest
from telemetry.store.database import reading, writing
from telemetry.store.prepared import Prepared

KEY = DirectorKey(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
LEASE = timedelta(hours=1)
MOST = 2_000  # messages in one ingest batch
_ROSTER = Prepared(select(devices.c.id, devices.c.status))


class Process:
    """Runs until it dies; then `start` is called again."""

    def __init__(
        self, name: str, heap: Heap, points: Points, start: Callable[[], None], trace: Trace
    ) -> None:
        self.name = name
        self.up = False
        self.wanted = True  # False: it stays away until somebody wants it again
        self._heap, self._points, self._start, self._trace = heap, points, start, trace

    def begin(self) -> None:
        if not self.wanted or self.up:
            return
        self.up = True
        self.run(self._start)

    def run(self, work: Callable[[], None]) -> None:
        if not self.up:
            return
        with self._points.by(self.name):
            try:
                work()
            except Killed:
                self.died(self._points.killed[-1][1])

    def died(self, where: str) -> None:
        self.up = False
        self._trace(f"{self.name} died: {where}")
        self._heap.after(2.0, self.begin)

    def stop(self) -> None:
        self.up, self.wanted = False, False

    def again(self) -> None:
        self.wanted = True
        self.begin()


Trace = Callable[[str], None]


class Controller:
    """The loop and the watcher of the fleet repository, as `service.run_controller` starts them."""

    def __init__(
        self,
        name: str,
        *,
        heap: Heap,
        points: Points,
        databases: Databases,
        wire: Wire,
        remote: Repository,
        chance: Random,
        trace: Trace,
    ) -> None:
        self.clone = Clone(remote, points)
        self.term = 0
        self.fenced = False
        self.take_overs: list[tuple[int, float]] = []
        self._heap, self._databases, self._wire = heap, databases, wire
        self._chance, self._trace = chance, trace
        self._loop: Loop | None = None
        self._watch: GitWatch | None = None
        self._connections = 0
        self.process = Process(name, heap, points, self._start, trace)

    @property
    def loop(self) -> Loop | None:
        return self._loop if self.process.up else None

    def _start(self) -> None:
        engine, reader = self._databases.control, self._databases.telemetry
        self._loop = self._watch = None
        heard = max((row.term for row in reader.devices_changed(0)), default=0)
        with writing(engine) as conn:
            self.term = store.take_over(conn, lowest(heard, self._heap.now))
        self.take_overs.append((self.term, self._heap.now))
        self._watch = GitWatch(
            engine,
            self.clone,  # type: ignore[arg-type]
            Recorder(engine, self.clone, term=self.term),  # type: ignore[arg-type]
            url="memory:fleet",
            branch="main",
            clock=lambda: self._heap.now,
            term=self.term,
        )
        ports = Ports(
            engine=engine, reader=reader, heads=self._watch, broker=self._wire,
            entropy=self._chance.randbytes,
        )  # fmt: skip
        self._loop = Loop(ports, Issuer(key=KEY, term=self.term, base_url="http://w", lease=LEASE))
        self._connections = 0
        self._heap.after(0.1, self.poll)  # the watcher looks at once
        self._trace(f"{self.process.name} starts with term {self.term}")

    def tick(self) -> None:
        self.process.run(self._tick)

    def poll(self) -> None:
        self.process.run(self._poll)

    def _tick(self) -> None:
        loop = self._loop
        if loop is None:
            return
        try:
            if self._wire.connections != self._connections:
                sessions = self._wire.connections
                with writing_as(self._databases.control, self.term) as conn:
                    store.unpublish_all(conn)
                self._connections = sessions
            loop.tick(self._heap.now)
        except store.Fenced as error:
            self._trace(f"{self.process.name} is fenced: {error}")
            self.fenced = True
            self.process.stop()

    def _poll(self) -> None:
        if self._watch is None:
            return
        try:
            self._watch.poll(self._heap.now)
        except store.Fenced as error:  # the loop's next turn ends the process
            self._trace(f"{self.process.name} is fenced: {error}")


class IngestProcess:
    """Broker → batch → commit → acknowledgements, one turn a beat."""

    def __init__(
        self, *, heap: Heap, points: Points, databases: Databases, wire: Wire, trace: Trace
    ) -> None:
        self._heap, self._points, self._databases, self._wire = heap, points, databases, wire
        self._ingest: Ingest | None = None
        self._roster: tuple[float, Mapping[str, str]] = (-1e9, {})
        self.refusals: dict[str, int] = {}
        self.process = Process("ingest", heap, points, self._start, trace)

    def _start(self) -> None:
        self._roster = (-1e9, {})
        self._ingest = Ingest(self._databases.telemetry, self._registry, again=self._registry_now)

    def turn(self) -> None:
        self.process.run(self._turn)

    def _turn(self) -> None:
        core = self._ingest
        if core is None or not self._wire.up:
            return
        some = [self._wire.inbox[i] for i in range(min(MOST, len(self._wire.inbox)))]
        result = core.batch([*some, (PROBE_TOPIC, b"")], self._heap.now)
        for reason, n in result.refusals.items():
            self.refusals[reason] = self.refusals.get(reason, 0) + n
        self._points.reach("puback")  # dead before it: the broker sends all of it again
        for _ in some:
            self._wire.inbox.popleft()
        self._wire.acknowledge(result.acks)

    def _registry(self) -> Mapping[str, str]:
        at, known = self._roster
        return known if self._heap.now - at < 30.0 else self._registry_now()

    def _registry_now(self) -> Mapping[str, str]:
        with reading(self._databases.control) as conn:
            known = {row.id: row.status for row in _ROSTER.all(conn)}
        self._roster = (self._heap.now, known)
        return known


class People:
    """What people ask of the API; the API process may die under their hands."""

    def __init__(
        self, *, heap: Heap, points: Points, databases: Databases, wire: Wire, trace: Trace
    ) -> None:
        self._heap, self._points, self._databases, self._wire = heap, points, databases, wire
        self._trace = trace
        self.hold_marks: dict[str, int] = {}  # hold → messages that had left when it committed
        self.lift_marks: dict[str, int] = {}

    def ask(self, kind: str, rollout: str | None, body: Mapping[str, Any] | None = None) -> bool:
        """Record a command; False when it was refused, or the API died."""
        with self._points.by("api"):
            try:
                recorded = commands.record(
                    self._databases.control, kind=kind, rollout=rollout, body=dict(body or {}),
                    actor="eve", reason="because", incident=None, if_revision=None,
                    now=self._heap.now,
                )  # fmt: skip
            except commands.Refused as refused:
                self._trace(f"eve asks {kind} {rollout}: refused, {refused.message}")
                return False
            except Killed:
                self._trace(f"eve asks {kind} {rollout}: the API died")
                return False
        self._trace(f"eve asks {kind} {rollout}: {recorded.sentence}")
        if kind in ("rollback", "hold", "lift"):
            self._mark()
        return True

    def _mark(self) -> None:
        with reading(self._databases.control) as conn:
            for hold, lifted in conn.execute(select(holds.c.id, holds.c.lifted_at)):
                marks = self.hold_marks if lifted is None else self.lift_marks
                marks.setdefault(hold, len(self._wire.sent))
