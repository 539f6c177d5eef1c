"""The ingest process: broker → bounded queue → one commit at a time → acknowledgements.

Rules, in order:

1. A batch is what came in `linger` seconds and during the last commit, at most `batch_max`
   messages; then it is committed. So batches grow with the load, and what is written once a device
   and batch (state, boots, sums) costs less a message.
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
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import structlog

from telemetry import metrics
from telemetry.broker import Connection, Options, Received
from telemetry.ingest import PROBE_TOPIC, BatchResult, Ingest, Limits
from telemetry.store.fold import Batch
from telemetry.store.reports import Store
from telemetry.store.retention import Retention, sweep

GROUP = "bw-ingest"
PROBE_EVERY = 1.0
SWEEP_EVERY = 60.0

log = structlog.get_logger("bellwether.ingest")


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
    retention: float = Retention().raw  # seconds that raw messages are kept
    limits: Limits = field(default_factory=Limits)
    linger: float = 0.05
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
            username=self.username,
            password=self.password,
            ca_file=self.ca_file,
            subscribe=(*(f"$share/{GROUP}/bw/v1/+/{c}" for c in spoken), PROBE_TOPIC),
            receive_maximum=self.receive_maximum,
        )


def run(role: Role, stopping: threading.Event) -> None:
    """Serve until `stopping` is set; for a process of its own: it tunes the garbage collector."""
    # A batch makes several 100,000 objects, none in a cycle. Looking through them and all modules
    # again and again took a quarter of the time.
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)
    asyncio.run(_until(Process(role), stopping))


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
        self.connection = Connection(role.options(), on_messages=self._receive)

    async def run(self, stop: asyncio.Event) -> None:
        session = asyncio.create_task(self.connection.run())
        beats = [asyncio.create_task(self._probe()), asyncio.create_task(self._sweep())]
        session.add_done_callback(lambda _: stop.set())  # it ends by itself only by a defect
        try:
            await self._work(stop)
        finally:
            for beat in beats:
                beat.cancel()
            await asyncio.gather(*beats, return_exceptions=True)
            self.connection.stop()
            await session

    async def _work(self, stop: asyncio.Event) -> None:
        stopped = asyncio.create_task(stop.wait())
        while not stop.is_set():
            await self._something(stopped)
            await self._turn(stop)
        while self._queue and await self._turn(stop):
            pass
        stopped.cancel()

    async def _something(self, stopped: asyncio.Task[bool]) -> None:
        """Wait for a message, for an ack that becomes due, or for the end; then linger."""
        came = asyncio.create_task(self._came.wait())
        patience = 0.1 if self._ingest.owes() else None
        await asyncio.wait([came, stopped], timeout=patience, return_when=asyncio.FIRST_COMPLETED)
        came.cancel()
        if self._queue and len(self._queue) < self._role.batch_max:
            await asyncio.wait([stopped], timeout=self._role.linger)

    async def _turn(self, stop: asyncio.Event) -> bool:
        """One batch from the queue to the acks; False when it had to be given back."""
        some = self._take()
        metrics.gauge("bellwether_ingest_queue_messages", len(self._queue) + len(some))
        if not some:
            await self._answer(self._ingest.due(self._clock()))
            return True
        began = time.perf_counter()
        messages = [(message.topic, message.payload) for message in some]
        result = await self._commit(messages, stop)
        if result is None:
            return False  # not acknowledged: the broker has all of it, and sends it again
        self.connection.ack(some)
        await self._answer(result.acks)
        metrics.count("bellwether_ingest_batches_total")
        metrics.observe("bellwether_ingest_batch_seconds", time.perf_counter() - began)
        return True

    async def _commit(
        self, messages: Sequence[tuple[str, bytes]], stop: asyncio.Event
    ) -> BatchResult | None:
        """Commit, however often it takes; None when we are told to stop while it fails."""
        batch: Batch | None = None
        pause = 0.1
        while True:
            try:
                if batch is None:  # the registry's database may be away, too
                    batch = await asyncio.to_thread(self._ingest.read, messages, self._clock())
                return await asyncio.to_thread(self._ingest.commit, batch, self._clock())
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

    def _take(self) -> list[Received]:
        """The next batch; reads on when there is room again."""
        some = [self._queue.popleft() for _ in range(min(len(self._queue), self._role.batch_max))]
        self._bytes -= sum([len(m.payload) for m in some])
        if not self._full(2):
            self.connection.resume()
            metrics.gauge("bellwether_ingest_paused", 0)
        if not self._queue:
            self._came.clear()
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

    async def _sweep(self) -> None:
        while True:
            try:
                while await asyncio.to_thread(
                    sweep, self._role.store.engine, self._clock(), self._keep
                ):
                    await asyncio.sleep(0.1)
            except Exception as error:  # noqa: BLE001 - old rows are no reason to stop hearing
                log.warning("retention_failed", error=str(error)[:300])
            await asyncio.sleep(SWEEP_EVERY)
