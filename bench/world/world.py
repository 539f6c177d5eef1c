"""One world: a service, a repository, a broker and a fleet, driven by the heap.

Tests tell it what happens (`commit`, `ask`, `away`, …) and let time pass (`run`); a history does
the same from its seed. The service has a pulse: every `BEAT` seconds ingest takes what has come and
the loop takes its turn; what people do wakes the loop at once, as the service's bell does.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from random import Random
from typing import Any

import structlog
from sqlalchemy import func, insert, select, update

from bench.world import texts
from bench.world.databases import Databases
from bench.world.device import Device, Nature
from bench.world.heap import Heap
from bench.world.points import Points
from bench.world.repository import Repository
from bench.world.server import KEY, Controller, IngestProcess, People
from bench.world.wire import Wire
from controller import invariants, ulid
from controller.facts import Finding, Observed, Sent
from controller.store import devices as registry_rows
from controller.store import handout, snapshot
from controller.store.tables import devices as registry
from device_agent import agent
from telemetry.store.database import reading, writing

START = 1_800_000_000.0
BEAT = 4.8  # seconds; less than the gap that still counts as heard (5 s)
POLL = 30.0
_RESTORED = 3.0  # seconds


class World:
    def __init__(self, databases: Databases, seed: str, points: Points | None = None) -> None:
        self.seed = seed
        self.heap = Heap(START)
        self.points = points or Points()
        self.databases = databases
        databases.fresh(self.points)
        self.wire = Wire(self.heap, self.points, self.chance("wire"))
        self.repository = Repository()
        self.natures: dict[str, Nature] = {}
        self.devices: dict[str, Device] = {}
        self.lines: list[str] = []
        self.people = People(
            heap=self.heap, points=self.points, databases=databases, wire=self.wire,
            trace=self.trace,
        )  # fmt: skip
        self.ingest = IngestProcess(
            heap=self.heap, points=self.points, databases=databases, wire=self.wire,
            trace=self.trace,
        )  # fmt: skip
        self.controllers = [self._controller("controller")]
        self.deaf: list[tuple[float, float]] = []  # when the service could not hear its devices
        self._deaf_since: float | None = None
        self._change = 0
        self._pending: deque[Callable[[], object]] = deque()
        self._chance_between = self.chance("between")
        self._ids = self.chance("ids")

    # -- chance, time, words ----------------------------------------------------------------------

    def chance(self, name: str) -> Random:
        """An own stream of chance for everything that asks."""
        return Random(f"{self.seed}/{name}")

    @property
    def now(self) -> float:
        return self.heap.now

    def trace(self, line: str) -> None:
        self.lines.append(f"{self.heap.now - START:9.2f}  {line}")

    def start(self) -> None:
        """The devices are in the registry, and everything comes up."""
        self._register_all()
        self.ingest.process.begin()
        for controller in self.controllers:
            controller.process.begin()
        for device in self.devices.values():
            device.start()
        self.heap.after(0.5, self._pulse)
        self.heap.after(POLL, self._look)

    def run(self, seconds: float) -> None:
        with quiet(), self._chance_of_ids():
            self.heap.run(self.heap.now + seconds)

    @contextlib.contextmanager
    def _chance_of_ids(self) -> Iterator[None]:
        """Ids of commands and holds come from the seed as well."""
        before, ulid.chance = ulid.chance, self._ids.randbytes
        try:
            yield
        finally:
            ulid.chance = before

    def leap(self, seconds: float) -> None:
        """Everything stands still for so long: the service is off, and whoever sleeps, sleeps."""
        self.heap.leap(seconds)

    # -- the fleet --------------------------------------------------------------------------------

    def enrol(self, name: str, version: str = "1", **labels: str) -> Device:
        """A device that left the factory with `version`; in the registry from `start` on."""
        images = {texts.COMPONENT: (f"app-{version}", texts.artifact(version))}
        device = Device(
            name, self.heap, self.points, self.wire, self.chance(f"device/{name}"),
            keys=(KEY.public_hex,), images=images, natures=self.natures, trace=self.trace,
        )  # fmt: skip
        device.labels = labels
        self.devices[name] = device
        return device

    def _register_all(self) -> None:
        rows = [
            {
                "id": device.name,
                "labels": {"model": "m3", **device.labels},
                "created_at": self.now,
                "status": "active",
                "fleet": "cars",
                "change": number,
            }
            for number, device in enumerate(self.devices.values(), 1)
        ]
        with writing(self.databases.control) as conn:
            conn.execute(insert(registry), rows)

    def register(
        self, name: str, *, status: str = "active", fleet: str = "cars", **labels: str
    ) -> None:
        with writing(self.databases.control) as conn:
            self._change = 1 + int(
                conn.execute(select(func.coalesce(func.max(registry.c.change), 0))).scalar_one()
            )
            values: dict[str, Any] = {"status": status, "fleet": fleet, "change": self._change}
            done = conn.execute(update(registry).where(registry.c.id == name).values(**values))
            if not done.rowcount:
                row = {"id": name, "labels": {"model": "m3", **labels}, "created_at": self.now}
                conn.execute(insert(registry).values(**row, **values))

    # -- people -----------------------------------------------------------------------------------

    def commit(self, files: Mapping[str, str | None], author: str = "ann") -> str:
        """Push files (None removes one); the webhook wakes the watcher."""
        tree = self.repository.tree()
        for path, text in files.items():
            if text is None:
                tree.pop(path, None)
            else:
                tree[path] = text.encode()
        name = self.repository.push(tree, author, "a change", self.now)
        self.trace(f"{author} commits {name[:7]}: {', '.join(files)}")
        self.heap.after(0.2, self._hook)
        return name

    def force(self, head: str | None, files: Mapping[str, str] | None = None) -> None:
        """Point the branch at another commit, whatever was pushed meanwhile; then push files."""
        self.repository.head = head
        self.trace(f"somebody forces the branch to {str(head)[:7]}")
        if files is not None:
            self.commit(files)
        self.heap.after(0.2, self._hook)

    def hand_out(self, device: Device) -> None:
        """The device asks the API for its order; nobody knows of it where it is not in touch."""
        if device.agent is None or not device.reachable:
            return
        with reading(self.databases.control) as conn:
            row = registry_rows.get(conn, device.name)
            body = handout.order(conn, row, self.databases.telemetry) if row else None
        if body is not None:
            self.wire.handed(device.name, body)
            device.hear(agent.DesiredArrived(payload=body))

    def ask(self, kind: str, rollout: str | None = texts.ROLLOUT, **body: Any) -> bool:
        with self._chance_of_ids():
            done = self.people.ask(kind, rollout, body)
        self.heap.after(0.0, self.turn)
        return done

    def interrupt(self, deed: Callable[[], object]) -> None:
        """Do it in the middle of the controller's next turn, between two of its port calls."""
        self._pending.append(deed)
        self.points.between = self._between

    def _between(self, where: str) -> None:
        controller = self.points.who.startswith("controller")
        if not self._pending or not controller or self.databases.locked:
            return
        if where not in ("control.begin", "published"):  # what is on the wire has left
            return
        if self._chance_between.random() < 0.7:
            return
        deed, self.points.between = self._pending.popleft(), None
        with self.points.by(""):
            deed()
        self.points.between = self._between

    # -- faults of the service --------------------------------------------------------------------

    def broker_away(self, seconds: float, *, forgot: bool = False) -> None:
        self.wire.fall()
        self.trace(f"the broker is away for {seconds:.0f} s{', and forgets' if forgot else ''}")
        self._listen()

        def back() -> None:
            self.wire.rise(forgot=forgot)
            self._listen()

        self.heap.after(seconds, back)

    def ingest_away(self, seconds: float) -> None:
        self.ingest.process.stop()
        self.trace(f"ingest is away for {seconds:.0f} s")
        self._listen()

        def back() -> None:
            self.ingest.process.again()
            self._listen()

        self.heap.after(seconds, back)

    def controller_away(self, seconds: float) -> None:
        controller = self.controllers[-1]
        controller.process.stop()
        self.trace(f"the controller is away for {seconds:.0f} s")
        self.heap.after(seconds, controller.process.again)

    def git_away(self, seconds: float) -> None:
        self.repository.up = False
        self.trace(f"git is away for {seconds:.0f} s")
        self.heap.after(seconds, self._git_back)

    def heal(self) -> None:
        """Who was stopped comes back; the newest controller leads, the others stay away."""
        self.ingest.process.again()
        self._listen()
        self.controllers[-1].process.again()

    def second_controller(self) -> None:
        """Somebody starts another one while the first still runs."""
        another = self._controller(f"controller-{len(self.controllers) + 1}")
        self.controllers.append(another)
        another.process.begin()

    def lose_control_database(self, *, backup: bool) -> None:
        """The control database is gone; a second later the backup, or nothing, is in its place."""
        for one in self.controllers:
            one.process.stop()
        self.heap.after(1.0, lambda: self._replace_control_database(backup=backup))

    def _replace_control_database(self, *, backup: bool) -> None:
        for one in self.controllers:  # whoever began meanwhile
            one.process.stop()
        # Nobody restores one within seconds of a controller's beginning: its term is the second in
        # which it began, or one more where another had begun in it.
        begun = max((at for one in self.controllers for _, at in one.take_overs), default=0.0)
        if self.now < begun + _RESTORED:
            wait = begun + _RESTORED - self.now
            self.heap.after(wait, lambda: self._replace_control_database(backup=backup))
            return
        if backup:
            self.databases.restore("control")
        else:
            self.databases.wipe("control")
            self._register_all()
        self.trace(f"the control database is {'as at the backup' if backup else 'empty'}")
        self.controllers[-1].process.again()

    # -- what came of it --------------------------------------------------------------------------

    def observed(self) -> Observed:
        """What was seen outside of the databases."""
        deaf = list(self.deaf)
        if self._deaf_since is not None:
            deaf.append((self._deaf_since, self.now))
        return Observed(
            sent=[Sent(at=s.at, device=s.device, body=s.payload) for s in self.wire.sent],
            hold_marks=dict(self.people.hold_marks),
            lift_marks=dict(self.people.lift_marks),
            take_overs=[mark for one in self.controllers for mark in one.take_overs],
            devices=[device.seen() for device in self.devices.values()],
            deaf=deaf,
            keys={KEY.keyid: KEY.public_hex},
        )

    def check(self) -> list[Finding]:
        """Every invariant, on both databases and on what was seen."""
        tables = snapshot.read(self.databases.control, self.databases.telemetry, sums=True)
        return invariants.check(tables, self.observed(), now=self.now)

    # -- the pulse --------------------------------------------------------------------------------

    def turn(self) -> None:
        """Every controller takes its turn."""
        for controller in list(self.controllers):
            controller.tick()

    def _pulse(self) -> None:
        self.heap.after(BEAT, self._pulse)
        self.ingest.turn()
        self.turn()

    def _look(self) -> None:
        self.heap.after(POLL, self._look)
        for controller in list(self.controllers):
            controller.poll()

    def _hook(self) -> None:
        for controller in list(self.controllers):
            controller.poll()
        self.turn()

    def _git_back(self) -> None:
        self.repository.up = True

    def _listen(self) -> None:
        """Note from when to when nobody could be heard."""
        deaf = not (self.wire.up and self.ingest.process.up)
        if deaf and self._deaf_since is None:
            self._deaf_since = self.now
        elif not deaf and self._deaf_since is not None:
            self.deaf.append((self._deaf_since, self.now))
            self._deaf_since = None

    def _controller(self, name: str) -> Controller:
        return Controller(
            name, heap=self.heap, points=self.points, databases=self.databases, wire=self.wire,
            remote=self.repository, chance=self.chance(name), trace=self.trace,
        )  # fmt: skip


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the service's log lines: a history keeps its own."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    try:
        yield
    finally:
        structlog.configure(**before)
