"""A PostgreSQL server of a test's own, which may be killed and started again on its data."""

from __future__ import annotations

import glob
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import psycopg

START_SECONDS = 60.0


class Postgres:
    def __init__(self) -> None:
        found = sorted(glob.glob("/usr/lib/postgresql/*/bin"), key=lambda p: int(p.split("/")[4]))
        assert found, "PostgreSQL is not installed; scripts/test installs it"
        self._binaries = Path(found[-1])
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self._home = Path(tempfile.mkdtemp(prefix="bellwether-postgres-"))
        self._user = "postgres" if os.getuid() == 0 else None  # it refuses to run as root
        if self._user is not None:
            account = pwd.getpwnam(self._user)
            os.chown(self._home, account.pw_uid, account.pw_gid)
        words = ["-U", "bellwether", "-A", "trust", "-E", "UTF8", "--no-sync", "--locale=C"]
        subprocess.run(
            [self._binaries / "initdb", "-D", self._home / "data", *words],
            check=True, stdout=subprocess.DEVNULL, cwd=self._home, **self._as(),
        )  # fmt: skip
        self.start()
        with self.session() as session:
            session.execute("CREATE DATABASE fleet TEMPLATE template0")

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://bellwether@127.0.0.1:{self.port}/fleet"

    def start(self) -> None:
        options = ["-p", str(self.port), "-h", "127.0.0.1", "-k", self._home, "-c", "fsync=off"]
        self.child = subprocess.Popen(
            [self._binaries / "postgres", "-D", self._home / "data", *options],
            cwd=self._home, stderr=subprocess.DEVNULL, **self._as(),
        )  # fmt: skip
        until = time.monotonic() + START_SECONDS
        while True:
            try:
                self.session().close()
                return
            except psycopg.OperationalError:
                assert time.monotonic() < until, "PostgreSQL does not start"
                time.sleep(0.05)

    def session(self, database: str = "postgres") -> psycopg.Connection[tuple[object, ...]]:
        where = f"host=127.0.0.1 port={self.port} user=bellwether dbname={database}"
        return psycopg.connect(where, autocommit=True)

    def end(self, how: signal.Signals) -> None:
        """SIGINT: it cuts its clients off; SIGQUIT: it crashes, and recovers at its next start."""
        self.child.send_signal(how)
        self.child.wait(60)

    def terminate_sessions(self) -> int:
        """End every session of the fleet's database, whatever it was doing."""
        with self.session() as session:
            ended = session.execute(
                "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
                "WHERE pid <> pg_backend_pid() AND datname = 'fleet'"
            ).fetchone()
        assert ended is not None
        return int(str(ended[0]))

    def close(self) -> None:
        if self.child.poll() is None:
            self.end(signal.SIGINT)
        shutil.rmtree(self._home, ignore_errors=True)

    def _as(self) -> dict[str, object]:
        who = self._user
        return {"user": who, "group": who, "extra_groups": [] if who else None}
