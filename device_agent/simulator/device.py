"""One simulated device: the real core, the real disk, a simulated machine around it."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import sys
import time
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from device_agent import protocol, work
from device_agent.agent import (
    Agent,
    Connected,
    Event,
    Fact,
    Identity,
    Publish,
    Settings,
    Started,
    Tick,
)
from device_agent.download import Downloader, Patience
from device_agent.journal import Journal, JournalBroken
from device_agent.machine import Disk, boot_id, hash_file
from device_agent.outbox import Outbox
from device_agent.protocol import Channel, ComponentReport, HistoryEntry, Reason
from device_agent.record import Limits, Record
from device_agent.simulator.link import AsyncLink
from device_agent.simulator.machine import DAY, Driver, Vehicle, share
from device_agent.simulator.plan import Plan
from device_agent.work import SelfTestsDone

RESTART = 5.0  # seconds after which a supervisor starts an agent that has ended
_FACTORY_BOOT = "factory"


class Device:
    """One simulated device: the real core, the real disk, a simulated machine around it."""

    def __init__(
        self,
        identity: Identity,
        plan: Plan,
        loop: asyncio.AbstractEventLoop,
        workers: ThreadPoolExecutor,
    ) -> None:
        self.name = identity.device
        self._identity = identity
        self._plan = plan
        self._loop = loop
        self._workers = workers
        self._directory = Path(plan.root) / identity.device
        credentials = (identity.broker_username, identity.broker_password)
        patience = Patience(deadline=120.0, first_wait=0.5, longest_wait=5.0)
        transfer = Downloader(server=identity.server, credentials=credentials, patience=patience)
        self._disk = Disk(self._directory, transfer, self_tests=self._self_tests)
        driver = Driver(careful=plan.careful)
        self.vehicle = Vehicle(self.name, seed=plan.seed, pace=plan.pace, driver=driver)
        self._effects: asyncio.Queue[work.Effect] = asyncio.Queue()
        self._skew = 0.0
        self._offline_until = 0.0
        self._wait = 0.5
        self._connect_at = 0.0
        self._began = 0.0
        self._ran: dict[str, str] = {}
        self._crashes = 0
        self._working: asyncio.Task[None] | None = None
        self._restart: asyncio.Task[None] | None = None
        self._journal: Journal | None = None
        self._outbox: Outbox | None = None
        self._agent: Agent | None = None
        self._link = AsyncLink(identity, loop, self._handle)

    # -- life -------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """On a worker, before the first start: factory image, and the history it recorded."""
        fresh = not (self._directory / "journal.db").exists()
        self._directory.mkdir(parents=True, exist_ok=True)
        if fresh and self._plan.images:
            self._leave_factory()

    def start(self) -> None:
        limits = Limits(trial_soak=self._plan.trial_soak, trial_deadline=self._plan.trial_deadline)
        try:
            self._journal = Journal(self._directory / "journal.db")
            self._outbox = Outbox(self._directory / "outbox.db", max_messages=20_000)
            settings = Settings(limits=limits)
            self._agent = Agent(self._identity, self._journal, self._outbox, settings)
        except (sqlite3.Error, JournalBroken) as error:
            self._fail(error)
            return
        self._follow_slots()
        self._working = self._loop.create_task(self._work())
        # The simulated machine boots when a script cuts its power, not when we are killed.
        machine = f"{self._crashes}.{boot_id()}" if boot_id() else ""
        self._handle(Started(boot=uuid.uuid4().hex, machine=machine, active=self._disk.digests()))

    async def stop(self) -> None:
        """The orderly end; everything that matters is on the disk already."""
        if self._agent is not None:
            self._link.close(self._agent.will())
        await self._put_down()

    async def crash(self) -> None:
        """The power is cut; the next start continues from the journal."""
        self._crashes += 1
        await self._begin_again()

    def _fail(self, error: Exception) -> None:
        """What ends an agent's process ends this device's alone, and its supervisor starts it."""
        with contextlib.suppress(OSError):  # the log may lie on the disk that is full
            sys.stderr.write(f"{self.name}: {error}; again in {RESTART:g} s\n")
        self._agent = None
        self._restart = self._loop.create_task(self._recover())

    async def _recover(self) -> None:
        self._link.abandon()
        await asyncio.sleep(RESTART)
        await self._begin_again()

    async def _begin_again(self) -> None:
        self._link.abandon()
        await self._put_down()
        self._effects = asyncio.Queue()
        self._link = AsyncLink(self._identity, self._loop, self._handle)
        self._connect_at = 0.0
        self.start()

    async def _put_down(self) -> None:
        self._agent = None
        for task in (self._working, self._restart):
            if task is not None and task is not asyncio.current_task():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        for store in (self._journal, self._outbox):
            if store is not None:
                store.close()
        self._journal = self._outbox = None

    # -- faults -----------------------------------------------------------------------------------

    def go_offline(self, seconds: float) -> None:
        self._offline_until = time.monotonic() + seconds
        self._link.cut()

    def shift_clock(self, seconds: float) -> None:
        self._skew = seconds

    @property
    def reachable(self) -> bool:
        """Is there a network at all?"""
        return time.monotonic() >= self._offline_until and not self.vehicle.silent

    # -- a second ---------------------------------------------------------------------------------

    def tick(self) -> bool:
        """Once a second. Answers whether it would connect now (`connect` is paced by the owner)."""
        if self._agent is None:
            return False
        self._link.misc()
        now = self._now()
        self._handle(Tick(facts={"parked": True, "landed": True, "disarmed": True}))
        if self._agent is not None and now - self._began >= self._plan.health_interval:
            self._sample(now)
        due = time.monotonic() >= self._connect_at
        return self.reachable and not self._link.open and due

    def connect(self) -> None:
        if self._agent is None:
            return
        spread = 0.5 + share(self.name, time.monotonic())
        self._connect_at = time.monotonic() + self._wait * spread
        self._wait = min(self._wait * 2, 30.0)
        try:
            self._link.connect(self._agent.subscriptions, self._agent.will())
        except OSError:
            return

    def _sample(self, now: float) -> None:
        seconds, began = now - self._began, self._began
        self._began = now
        if 0 < seconds < 3_600:
            self._handle(self.vehicle.drive(self._ran, began, seconds))

    # -- events and effects -----------------------------------------------------------------------

    def _handle(self, event: Event) -> None:
        agent = self._agent
        if agent is None:
            return
        if isinstance(event, Connected):
            self._wait = 0.5
        try:
            effects = agent.handle(event, self._now())
        except sqlite3.Error as error:
            self._fail(error)
            return
        for effect in effects:
            if isinstance(effect, Publish):
                self._link.publish(effect)
            elif not isinstance(effect, work.Cancel):
                self._effects.put_nowait(effect)
        if agent.running() != self._ran:
            self._follow_slots()

    async def _work(self) -> None:
        while True:
            effect = await self._effects.get()
            if isinstance(effect, work.ProbeLink):
                # A car without a network finds no other road either.
                alive = self.reachable and await self._server_answers()
                self._handle(Fact(work.LinkProbed(attempt=effect.attempt, alive=alive)))
                continue
            fact = await self._loop.run_in_executor(self._workers, self._disk.execute, effect)
            if fact is not None:
                self._handle(Fact(fact))  # a switch that changed what runs is followed in there

    async def _server_answers(self) -> bool:
        url = urlsplit(self._identity.server)
        port = url.port or (443 if url.scheme == "https" else 80)
        try:
            _reader, writer = await asyncio.open_connection(url.hostname, port)
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
        writer.close()
        return True

    def _switched(self) -> None:
        """The links point elsewhere: what the car does follows from there, from this moment."""
        slots = {c: self._disk.slots.active(c) for c in self._disk.slots.components()}
        paths = {c: slot.path for c, slot in slots.items() if slot is not None}
        digests = {c: slot.digest for c, slot in slots.items() if slot is not None}
        self.vehicle.switched(paths, digests)
        if self.vehicle.silent and self._agent is not None:
            self._link.fade()

    def _follow_slots(self) -> None:
        """Another set runs: a new interval begins, nothing of it belongs to the old one."""
        self._switched()
        self._began = self._now()
        self._ran = self._agent.running() if self._agent is not None else {}

    def _self_tests(self, slots: Mapping[str, Path], attempt: str) -> SelfTestsDone:
        ok, said = self.vehicle.boots()
        return SelfTestsDone(attempt=attempt, ok=ok, log=said, reason=Reason.BOOT_FAILED)

    def _now(self) -> float:
        return time.time() + self._skew

    # -- factory ----------------------------------------------------------------------------------

    def _leave_factory(self) -> None:
        """Slot a holds the image, the journal says so, the outbox is full of recorded days.

        The journal comes last, and at once: killed before it, the device leaves the factory again.
        """
        now = time.time()
        for begun in self._directory.glob("outbox.db*"):
            begun.unlink()
        days = self._plan.history_days
        running: dict[str, ComponentReport] = {}
        entries = []
        for image in self._plan.images:
            bundle = Path(image.bundle)
            digest = hash_file(bundle)
            self._disk.slots.install(image.component, image.release, digest, bundle)
            self._disk.slots.switch({image.component: digest})
            running[image.component] = ComponentReport(
                release=image.release, digest=digest, committed=True
            )
            entries.append(
                HistoryEntry(
                    component=image.component,
                    release=image.release,
                    digest=digest,
                    at=now - (days + 1) * DAY,
                    event="activated",
                )
            )
        self._switched()
        digests = {component: report.digest for component, report in running.items()}
        outbox = Outbox(self._directory / "outbox.db", max_messages=20_000)
        for message in self.vehicle.past(digests, days, now, _FACTORY_BOOT):
            payload = protocol.encode(message)
            outbox.put(message.boot, message.seq, Channel.HEALTH, payload)
        outbox.close()
        made = self._directory / "journal.new"
        made.unlink(missing_ok=True)
        journal = Journal(made)
        journal.save(replace(Record(), running=running, history=tuple(entries)))
        journal.close()
        made.rename(self._directory / "journal.db")

    def recorded(self) -> int:
        """Days of recorded history that the server has not acknowledged yet."""
        if self._outbox is None:
            return self._plan.history_days
        return sum(waiting.boot == _FACTORY_BOOT for waiting in self._outbox.oldest(1))
