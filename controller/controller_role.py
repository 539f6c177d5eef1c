"""The controller process: one leader that runs the loop and watches Git; others stand by.

On SQLite a lock file in the state directory allows one controller, and the second one says so and
leaves. On PostgreSQL any number may run, on one machine or several, with the same keys: the lease
decides which of them leads (`controller.lease`). A leader that was overtaken stands by.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
import random
import socket
import sys
import threading
import time
from collections.abc import Iterator

import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from controller import ballast, notify, wake
from controller.broker_child import load_secret
from controller.broker_roles import service_password
from controller.fleetrepo import FleetRepo
from controller.forge import Forge, open_forge
from controller.gitwatch import GitWatch
from controller.keys import DirectorKey, recorder_key
from controller.lease import Lease, lowest
from controller.loop import Loop, Ports
from controller.orders import Issuer
from controller.recorder import Recorder
from controller.rollout.recovery import MOST
from controller.settings import Settings
from controller.statuses import Statuses
from controller.store import rollouts as store
from controller.store.lease import Fenced, writing_as
from telemetry import metrics
from telemetry.broker import Publisher
from telemetry.report import TelemetryReader

log = structlog.get_logger()


class AlreadyRunning(RuntimeError):
    """Another controller works on this state directory."""


def run(
    settings: Settings, engine: Engine, reader: TelemetryReader, stopping: threading.Event
) -> None:
    """Lead whenever it is our turn, until told to stop; raises AlreadyRunning on SQLite."""
    shared = engine.dialect.name != "sqlite"
    with _state_dir(settings, shared=shared) as alone:
        name = f"{socket.gethostname()}:{settings.state_dir}"
        lease = Lease(
            engine,
            holder=name[-180:] if alone else f"{name[-180:]}#{os.getpid()}",
            seconds=settings.lease,
            alone=alone,
        )
        while not stopping.is_set():
            term = lease.wait(stopping, _above_all_heard(reader))
            if term is None:
                return
            try:
                with lease.held(term):
                    _lead(settings, engine, reader, lease, term, stopping)
            except Fenced as error:
                log.warning("fenced", term=term, detail=str(error), next="standing by")


def _above_all_heard(reader: TelemetryReader) -> int:
    """Devices may know a higher term than a restored or wiped database does."""
    try:
        terms = [row.term for row in reader.devices_changed(0) if row.term <= MOST]
        heard = max(terms, default=0)
    except SQLAlchemyError as error:  # a rollback does not wait for telemetry
        log.warning("telemetry_unavailable", detail=str(error).splitlines()[0])
        heard = 0
    return lowest(heard, time.time())


def _forge(settings: Settings) -> Forge | None:
    """Where commit statuses go, if a forge is named."""
    if settings.forge is None:
        return None
    file = settings.forge_token_file
    return open_forge(settings.forge, file.read_text().strip() if file else None)


def _lead(
    settings: Settings,
    engine: Engine,
    reader: TelemetryReader,
    lease: Lease,
    term: int,
    stopping: threading.Event,
) -> None:
    ballast.lay(engine)
    # The loop hands Python's lock back at every row that it reads; whoever has it then (Git's
    # thread, the publisher's) shall not keep it for the default of 5 ms.
    sys.setswitchinterval(0.0005)
    with contextlib.ExitStack() as stack:
        bell = wake.Bell(settings.state_dir)
        stack.callback(bell.close)
        repo = FleetRepo(
            settings.repo,
            settings.branch,
            settings.path,
            settings.state_dir / "git",
            allowed_signers=settings.allowed_signers,
            signing_key=recorder_key(settings.state_dir / "keys" / "recorder"),
        )
        forge = _forge(settings)
        watch = GitWatch(
            engine,
            repo,
            Recorder(
                engine,
                repo,
                term=term,
                forge=forge,
                base=settings.branch,
                state_dir=settings.state_dir,
                anchor_every=settings.audit_anchor,
            ),
            url=settings.repo,
            branch=settings.branch,
            woken=lambda: wake.poke(settings.state_dir),
            release_signers=settings.release_signers,
            told=Statuses(engine, forge, settings.public_url).run_once if forge else lambda: 0,
            term=term,
        )
        watcher = threading.Thread(
            target=watch.run, args=(settings.poll_interval, random.random), name="git"
        )
        watcher.start()
        stack.callback(watcher.join, 15)
        stack.callback(watch.stop)
        told = notify.load(settings.notify) if settings.notify is not None else ()
        ending = threading.Event()
        for teller in notify.start(engine, told, settings.public_url, ending):
            stack.callback(teller.join, 12)
        stack.callback(ending.set)
        password = service_password(load_secret(settings.state_dir), "controller")
        # A session of this term's own: a leader that was overtaken must not cut its follower's.
        publisher = Publisher(
            settings.broker or "", "bw-controller", password, f"bw-controller-{term}"
        )
        publisher.start()
        stack.callback(publisher.stop)
        key = DirectorKey.load_or_create(settings.state_dir / "keys" / "director.pem")
        loop = Loop(
            Ports(engine=engine, reader=reader, heads=watch, broker=publisher, rung=bell.rung),
            Issuer(key=key, term=term, base_url=settings.public_url),
        )
        log.info("leading", term=term, repo=settings.repo)
        turns, litter = _Turns(loop, engine, publisher, lease, term), _Litter()
        rung = False
        while not stopping.is_set():
            turns.one(stopping)
            if not (loop.behind or rung):
                litter.collect()
            if rung:  # after the turn: Git's work must not stand in the way of a stop
                watch.wake()
            rung = bell.wait(0.0 if loop.behind else settings.tick_interval)


class _Turns:
    """The loop's outermost turn: what fails is logged, and tried again from the database."""

    def __init__(
        self, loop: Loop, engine: Engine, publisher: Publisher, lease: Lease, term: int
    ) -> None:
        self._loop, self._engine, self._publisher = loop, engine, publisher
        self._lease, self._term = lease, term
        self._sessions = 0

    def one(self, stopping: threading.Event) -> None:
        """Raises Fenced when another controller has taken over."""
        self._lease.turned()
        try:
            if self._publisher.connections != self._sessions:
                # A new session with the broker: it may have forgotten what it kept for devices.
                sessions = self._publisher.connections
                with writing_as(self._engine, self._term) as conn:
                    store.unpublish_all(conn)
                self._sessions = sessions
            with _timed():
                self._tick()
        except Fenced:
            raise
        except Exception:
            log.exception("tick")
            stopping.wait(1.0)

    def _tick(self) -> None:
        try:
            self._loop.tick(time.time())
        except OperationalError:
            if not self._loop.stopping:
                raise
            ballast.urgently(self._engine, lambda: self._loop.tick(time.time()))


class _Litter:
    """Collects what stands in cycles when nobody waits, and never looks at what stays.

    Left to itself, Python looks through every object of the fleet each few seconds: half a second
    at 40,000 devices, in the middle of anything. What survives a look here is not looked at again.
    """

    EVERY = 10.0  # seconds

    def __init__(self) -> None:
        self._next = 0.0
        gc.set_threshold(*gc.get_threshold()[:2], 1_000_000)  # the young ones alone, by itself

    def collect(self) -> None:
        if time.monotonic() >= self._next:
            gc.collect()
            gc.freeze()
            self._next = time.monotonic() + self.EVERY


@contextlib.contextmanager
def _timed() -> Iterator[None]:
    began, result = time.perf_counter(), "error"
    try:
        yield
        result = "ok"
    finally:
        metrics.count("bellwether_loop_ticks_total", result=result)
        metrics.observe("bellwether_loop_tick_seconds", time.perf_counter() - began)


@contextlib.contextmanager
def _state_dir(settings: Settings, *, shared: bool) -> Iterator[bool]:
    """Is this state directory ours alone? On SQLite it has to be: raises AlreadyRunning."""
    with (settings.state_dir / "controller.lock").open("a") as lock:
        deadline = time.monotonic() + 5
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if shared:
                    yield False
                    return
                if time.monotonic() > deadline:
                    raise AlreadyRunning(
                        f"another controller holds {settings.state_dir}/controller.lock: "
                        "stop it first"
                    ) from None
                time.sleep(0.2)
            else:
                yield True
                return
