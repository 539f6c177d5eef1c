"""The real parts a measurement needs, each an own child on a free loopback port: Mosquitto,
PostgreSQL, and `bellwether serve --role ingest`. All are ended through their own handles.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO
from uuid import uuid4

import psycopg
from sqlalchemy import Engine, NullPool, create_engine
from sqlalchemy.engine import make_url

from controller.service import PARENT
from controller.store import devices as registry
from controller.store.database import open_control
from telemetry.store.database import open_engine, reading, writing
from telemetry.store.reports import Store
from telemetry.store.tables import create_schema

PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin:/opt/homebrew/sbin"
_PATIENCE = 60.0


class Missing(RuntimeError):
    """A program that the measurement needs is not installed; the message names its package."""


def program(name: str, package: str) -> str:
    found = shutil.which(name, path=PATH)
    if found is None:
        raise Missing(f"{name} is missing: install the package `{package}` (scripts/test does)")
    return found


def until(true: Callable[[], object], what: str, seconds: float = _PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(0.02)


@contextlib.contextmanager
def broker(root: Path) -> Iterator[int]:
    """The port of a Mosquitto as its package ships it, but for queues that drop nothing."""
    port = free_port()
    root.mkdir(parents=True, exist_ok=True)
    config = root / "mosquitto.conf"
    user = "user root\n" if os.geteuid() == 0 else ""
    config.write_text(
        f"{user}listener {port} 127.0.0.1\nallow_anonymous true\npersistence false\n"
        "max_queued_messages 0\nmax_inflight_messages 0\n"
    )
    binary = program("mosquitto", "mosquitto")
    with _child([binary, "-c", str(config)], stderr=subprocess.DEVNULL) as child:
        _listening(port, child)
        yield port


@contextlib.contextmanager
def postgres(root: Path) -> Iterator[str]:
    """The URL of an empty database on a server with default settings, fsync included."""
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: float(p.parts[4]))
    initdb = shutil.which("initdb", path=f"{PATH}:{places[-1] if places else ''}")
    if initdb is None:
        raise Missing("initdb is missing: install the package `postgresql` (scripts/test does)")
    binaries, port, home = Path(initdb).resolve().parent, free_port(), root / "postgres"
    home.mkdir(parents=True)
    user = None
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        user = "postgres"
        account = pwd.getpwnam(user)
        os.chown(home, account.pw_uid, account.pw_gid)
        for folder in (root, root.parent):
            folder.chmod(folder.stat().st_mode | 0o011)  # its user must be able to reach it
    words = ["-D", str(home / "data"), "-U", "bellwether", "-A", "trust", "-E", "UTF8"]
    _as(user, [str(binaries / "initdb"), *words, "--no-sync", "--locale=C"], home)
    server = [str(binaries / "postgres"), "-D", str(home / "data"), "-p", str(port)]
    server += ["-h", "127.0.0.1", "-k", str(home)]
    own = {"user": user, "group": user, "extra_groups": []} if user else {}
    with _child(server, end=signal.SIGINT, cwd=home, stderr=subprocess.DEVNULL, **own) as child:
        _listening(port, child)
        url = f"host=127.0.0.1 port={port} user=bellwether dbname=postgres"
        until(lambda: _answers(url), "PostgreSQL")
        yield f"postgresql+psycopg://bellwether@127.0.0.1:{port}/postgres"


@contextlib.contextmanager
def database(server: str | None) -> Iterator[str | None]:
    """A new database on that server, dropped afterwards: what is there already is not touched.

    None stays None: SQLite files are new anyway.
    """
    if server is None:
        yield None
        return
    name = f"bellwether_bench_{uuid4().hex[:12]}"
    engine = create_engine(server, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    try:
        yield make_url(server).set(database=name).render_as_string(hide_password=False)
    finally:
        with engine.connect() as connection:
            connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")


def plant(state_dir: Path, database: str | None, devices: Sequence[str]) -> Engine:
    """A registry of active devices; the engine of the telemetry database that goes with it."""
    state_dir.mkdir(parents=True, exist_ok=True)
    control = open_control(database or f"sqlite:///{state_dir / 'control.db'}")
    now = time.time()
    row = {"fleet": "bench", "labels": {}, "status": "active", "created_at": now}
    with writing(control) as conn:
        numbers = registry.next_changes(conn, len(devices))
        registry.add(
            conn,
            [
                {"id": device, "enrolled_at": now, "change": number, **row}
                for device, number in zip(devices, numbers, strict=True)
            ],
        )
    control.dispose()
    engine = open_engine(database or f"sqlite:///{state_dir / 'telemetry.db'}")
    create_schema(engine)
    return engine


@contextlib.contextmanager
def ingest(
    state_dir: Path, port: int, database: str | None, engine: Engine
) -> Iterator[subprocess.Popen[bytes]]:
    """A real ingest process that hears already: its own probe came through broker and store."""
    words = [sys.executable, "-m", "controller.cli", "serve", "--role", "ingest"]
    words += ["--state-dir", str(state_dir), "--broker", f"mqtt://127.0.0.1:{port}"]
    words += ["--database", database] if database else []
    before = _watermark(engine)
    with open(state_dir / "ingest.log", "ab") as file, _role(words, file) as child:

        def hears() -> bool:
            if child.poll() is not None:
                raise RuntimeError((state_dir / "ingest.log").read_text()[-2000:])
            return _watermark(engine) > before

        until(hears, "the ingest process")
        yield child


@contextlib.contextmanager
def role(
    name: str, state_dir: Path, port: int, *, repo: str = "", listen: str = ""
) -> Iterator[subprocess.Popen[bytes]]:
    """A real process of this role, on SQLite; its words are in `<role>.log` beside its state."""
    words = [sys.executable, "-m", "controller.cli", "serve", "--role", name]
    words += ["--state-dir", str(state_dir), "--broker", f"mqtt://127.0.0.1:{port}"]
    words += [word for pair in (("--repo", repo), ("--listen", listen)) if pair[1] for word in pair]
    with open(state_dir / f"{name}.log", "ab") as file, _role(words, file) as child:
        yield child


def _watermark(engine: Engine) -> int:
    return Store(engine).watermark()


def rows(engine: Engine, query: str) -> list[tuple[object, ...]]:
    with reading(engine) as connection:
        return [tuple(row) for row in connection.exec_driver_sql(query)]


def _role(
    words: Sequence[str], log: IO[bytes]
) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
    """It ends by itself, too, when we are killed."""
    return _child(words, stderr=log, env={**os.environ, PARENT: str(os.getpid())})


@contextlib.contextmanager
def _child(
    words: Sequence[str], *, end: signal.Signals = signal.SIGTERM, **more: object
) -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen(words, stdout=subprocess.DEVNULL, **more)  # type: ignore[call-overload]
    try:
        yield child
    finally:
        child.send_signal(end)
        try:
            child.wait(20)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _answers(address: str) -> bool:
    with contextlib.suppress(psycopg.OperationalError):  # listens already, but is starting up
        psycopg.connect(address).close()
        return True
    return False


def _as(user: str | None, words: Sequence[str], cwd: Path) -> None:
    own: dict[str, object] = {"user": user, "group": user, "extra_groups": []} if user else {}
    subprocess.run(words, check=True, cwd=cwd, stdout=subprocess.DEVNULL, **own)  # type: ignore[call-overload]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _listening(port: int, child: subprocess.Popen[bytes]) -> None:
    def connected() -> bool:
        if child.poll() is not None:
            raise RuntimeError(f"{child.args!r} ended with {child.returncode}")
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), 1.0).close()
            return True
        return False

    until(connected, str(child.args))
