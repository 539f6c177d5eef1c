"""`bellwether-agent run` as a process: a real broker, a real HTTP server, real slots."""

from __future__ import annotations

import io
import json
import queue
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from paho.mqtt import client as mqtt

from controller.keys import DirectorKey
from device_agent.agent import Identity
from device_agent.download import basic
from device_agent.machine import hash_file
from device_agent.protocol import (
    Ack,
    ComponentOrder,
    Desired,
    Kind,
    Reported,
    State,
    decode,
    encode,
    timestamp,
)

KEY = DirectorKey(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
PATIENCE = 30.0
MOSQUITTO = shutil.which("mosquitto") or "/usr/sbin/mosquitto"

AGENT_MAY_IMPORT = {
    "paho",
    "psutil",
    "cryptography",
    "device_agent",
    "_cffi_backend",
    "_openssl",
    "_psutil_linux",
}


def test_the_agent_imports_the_standard_library_and_three_packages() -> None:
    script = (
        "import sys, json; before = set(sys.modules); import device_agent.__main__; "
        "print(json.dumps(sorted({n.partition('.')[0] for n in set(sys.modules) - before})))"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    foreign = set(json.loads(said.stdout)) - set(sys.stdlib_module_names) - AGENT_MAY_IMPORT
    assert foreign == set()


WATCHED = """
import atexit, json, sys
atexit.register(lambda: print(json.dumps(sorted(sys.modules)), flush=True))
from device_agent.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
ONLY_WHEN_NEEDED = {
    *("asyncio", "cryptography", "email", "http.client", "psutil", "random", "shutil", "ssl"),
    *("subprocess", "tarfile", "tempfile"),
}


def test_a_device_that_only_reports_loads_neither_http_nor_cryptography(
    tmp_path: Path, broker: int, web: Any
) -> None:
    modules = _modules_after(tmp_path, broker, web, order=None)
    assert modules & ONLY_WHEN_NEEDED == (set() if sys.platform == "linux" else {"psutil"})


def test_a_device_that_installed_a_release_loaded_three_packages_at_most(
    tmp_path: Path, broker: int, web: Any
) -> None:
    modules = _modules_after(tmp_path, broker, web, order=_order(tmp_path, web))
    assert {"cryptography", "http.client"} <= modules
    tops = {name.partition(".")[0] for name in modules} - {"__main__"}
    foreign = tops - set(sys.stdlib_module_names) - AGENT_MAY_IMPORT
    # What the virtual environment itself loads at every start is not the agent's.
    environments = ("_editable", "__editable", "_distutils_hack")
    assert {name for name in foreign if not name.startswith(environments)} == set()


def _modules_after(tmp_path: Path, broker: int, web: Any, order: bytes | None) -> set[str]:
    """What an agent has loaded when it was told to end: after its first words, or its update."""
    directory, reports, server = tmp_path / "car", queue.Queue[Reported](), _Controller(broker)
    _enrolled(directory, broker, web.port)
    server.start(reports)
    if order is not None:
        server.client.publish("bw/v1/car-1/desired", order, qos=1, retain=True)
    words = [sys.executable, "-c", WATCHED, "run", "--dir", str(directory)]
    words += ["--trial-soak", "0.2", "--health-interval", "0.2"]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as agent:
        _until(reports, State.COMMITTED if order is not None else State.IDLE)
        time.sleep(1.0 if order is None else 0.0)  # and some samples
        agent.send_signal(signal.SIGTERM)
        said, _ = agent.communicate(timeout=PATIENCE)
    server.stop()
    return set(json.loads(said))


def test_status_of_a_stranger_says_what_to_do(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "device_agent", "status", "--dir", str(tmp_path)]
    said = subprocess.run(command, capture_output=True, check=False)
    assert said.returncode == 1
    assert b"enrol" in said.stderr


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    conf = tmp_path / "mosquitto.conf"
    conf.write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\npersistence false\n")
    child = subprocess.Popen([MOSQUITTO, "-c", str(conf)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        threading.Event().wait(0.02)
    yield port
    child.terminate()
    child.wait(10)


class _Handler(BaseHTTPRequestHandler):
    bundle = b""
    desired = b""
    authorized: list[str | None]

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.authorized.append(self.headers.get("Authorization"))
        body = self.bundle if self.path.startswith("/artifacts") else self.desired
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def web() -> Iterator[type[_Handler]]:
    class Handler(_Handler):
        authorized: list[str | None] = []  # noqa: RUF012
        port = 0

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Handler.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield Handler
    server.shutdown()
    server.server_close()
    thread.join()


def test_an_order_over_mqtt_is_committed_and_sigterm_ends_in_order(
    tmp_path: Path, broker: int, web: Any
) -> None:
    directory, reports, server = tmp_path / "car", queue.Queue[Reported](), _Controller(broker)
    _enrolled(directory, broker, web.port)
    server.start(reports)
    server.client.publish("bw/v1/car-1/desired", _order(tmp_path, web), qos=1, retain=True)
    agent = _agent("run", "--dir", str(directory), "--trial-soak", "0.2")
    try:
        report = _until(reports, State.COMMITTED)
    finally:
        agent.send_signal(signal.SIGTERM)
    assert agent.wait(PATIENCE) == 0
    server.stop()
    assert report.components["app"].committed
    assert [e.event for e in report.history] == ["activated"]
    assert (directory / "components/app/current/version").read_text() == "1"
    assert web.authorized == [basic("car-1", "secret")]


def _until(reports: queue.Queue[Reported], state: State) -> Reported:
    seen = []
    while True:
        report = reports.get(timeout=PATIENCE)
        seen.append((report.state, report.reason, report.log))
        if report.state is state:
            return report
        assert report.state not in (State.FAILED, State.REJECTED, State.ROLLED_BACK), seen


class _Controller:
    """Acknowledges what the device reports, as the ingest does."""

    def __init__(self, port: int) -> None:
        self.client: Any = mqtt.Client(
            mqtt.CallbackAPIVersion.VERSION2,  # type: ignore[attr-defined,unused-ignore]
            protocol=mqtt.MQTTv5,
        )
        self._port = port

    def start(self, reports: queue.Queue[Reported]) -> None:
        ready = threading.Event()

        def arrived(client: Any, _: Any, message: Any) -> None:
            report = decode(Reported, message.payload)
            ack = Ack(boot=report.boot, ranges=((report.seq, report.seq),), nonce=report.nonce)
            client.publish("bw/v1/car-1/ack", encode(ack))
            reports.put(report)

        self.client.on_message = arrived
        self.client.on_subscribe = lambda *_: ready.set()
        self.client.connect("127.0.0.1", self._port)
        self.client.loop_start()
        self.client.subscribe("bw/v1/+/reported", 1)
        assert ready.wait(PATIENCE)

    def stop(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


def _enrolled(directory: Path, broker: int, web: int) -> None:
    directory.mkdir()
    identity = Identity(
        device="car-1",
        keys=(KEY.public_hex,),
        server=f"http://127.0.0.1:{web}",
        broker_url=f"mqtt://127.0.0.1:{broker}",
        broker_username="car-1",
        broker_password="secret",
    )
    (directory / "identity.json").write_text(identity.to_json())


def _order(tmp_path: Path, web: Any) -> bytes:
    path = tmp_path / "bundle.tar"
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("version")
        info.size = 1
        archive.addfile(info, io.BytesIO(b"1"))
    web.bundle = path.read_bytes()
    url = f"http://127.0.0.1:{web.port}/artifacts/x"
    told = ComponentOrder(release="one", digest=hash_file(path), size=len(web.bundle), urls=(url,))
    now = datetime.now(UTC)
    return KEY.sign(
        Desired(
            device="car-1",
            term=1,
            generation=1,
            attempt="try-1",
            kind=Kind.INSTALL,
            components={"app": told},
            issued_at=timestamp(now),
            not_after=timestamp(now + timedelta(hours=1)),
        )
    )


def _agent(*words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "device_agent", *words])


def test_enrolment_pins_the_keys_and_keeps_them_private(tmp_path: Path, web: Any) -> None:
    answer = {
        "device": "car-1",
        "fleet": "cars",
        "broker": {"url": "mqtt://127.0.0.1:1", "username": "car-1", "password": "secret"},
        "keys": [{"keyid": KEY.keyid, "public": KEY.public_hex}],
        "server": f"http://127.0.0.1:{web.port}",
    }
    web.desired = json.dumps(answer).encode()
    web.do_POST = web.do_GET
    words = ("enrol", "--server", answer["server"], "--token", "t", "--dir", str(tmp_path / "car"))
    assert _agent(*map(str, words)).wait(PATIENCE) == 0
    path = tmp_path / "car/identity.json"
    assert path.stat().st_mode & 0o777 == 0o600
    assert Identity.load(path).keys == (KEY.public_hex,)
    assert _agent(*map(str, words)).wait(PATIENCE) == 1  # never enrolled over
