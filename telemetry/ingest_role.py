"""The ingest process: broker → bounded queue → one commit at a time → acknowledgements.

Rules, in order:

1. A batch is what came in `linger` seconds and during the last commit, at most `batch_max`
   messages; then it is committed. So batches grow with the load, and what is written once a device
   and batch (state, boots, sums) costs less a message.
   While it is committed, the next one is read: each on a thread of its own, so that the database
   and the decoder work side by side.
2. After the commit, and not before: PUBACKs to the broker, acks to the devices.
3. While the database is away nothing is acknowledged, and the same batch is tried again. With
   `queue_max` messages or `queue_bytes` waiting we stop reading the socket, until half of it is
   written; the broker keeps the rest. So memory stays flat however long it takes.
4. A probe goes through the broker each second; hearing it again is what advances the hearing clock.
5. Told to stop, it commits what it has, acknowledges it, and disconnects.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import structlog

from telemetry import metrics
from telemetry.broker import Connection, Options, Received
from telemetry.ingest import PROBE_TOPIC, Ingest, Limits
from telemetry.store import checkpoints
from telemetry.store.fold import Batch
from telemetry.store.reports import Store
from telemetry.store.retention import Retention, sweep

GROUP = "bw-ingest"
PROBE_EVERY = 1.0
SWEEP_EVERY = 60.0
TIDY_EVERY = 10.0
STEPS_BACK = 5  # niceness: a third of what a process of the usual one gets where both want it

log = structlog.get_logger("bellwether.ingest")
T = TypeVar("T")

Registry = Callable[[], Mapping[str, str]]  # device → status


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """What the process is made of; the defaults are right for one machine."""

    url: str  # of the broker
    store: Store  # its schema exists
    registry: Registry  # asked about once a second, from another thread
    username: str | None = None
    password: str | None = None
    ca_file: str | None = None
    client_id: str = "bw-ingest-1"  # stable: the broker keeps what came while we were away
    session_expiry: int = 7 * 86_400  # seconds
    retention: float = Retention().raw  # seconds that raw messages are kept
    limits: Limits = field(default_factory=Limits)
    linger: float = 0.05
    enough: int = 2_000  # messages for which nobody lingers
    batch_max: int = 20_000
    receive_maximum: int = 65_535
    queue_max: int = 40_000  # messages, and one read of the socket more
    queue_bytes: int = 64 << 20
    clock: Callable[[], float] = time.time

    def options(self) -> Options:
        spoken = ("reported", "health", "presence")
        return Options(
            url=self.url,
            client_id=self.client_id,
            session_expiry=self.session_expiry,
            username=self.username,
            password=self.password,
            ca_file=self.ca_file,
            subscribe=(*(f"$share/{GROUP}/bw/v1/+/{c}" for c in spoken), PROBE_TOPIC),
            receive_maximum=self.receive_maximum,
        )


def run(role: Role, stopping: threading.Event) -> None:
    """Serve until `stopping` is set."""
    asyncio.run(_until(Process(role), stopping))


def own_process() -> None:
    """Make this a process that does nothing but ingest.

    A batch makes several 100,000 objects, none in a cycle. Looking through them, and through all
    modules, again and again took a quarter of the time; `Process` collects every `TIDY_EVERY`.
    Where processors are few, telemetry steps back for a moment: orders and people go first.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    os.nice(STEPS_BACK)


async def _until(process: Process, stopping: threading.Event) -> None:
    stop = asyncio.Event()
    served = asyncio.create_task(process.run(stop))
    while not (stopping.is_set() or served.done()):
        await asyncio.wait([served], timeout=0.1)
    stop.set()
    await served


class Roster:
    """The registry, asked once a second; sooner for a device that it does not know as active.

    Never more often than costs a twentieth of the time, however large the fleet is.
    """

    LAST = 1.0
    SOON = 0.05

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._known: Mapping[str, str] | None = None
        self._asked, self._price = 0.0, 0.0

    def __call__(self) -> Mapping[str, str]:
        return self._at_most(self.LAST)

    def again(self) -> Mapping[str, str]:
        return self._at_most(self.SOON)

    def _at_most(self, age: float) -> Mapping[str, str]:
        began = time.monotonic()
        if self._known is None or began >= self._asked + max(age, 20 * self._price):
            self._known = self._registry()
            self._asked = time.monotonic()
            self._price = self._asked - began
        return self._known


class Process:
    def __init__(self, role: Role) -> None:
        self._role = role
        self._clock = role.clock
        roster = Roster(role.registry)
        self._ingest = Ingest(role.store, roster, role.limits, again=roster.again)
        self._keep = Retention(raw=role.retention)
        self._queue: deque[Received] = deque()
        self._bytes = 0  # of their payloads
        self._session = 0  # the connection that the newest of them came on
        self._came = asyncio.Event()
        self._many = asyncio.Event()  # half a batch is there: worth reading ahead
        # One thread each: a pool would give every one of its threads memory of its own.
        self._reader = ThreadPoolExecutor(1, "ingest-read")
        self._writer = ThreadPoolExecutor(1, "ingest-write")
        self.connection = Connection(role.options(), on_messages=self._receive)

    async def run(self, stop: asyncio.Event) -> None:
        session = asyncio.create_task(self.connection.run())
        beats = [asyncio.create_task(beat()) for beat in (self._probe, self._sweep, self._tidy)]
        session.add_done_callback(lambda _: stop.set())  # it ends by itself only by a defect
        try:
            await self._work(stop)
        finally:
            for beat in beats:
                beat.cancel()
            await asyncio.gather(*beats, return_exceptions=True)
            self.connection.stop()
            await session
            self._reader.shutdown()
            self._writer.shutdown()

    async def _work(self, stop: asyncio.Event) -> None:
        """Read a batch while the one before it is committed; one of each at a time, in order."""
        stopped = asyncio.create_task(stop.wait())
        committing: asyncio.Task[bool] | None = None
        while not stop.is_set():
            await self._something(stopped, committing)
            if committing is not None and committing.done() and not self._queue:
                kept, committing = committing.result(), None
                if not kept:
                    break
            some = self._take()
            if not some:
                if committing is None:
                    await self._answer(self._ingest.due(self._clock()))
                continue
            batch = await self._read(some, stop)
            kept = committing is None or await committing
            committing = None
            if batch is None or not kept:
                break  # not acknowledged: the broker has all of it, and sends it again
            committing = asyncio.create_task(self._settle(some, batch, stop))
        stopped.cancel()
        kept = committing is None or await committing
        while kept and self._queue:
            some = self._take()
            last = await self._read(some, stop)
            kept = last is not None and await self._settle(some, last, stop)

    async def _something(
        self, stopped: asyncio.Task[bool], committing: asyncio.Task[bool] | None
    ) -> None:
        """Wait for enough messages, or for any once nothing is committed any more; then linger.

        An ack that becomes due, and the end, do not wait.
        """
        if committing is not None and not committing.done():
            many = asyncio.create_task(self._many.wait())
            await asyncio.wait([many, committing, stopped], return_when=asyncio.FIRST_COMPLETED)
            many.cancel()
            return
        came = asyncio.create_task(self._came.wait())
        patience = 0.1 if self._ingest.owes() else None
        await asyncio.wait([came, stopped], timeout=patience, return_when=asyncio.FIRST_COMPLETED)
        came.cancel()
        if 0 < len(self._queue) < self._role.enough:
            await asyncio.wait([stopped], timeout=self._role.linger)

    async def _read(self, some: Sequence[Received], stop: asyncio.Event) -> Batch | None:
        metrics.gauge("bellwether_ingest_queue_messages", len(self._queue) + len(some))
        messages = [(message.topic, message.payload) for message in some]
        read = partial(self._ingest.read, messages)
        return await self._tried(self._reader, read, stop)  # its registry may be away

    async def _settle(self, some: Sequence[Received], batch: Batch, stop: asyncio.Event) -> bool:
        """From the batch to its acks; False when it had to be given up."""
        began = time.perf_counter()
        result = await self._tried(self._writer, partial(self._ingest.commit, batch), stop)
        if result is None:
            return False
        self.connection.ack(some)
        await self._answer(result.acks)
        metrics.count("bellwether_ingest_batches_total")
        metrics.observe("bellwether_ingest_batch_seconds", time.perf_counter() - began)
        return True

    async def _tried(
        self, thread: ThreadPoolExecutor, work: Callable[[float], T], stop: asyncio.Event
    ) -> T | None:
        """Work on that thread, however often it takes; None when told to stop while it fails."""
        pause, loop = 0.1, asyncio.get_running_loop()
        while True:
            try:
                return await loop.run_in_executor(thread, work, self._clock())
            except Exception as error:  # noqa: BLE001 - whatever it is: unacknowledged is not lost
                metrics.count("bellwether_ingest_store_errors_total")
                log.warning("store_unavailable", error=str(error)[:300], retry_in=pause)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), pause)
            if stop.is_set():
                return None
            pause = min(5.0, pause * 2)

    async def _answer(self, acks: Sequence[tuple[str, bytes]]) -> None:
        if acks:
            await self.connection.publish_many(acks, qos=0, retain=False, timeout=2.0)

    def _receive(self, messages: list[Received]) -> None:
        if messages[0].session != self._session:
            # A new session brings again what the old one left unacknowledged.
            self._session = messages[0].session
            kept = [m for m in self._queue if m.packet_id is None or m.session == self._session]
            self._queue = deque(kept)
            self._bytes = sum(len(m.payload) for m in kept)
        self._queue.extend(messages)
        self._bytes += sum([len(m.payload) for m in messages])
        if self._full(1):
            self.connection.pause()
            metrics.gauge("bellwether_ingest_paused", 1)
        self._came.set()
        if len(self._queue) * 2 >= self._role.batch_max:
            self._many.set()

    def _take(self) -> list[Received]:
        """The next batch; reads on when there is room again."""
        some = [self._queue.popleft() for _ in range(min(len(self._queue), self._role.batch_max))]
        self._bytes -= sum([len(m.payload) for m in some])
        if not self._full(2):
            self.connection.resume()
            metrics.gauge("bellwether_ingest_paused", 0)
        if not self._queue:
            self._came.clear()
        if len(self._queue) * 2 < self._role.batch_max:
            self._many.clear()
        return some

    def _full(self, part: int) -> bool:
        """Is more than 1/`part` of what may wait waiting?"""
        role = self._role
        return len(self._queue) * part >= role.queue_max or self._bytes * part >= role.queue_bytes

    async def _probe(self) -> None:
        while True:
            if self.connection.connected:
                stamp = f"{self._clock():.3f}".encode()
                await self.connection.publish_many([(PROBE_TOPIC, stamp)], qos=0, retain=False)
            await asyncio.sleep(PROBE_EVERY)

    async def _tidy(self) -> None:
        """What stands in cycles (results of queries do) goes at once, not after a million more."""
        while True:
            await asyncio.sleep(TIDY_EVERY)
            gc.collect()

    async def _sweep(self) -> None:
        while True:
            try:
                while await asyncio.to_thread(
                    sweep, self._role.store.engine, self._clock(), self._keep
                ):
                    await asyncio.sleep(0.1)
                await asyncio.to_thread(checkpoints.take, self._role.store.engine, self._clock())
            except Exception as error:  # noqa: BLE001 - old rows are no reason to stop hearing
                log.warning("sweep_failed", error=str(error)[:300])
            await asyncio.sleep(SWEEP_EVERY)
