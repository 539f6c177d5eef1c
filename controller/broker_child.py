"""Runs a Mosquitto of our own on one loopback port, as an unprivileged user, and ends it.

It decides nothing about rights (`broker_roles` does). The traps it avoids, each measured:

1. `per_listener_settings` with an auth option above the first listener opens 0.0.0.0:1883: the
   option is never used, and the test looks at the listening sockets.
2. The default queue keeps 1,000 messages and drops the rest after PUBACK: 100,000 here.
3. Autosave after 1,800 s: 10 s here. A crash may still lose a little: the broker is a cache.
4. SIGHUP can crash it: never sent. It is ended by SIGTERM, by its process id.
5. Started as root it drops to a user who cannot reach a 0700 directory: as root we give it a
   directory that this user owns, and start it as that user at once.
6. The port is kept in the state directory, because enrolled devices know it.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

import psutil

from controller import broker_roles
from controller.broker_roles import ADMIN, CONTROLLER, INGEST

_PLUGINS = (
    "/usr/lib/x86_64-linux-gnu/mosquitto_dynamic_security.so",
    "/usr/lib/aarch64-linux-gnu/mosquitto_dynamic_security.so",
    "/usr/lib/mosquitto_dynamic_security.so",
    "/usr/lib64/mosquitto_dynamic_security.so",
    "/opt/homebrew/lib/mosquitto_dynamic_security.so",
    "/usr/local/lib/mosquitto_dynamic_security.so",
)
_START_SECONDS = 15.0
_STOP_SECONDS = 10.0


class BrokerFailed(RuntimeError):
    """The broker could not be started; the message says what to do."""


def load_secret(state_dir: Path) -> bytes:
    """The secret that broker passwords are derived from; made once, readable by us alone."""
    path = state_dir / "broker.secret"
    state_dir.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        fresh = path.with_name(f".broker.secret.{os.getpid()}")
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(secrets.token_hex(32).encode())
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(fresh, path)  # of two processes that begin at once, the first one wins
        fresh.unlink()
    return bytes.fromhex(path.read_text().strip())


class BrokerChild:
    """One Mosquitto process. `start()`, `stop()`, `url`, `alive`; port 0 chooses a free one."""

    def __init__(self, state_dir: Path, port: int = 0) -> None:
        self._state_dir = Path(state_dir)
        self._wanted_port = port
        self.port = 0
        self.secret = load_secret(self._state_dir)
        self._user = _unprivileged_user()
        self.directory = _directory(self._state_dir, self._user)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"mqtt://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def credentials(self, service: str) -> tuple[str, str]:
        """(username, password) of a service: CONTROLLER, INGEST or ADMIN."""
        return service, broker_roles.service_password(self.secret, service)

    def start(self, devices: Iterable[tuple[str, str]] | None = None) -> None:
        """Start and wait until it listens. With `devices`, exactly these may connect."""
        binary = shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
        plugin = next((path for path in _PLUGINS if Path(path).exists()), None)
        if binary is None or plugin is None:
            raise BrokerFailed(
                "mosquitto with its dynamic-security plugin is missing: install the package "
                "`mosquitto` (2.0 or newer), or name a broker with --broker URL"
            )
        self.stop()  # started again after it died: its end is taken note of
        self._end_orphan()
        self.port = self._choose_port()
        self._write_rights(devices)
        self._write("mosquitto.conf", self._configuration(plugin))
        with open(self._state_dir / "broker.log", "ab") as log:
            self._process = subprocess.Popen(
                [binary, "-c", str(self.directory / "mosquitto.conf")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.directory,
                start_new_session=True,  # a Ctrl-C at the terminal is ours to handle, in order
                user=self._user.pw_uid if self._user else None,
                group=self._user.pw_gid if self._user else None,
                extra_groups=[] if self._user else None,
            )
        (self._state_dir / "broker.port").write_text(str(self.port))
        self._wait_until_listening()

    def watch(self, devices: Iterable[tuple[str, str]] | None = None) -> bool:
        """Start it again when it died; True when that was so."""
        if self.alive:
            return False
        self.start(devices)
        return True

    def stop(self) -> None:
        """SIGTERM (it saves its sessions), then SIGKILL after a while; harmless when it is gone."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def __enter__(self) -> BrokerChild:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _configuration(self, plugin: str) -> str:
        lines = [
            "per_listener_settings false",
            "allow_anonymous false",
            f"plugin {plugin}",
            f"plugin_opt_config_file {self.directory / 'dynamic-security.json'}",
            f"listener {self.port} 127.0.0.1",
            "max_queued_messages 100000",
            "max_inflight_messages 1000",
            "max_packet_size 262144",
            "set_tcp_nodelay true",
            "persistence true",
            f"persistence_location {self.directory}/",
            "autosave_interval 10",
            "persistent_client_expiration 60d",
            "log_dest stderr",
            "log_type error",
            "log_type warning",
            "log_type notice",
            "connection_messages false",
        ]
        if self._user is None and os.geteuid() == 0:
            lines.append("user root")
        return "\n".join(lines) + "\n"

    def _write_rights(self, devices: Iterable[tuple[str, str]] | None) -> None:
        services = dict(self.credentials(name) for name in (ADMIN, CONTROLLER, INGEST))
        if devices is not None:
            rights = broker_roles.document(services, devices)
        else:
            rights = broker_roles.merge_services(self._read_rights(), services)
        self._write("dynamic-security.json", json.dumps(rights))

    def _read_rights(self) -> dict[str, object]:
        # A broker that lost or spoilt its file forgot its devices: `BrokerAdmin.sync` refills it.
        try:
            found = json.loads((self.directory / "dynamic-security.json").read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _write(self, name: str, text: str) -> None:
        fresh = self.directory / f".{name}.new"
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(text)
            if self._user is not None:
                os.fchown(file.fileno(), self._user.pw_uid, self._user.pw_gid)
        os.replace(fresh, self.directory / name)

    def _choose_port(self) -> int:
        kept = self._state_dir / "broker.port"
        port = self._wanted_port
        if not port and kept.exists() and kept.read_text().strip().isdigit():
            port = int(kept.read_text())
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                raise BrokerFailed(
                    f"127.0.0.1:{port} is taken ({error.strerror}), and enrolled devices know this "
                    f"port: end what listens there, or delete {kept} and enrol them again"
                ) from None
            return int(probe.getsockname()[1])

    def _end_orphan(self) -> None:
        """End the broker of a controller that was killed: it holds our port and our files.

        Found by its configuration: who was killed may not have noted its process id.
        """
        configuration = str(self.directory / "mosquitto.conf")
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if configuration not in words or "mosquitto" not in words[0]:
                continue
            with contextlib.suppress(psutil.Error):
                process.terminate()
                try:
                    process.wait(_STOP_SECONDS)
                except psutil.TimeoutExpired:
                    process.kill()
                    process.wait(_STOP_SECONDS)

    def _wait_until_listening(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            if not self.alive:
                break
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port), 1.0).close()
                return
            time.sleep(0.01)
        self.stop()
        log = (self._state_dir / "broker.log").read_text(errors="replace")
        last = log.strip().splitlines()[-1:] or ["it said nothing"]
        raise BrokerFailed(f"mosquitto did not start: {last[0]}; see {self._state_dir}/broker.log")


def _unprivileged_user() -> pwd.struct_passwd | None:
    """Whom the broker runs as when we are root; None: as ourselves."""
    if os.geteuid() != 0:
        return None
    for name in ("mosquitto", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    return None


def _directory(state_dir: Path, user: pwd.struct_passwd | None) -> Path:
    """A directory that the broker's user owns and can reach."""
    home = state_dir.resolve() / "broker"
    if user is None or _reachable(state_dir.resolve()):
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
    else:
        # The state directory is closed to others, as it should be: the cache lives beside it.
        name = sha256(str(home).encode()).hexdigest()[:16]
        home = Path(tempfile.gettempdir()).resolve() / f"bellwether-broker-{name}"
        with contextlib.suppress(FileExistsError):
            home.mkdir(mode=0o700)
        found = home.lstat()
        if home.is_symlink() or found.st_uid not in (0, user.pw_uid):
            raise BrokerFailed(f"{home} belongs to somebody else: remove it")
    if user is not None:
        os.chown(home, user.pw_uid, user.pw_gid, follow_symlinks=False)
    return home


def _reachable(path: Path) -> bool:
    return all(entry.stat().st_mode & 0o001 for entry in (path, *path.parents))
