"""Runs the core on a real machine: one queue of events, one worker for slow effects.

Threads: the caller's (core, journal, outbox), the worker (downloads, slots, self-tests, HTTPS), and
the link's. They meet in queues only; the core never waits for a disk or a network.
"""

from __future__ import annotations

import queue
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from device_agent import work
from device_agent.agent import (
    Agent,
    Connected,
    DesiredArrived,
    Disconnected,
    Event,
    Fact,
    Identity,
    Publish,
    Settings,
    Started,
    Tick,
)
from device_agent.download import Downloader, basic
from device_agent.health import Sampler
from device_agent.journal import Journal
from device_agent.link import Link
from device_agent.machine import Disk, boot_id
from device_agent.outbox import Outbox
from device_agent.protocol import MAX_MESSAGE_BYTES
from device_agent.reserve import Reserve

Job = Callable[[], Event | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cadence:
    health: float = 60.0  # seconds between health messages
    tick: float = 1.0
    fallback: float = 60.0  # seconds without the broker before the order is asked for over HTTP


class Runner:
    def __init__(
        self,
        directory: Path,
        identity: Identity,
        settings: Settings | None = None,
        cadence: Cadence | None = None,
    ) -> None:
        self._identity = identity
        self._cadence = cadence or Cadence()
        directory.mkdir(parents=True, exist_ok=True)
        self._reserve = Reserve(directory / "reserve")
        self._journal = Journal(directory / "journal.db", self._reserve)
        self._outbox = Outbox(directory / "outbox.db", self._reserve)
        self.agent = Agent(identity, self._journal, self._outbox, settings)
        # Simple queues and a plain flag: `stop` may interrupt the thread that runs `run` at any
        # line, also where a Queue or an Event holds its lock, and would wait for it for ever.
        self._ending = False
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        credentials = (identity.broker_username, identity.broker_password)
        self._halt = threading.Event()  # ends the transfer that is under way
        self._epoch = 0  # raised by every Cancel: jobs from before it are not begun any more
        downloader = Downloader(server=identity.server, credentials=credentials, stop=self._halt)
        self._disk = Disk(directory, downloader)
        self._sampler = Sampler(directory / "probes", self._cadence.health)
        self._worker = threading.Thread(target=self._work, name="worker", daemon=True)
        self._link: Link | None = None
        self._ran = self.agent.running()
        self._connected = False
        self._asked = time.monotonic()

    def stop(self) -> None:
        """From a signal handler or another thread: the orderly end."""
        self._ending = True
        self._events.put(None)

    def run(self) -> None:
        """Until `stop`; raises what the journal raises: then the supervisor starts us again."""
        self._worker.start()
        self._handle(Started(boot=uuid.uuid4().hex, machine=boot_id(), active=self._disk.digests()))
        agent = self.agent
        link = Link(self._identity, agent.will(), agent.subscriptions, self._events.put)
        self._link = link
        link.start()
        try:
            self._loop()
        finally:
            self._ending = True
            self._halt.set()
            self._jobs.put(None)
            link.stop(agent.will())
            self._worker.join(5.0)
            self._outbox.close()
            self._journal.close()

    def _loop(self) -> None:
        next_tick = time.monotonic()
        while not self._ending:
            try:
                event = self._events.get(timeout=max(0.0, next_tick - time.monotonic()))
            except queue.Empty:
                next_tick = time.monotonic() + self._cadence.tick
                self._beat()
                continue
            if event is not None:
                self._handle(event)

    def _beat(self) -> None:
        now = time.time()
        self._handle(Tick(facts=self._sampler.facts(now)))
        if self._sampler.due():
            self._reserve.lay()
            sampled = self._sampler.sample(self.agent.running(), now)
            if sampled is not None:
                self._handle(sampled)
        quiet = time.monotonic() - self._asked
        if not self._connected and quiet >= self._cadence.fallback:
            self._asked = time.monotonic()
            self._jobs.put(self._ask_desired)

    def _handle(self, event: Event) -> None:
        if isinstance(event, Connected | Disconnected):
            self._connected = isinstance(event, Connected)
            self._asked = time.monotonic()
        for effect in self.agent.handle(event, time.time()):
            if isinstance(effect, Publish):
                if self._link is not None:
                    self._link.publish(effect)
            elif isinstance(effect, work.Cancel):
                self._epoch += 1
                self._halt.set()
            else:
                self._jobs.put(partial(self._do, effect, self._epoch))
        if self._running_changed():
            self._sampler.begin(self.agent.running(), time.time())

    def _running_changed(self) -> bool:
        running = self.agent.running()
        changed, self._ran = running != self._ran, running
        return changed

    # -- on the worker ----------------------------------------------------------------------------

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if self._ending:
                return
            event = job()
            if event is not None:
                self._events.put(event)

    def _do(self, effect: work.Effect, epoch: int) -> Event | None:
        self._halt.clear()
        if epoch != self._epoch or self._ending:
            return None
        if isinstance(effect, work.ProbeLink):
            alive = self._server_answers()
            return Fact(work.LinkProbed(attempt=effect.attempt, alive=alive))
        fact = self._disk.execute(effect)
        return None if fact is None else Fact(fact)

    def _ask_desired(self) -> Event | None:
        """The order in force, over HTTP: signed, so that the road does not matter."""
        import http.client

        try:
            payload = self._get(f"/api/v1/devices/{self._identity.device}/desired")
        except (OSError, http.client.HTTPException):
            return None
        return DesiredArrived(payload=payload) if payload else None

    def _server_answers(self) -> bool:
        """Any answer, even a refusal, proves that a network is there."""
        import http.client
        import urllib.error

        try:
            self._get("/livez")
        except (urllib.error.HTTPError, ConnectionRefusedError):
            return True
        except urllib.error.URLError as error:
            return isinstance(error.reason, ConnectionRefusedError)
        except (OSError, http.client.HTTPException):
            return False
        return True

    def _get(self, path: str) -> bytes:
        import urllib.request  # 3 MiB that a device with a broker never needs

        identity = self._identity
        request = urllib.request.Request(identity.server + path)  # noqa: S310 - enrolled, http(s)
        credentials = basic(identity.broker_username, identity.broker_password)
        request.add_unredirected_header("Authorization", credentials)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=10.0) as answer:
            body: bytes = answer.read(MAX_MESSAGE_BYTES + 1)
            return body if answer.status == 200 else b""
