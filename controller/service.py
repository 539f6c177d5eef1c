"""The composition root: the only file that knows every adapter.

`serve` runs one role in this process, or, for `all`, each role in a process of its own beside a
Mosquitto child: a slow page cannot hold up a rollback, a dead ingest cannot take the API with it.
A child that dies is started again with back-off; SIGTERM and SIGINT end all of them in order.
"""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import structlog
import uvicorn
from sqlalchemy import Engine, select
from sqlalchemy.exc import SQLAlchemyError

from controller import controller_role
from controller.broker_admin import BrokerAdmin
from controller.broker_child import BrokerChild, BrokerFailed, load_secret
from controller.broker_roles import device_password, service_password
from controller.controller_role import AlreadyRunning
from controller.devices import Registry
from controller.keys import DirectorKey
from controller.registry_copy import RegistryCopy
from controller.settings import Settings
from controller.store import devices as registry_rows
from controller.store.database import open_control
from controller.store.tables import devices
from telemetry.store.database import open_engine, reading
from telemetry.store.reports import Store
from telemetry.store.schema import NewerSchema
from telemetry.store.tables import create_schema

log = structlog.get_logger()

ROLES = ("ingest", "controller", "api")
RESTART_AFTER = (0.2, 0.5, 1.0, 2.0, 5.0)  # seconds before the n-th restart of one that gives up
PARENT = "BELLWETHER_PARENT"  # in the environment of a role: the process that watches it
ORPHAN_ENDS = 3.0  # seconds that an orphaned role has for an orderly end
LEFTOVERS_END = 10.0  # seconds until what was left behind has freed our port
KILLED_EARLY = 3.0  # seconds: who is killed after less may be the one who fills the memory
STEADY = 10.0  # a child that lived this long has recovered


# -- what every role shares -----------------------------------------------------------------------


def control_engine(settings: Settings) -> Engine:
    return open_control(settings.control_url)


def telemetry_store(settings: Settings, *, needed: bool = False) -> Store:
    """Telemetry, its schema made; a role that does not need it begins without, and tries later."""
    engine = open_engine(settings.telemetry_url)
    try:
        create_schema(engine)
    except SQLAlchemyError as error:
        if needed:
            raise
        log.error("telemetry_unavailable", detail=str(error).splitlines()[0])
    return Store(engine)


def broker_credentials(settings: Settings, service: str) -> tuple[str, str]:
    return f"bw-{service}", service_password(load_secret(settings.state_dir), service)


def director_key(settings: Settings) -> DirectorKey:
    return DirectorKey.load_or_create(settings.state_dir / "keys" / "director.pem")


# -- roles ----------------------------------------------------------------------------------------


def run_controller(settings: Settings, stopping: threading.Event) -> None:
    """The loop and the watcher of the fleet repository, when it is our turn."""
    controller_role.run(settings, control_engine(settings), telemetry_store(settings), stopping)


def run_ingest(settings: Settings, stopping: threading.Event) -> None:
    """Broker → checked → committed → acknowledged."""
    from telemetry import seat
    from telemetry.ingest_role import Role, own_process, run

    engine = control_engine(settings)
    username, password = broker_credentials(settings, "ingest")
    with seat.take(settings.state_dir) as own:
        role = Role(
            url=settings.broker or "",
            username=username,
            password=password,
            client_id=own.client_id,
            session_expiry=own.session_expiry,
            store=telemetry_store(settings, needed=True),
            registry=lambda: _statuses(engine),
            retention=settings.retention,
        )
        own_process()
        run(role, stopping)


def _statuses(engine: Engine) -> dict[str, str]:
    with reading(engine) as conn:
        return {row.id: row.status for row in conn.execute(select(devices.c.id, devices.c.status))}


def run_api(settings: Settings, stopping: threading.Event) -> None:
    """HTTP for people, devices and CI."""
    from controller.artifacts import ContentStore
    from controller.http.app import Deps, create_app

    engine, secret = control_engine(settings), load_secret(settings.state_dir)
    admin = BrokerAdmin(settings.broker or "", *broker_credentials(settings, "admin"))
    copy = RegistryCopy(engine, settings.state_dir)
    copy.open(time.time())
    registry = Registry(engine, admin, secret, changed=copy.catch_up)
    app = create_app(
        Deps(
            engine=engine,
            reader=telemetry_store(settings),
            registry=registry,
            content=ContentStore(settings.state_dir / "artifacts"),
            key=director_key(settings),
            settings=settings,
            clock=time.time,
        )
    )
    host, port = settings.address
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host=host,
            port=port,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=3,
        )
    )
    threading.Thread(target=_stop_server, args=(server, stopping), daemon=True).start()
    server.run()
    admin.close()


def _stop_server(server: uvicorn.Server, stopping: threading.Event) -> None:
    stopping.wait()
    server.should_exit = True


RUN: dict[str, Callable[[Settings, threading.Event], None]] = {
    "controller": run_controller,
    "ingest": run_ingest,
    "api": run_api,
}


# -- all roles, each in its process ---------------------------------------------------------------


def serve(settings: Settings) -> int:
    """Run the role until SIGTERM or SIGINT; the exit code."""
    stopping = threading.Event()
    _upon_signals(stopping.set)
    if (parent := os.environ.pop(PARENT, "")).isdigit():
        watch = threading.Thread(target=_end_with, args=(int(parent), stopping), daemon=True)
        watch.start()
    settings.state_dir.mkdir(parents=True, exist_ok=True)
    try:
        if settings.role == "all":
            return _all(settings, stopping)
        RUN[settings.role](settings, stopping)
    except (AlreadyRunning, NewerSchema) as error:
        print(f"bellwether: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


def _upon_signals(end: Callable[[], None]) -> None:
    """Calls `end` in a thread of its own when SIGTERM or SIGINT comes.

    A handler interrupts the main thread at any line. Had it to take a lock that this thread holds
    at that moment (an Event's, in `wait`), it would wait for ever; the queue has none.
    """
    told: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda got, _: told.put(got))

    def listen() -> None:
        while True:
            told.get()
            end()

    threading.Thread(target=listen, name="signals", daemon=True).start()


def _all(settings: Settings, stopping: threading.Event) -> int:
    engine = control_engine(settings)
    RegistryCopy(engine, settings.state_dir).open(time.time())
    telemetry_store(settings)
    director_key(settings)
    secret = load_secret(settings.state_dir)
    ours: BrokerChild | None = None
    with contextlib.ExitStack() as stack:
        if settings.broker is None:
            ours = BrokerChild(settings.state_dir)
            _start_broker(ours, _passwords(engine, secret), stopping)
            stack.callback(ours.stop)
            settings = settings.model_copy(update={"broker": ours.url})
            log.info("broker", url=ours.url)
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(_fresh(settings.state_dir / "metrics"))
        log.info("http", url=settings.public_url)
        children = [Child(role, settings) for role in ROLES]
        for child in children:
            child.start()
            stack.callback(child.stop)
        while not stopping.wait(0.2):
            for child in children:
                child.watch()
            if ours is not None and not ours.alive:
                _restart_broker(ours, _passwords(engine, secret))
    return 0


def _end_with(parent: int, stopping: threading.Event) -> None:
    """A role whose parent was killed makes room: the next parent starts one of its own."""
    while os.getppid() == parent:
        if stopping.wait(0.25):
            return
    log.warning("orphaned", parent=parent)
    stopping.set()
    time.sleep(ORPHAN_ENDS)
    os._exit(1)  # it hangs in something: what is committed is committed


def _fresh(directory: Path) -> Path:
    """An empty directory: counters begin with the service."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory


def _start_broker(
    broker: BrokerChild, accounts: list[tuple[str, str]], stopping: threading.Event
) -> None:
    """What a service before us left behind needs a moment to go; raises BrokerFailed."""
    until = time.monotonic() + LEFTOVERS_END
    while True:
        try:
            broker.start(accounts)
            return
        except BrokerFailed as error:
            if time.monotonic() > until:
                raise
            log.warning("broker", detail=str(error), again_in_seconds=0.5)
            if stopping.wait(0.5):
                raise


def _restart_broker(broker: BrokerChild, accounts: list[tuple[str, str]]) -> None:
    try:
        broker.watch(accounts)
        log.warning("broker_restarted", url=broker.url)
    except BrokerFailed as error:
        log.error("broker", detail=str(error))  # tried again at the next look
        time.sleep(1.0)


def _passwords(engine: Engine, secret: bytes) -> list[tuple[str, str]]:
    """What a broker needs to know again when it has forgotten."""
    with reading(engine) as conn:
        rows = registry_rows.accounts(conn)
        return [(row.id, device_password(secret, row.id, row.password_issue)) for row in rows]


class Child:
    """One role in its own process, started again when it dies."""

    def __init__(self, role: str, settings: Settings) -> None:
        self.role = role
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._failures = 0
        self._again_at = 0.0

    def start(self) -> None:
        environment = {**os.environ, **self._settings.environment(), "BELLWETHER_ROLE": self.role}
        environment[PARENT] = str(os.getpid())
        self._process = subprocess.Popen(
            [sys.executable, "-m", "controller.cli", "serve"], env=environment
        )
        self._started = time.monotonic()

    def watch(self) -> None:
        if self._process is not None and self._process.poll() is not None:
            lived = time.monotonic() - self._started
            # One that was killed has no fault that waiting would mend, unless it is killed at once.
            recovered = lived > STEADY or (self._process.returncode < 0 and lived > KILLED_EARLY)
            self._failures = 0 if recovered else self._failures + 1
            pause = RESTART_AFTER[min(self._failures, len(RESTART_AFTER) - 1)]
            log.warning(
                "died", role=self.role, code=self._process.returncode, again_in_seconds=pause
            )
            self._process, self._again_at = None, time.monotonic() + pause
        if self._process is None and time.monotonic() >= self._again_at:
            self.start()

    def stop(self) -> None:
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(5)
