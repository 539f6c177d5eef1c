"""Real parts for tests: Mosquitto and PostgreSQL as own children on free loopback ports.

Each is ended through its own process handle, so brokers and databases that others run on the
standard ports are never touched; every xdist worker has its own.
"""

from __future__ import annotations

import glob
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

START_SECONDS = 30.0


def free_port() -> int:
    """A loopback port that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _await_port(port: int, child: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + START_SECONDS
    while child.poll() is None and time.monotonic() < until:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.02)
        else:
            return
    raise RuntimeError(f"{child.args!r} does not listen on port {port}")


def _end(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    try:
        child.wait(10)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


@pytest.fixture
def mosquitto(tmp_path: Path) -> Iterator[str]:
    """The URL of an anonymous broker of this test's own."""
    port = free_port()
    config = tmp_path / "mosquitto.conf"
    config.write_text(
        f"listener {port} 127.0.0.1\nallow_anonymous true\npersistence false\n"
        "max_queued_messages 0\n"  # what it took it keeps: nobody here sends anything twice
    )
    binary = shutil.which("mosquitto") or "/usr/sbin/mosquitto"
    child = subprocess.Popen([binary, "-c", str(config)], stderr=subprocess.DEVNULL)
    try:
        _await_port(port, child)
        yield f"mqtt://127.0.0.1:{port}"
    finally:
        _end(child)


@pytest.fixture(scope="session")
def _postgres() -> Iterator[str]:
    """The URL, without a database, of this worker's own server."""
    found = sorted(glob.glob("/usr/lib/postgresql/*/bin"), key=lambda p: int(p.split("/")[4]))
    assert found, "PostgreSQL is not installed; scripts/test installs it"
    binaries = Path(found[-1])
    port, user = free_port(), None
    home = Path(tempfile.mkdtemp(prefix="bellwether-postgres-"))
    if os.getuid() == 0:  # PostgreSQL refuses to run as root
        user = "postgres"
        account = pwd.getpwnam(user)
        os.chown(home, account.pw_uid, account.pw_gid)
    data = home / "data"
    try:
        subprocess.run(
            [
                binaries / "initdb",
                "-D",
                data,
                "-U",
                "bellwether",
                "-A",
                "trust",
                "-E",
                "UTF8",
                "--no-sync",
                "--locale=C",
            ],
            check=True,
            user=user,
            group=user,
            extra_groups=[] if user else None,
            cwd=home,
            stdout=subprocess.DEVNULL,
        )
        child = subprocess.Popen(
            [
                binaries / "postgres",
                "-D",
                data,
                "-p",
                str(port),
                "-h",
                "127.0.0.1",
                "-k",
                home,
                "-c",
                "fsync=off",
            ],
            user=user,
            group=user,
            extra_groups=[] if user else None,
            cwd=home,
            stderr=subprocess.DEVNULL,
        )
        try:
            _await_port(port, child)
            yield f"postgresql+psycopg://bellwether@127.0.0.1:{port}"
        finally:
            child.send_signal(2)  # fast shutdown: does not wait for clients
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                _end(child)
    finally:
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def postgres_url(_postgres: str) -> str:
    """A fresh, empty database."""
    import psycopg

    name = f"test_{uuid4().hex}"
    server = _postgres.replace("+psycopg", "")
    until = time.monotonic() + START_SECONDS
    while True:
        try:
            with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
                connection.execute(f"CREATE DATABASE {name} TEMPLATE template0".encode())
            return f"{_postgres}/{name}"
        except psycopg.OperationalError:  # listens already, but is still starting up
            if time.monotonic() > until:
                raise
            time.sleep(0.05)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Both databases that we support, one after the other."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'test.db'}"
    return str(request.getfixturevalue("postgres_url"))
