"""Broken networks between our parts: nothing is lost, nothing counts twice, all goes on by itself.

Random moments; the seed is printed with a failure and plays again by BELLWETHER_FAULT_SEED.
"""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import paho.mqtt.client as mqtt
import pytest
from sqlalchemy import Engine, text
from sqlalchemy.engine import make_url

from controller.store import lease
from controller.store.database import open_control
from telemetry.broker import Publisher
from telemetry.ingest import Limits
from telemetry.ingest_role import Role
from telemetry.ingest_role import run as run_ingest
from telemetry.store.database import open_engine, reading
from telemetry.store.reports import Store
from telemetry.store.tables import create_schema

from .conftest import Processes, eventually
from .proxy import FAULTS, Proxy, moments, seed

pytestmark = pytest.mark.timeout(1_800)  # of the long ones: half a second to four a round

DIGEST = "sha256:" + "a" * 64
PATIENCE = 60.0
ROUNDS = 10


@pytest.fixture(params=[ROUNDS, pytest.param(30 * ROUNDS, marks=pytest.mark.long)])
def rounds(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def broken_broker(mosquitto: str) -> Iterator[Proxy]:
    target = urlsplit(mosquitto)
    proxy = Proxy(target.hostname or "", target.port or 0)
    yield proxy
    proxy.close()


def play(proxy: Proxy, number: int, rounds: int) -> None:
    for fault, lasts, well in moments(number, rounds):
        proxy.become(fault)
        time.sleep(lasts)
        proxy.become("pass")
        time.sleep(well)


@pytest.fixture
def telemetry(tmp_path: Path) -> Iterator[Engine]:
    engine = open_engine(f"sqlite:///{tmp_path}/telemetry.db")
    create_schema(engine)
    yield engine
    engine.dispose()


class Device:
    """Publishes numbered health, QoS 1, until told to stop; knows what the broker has taken."""

    def __init__(self, url: str, name: str) -> None:
        self.name, self.sent = name, 0
        self._ended = threading.Event()
        self._client = mqtt.Client(
            mqtt.CallbackAPIVersion.VERSION2, client_id=name, protocol=mqtt.MQTTv5
        )
        address = urlsplit(url)
        self._client.connect(address.hostname or "", address.port or 0)
        self._client.loop_start()
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def _work(self) -> None:
        while not self._ended.wait(0.005):
            self.sent += 1
            message = {
                "v": 1, "boot": "b1", "bootCount": 1, "seq": self.sent,
                "components": {"app": DIGEST}, "t0": time.time() - 1, "dt": 1,
                "counters": {"event": 1}, "exposure": {"device_hour": 1},
            }  # fmt: skip
            done = self._client.publish(
                f"bw/v1/{self.name}/health", json.dumps(message).encode(), qos=1
            )
            done.wait_for_publish(PATIENCE)

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()
        self._client.disconnect()
        self._client.loop_stop()


def test_ingest_behind_a_broken_network_counts_each_message_once(
    mosquitto: str, broken_broker: Proxy, telemetry: Engine, rounds: int
) -> None:
    number = seed()
    stopping = threading.Event()
    role = Role(
        url=f"mqtt://127.0.0.1:{broken_broker.port}",
        store=Store(telemetry),
        registry=lambda: {"car-1": "active", "car-2": "active"},
        limits=Limits(per_second=1e6, burst=1e9),
    )
    ingest = threading.Thread(target=run_ingest, args=(role, stopping))
    ingest.start()
    try:
        eventually(lambda: broken_broker.passed > 100, PATIENCE, "ingest is connected")
        time.sleep(0.5)  # and subscribed
        devices = [Device(mosquitto, name) for name in ("car-1", "car-2")]
        play(broken_broker, number, rounds)
        for device in devices:
            device.stop()
        expected = sorted((d.name, n) for d in devices for n in range(1, d.sent + 1))

        def counted() -> list[tuple[str, int]]:
            rows = Store(telemetry).health_since(0, limit=10_000_000)
            return sorted((row.device, row.seq) for row in rows)

        eventually(lambda: counted() == expected, PATIENCE, f"{len(expected)} messages, each once")
    finally:
        stopping.set()
        ingest.join()


def test_orders_behind_a_broken_network_reach_the_broker(
    mosquitto: str, broken_broker: Proxy, rounds: int
) -> None:
    """What `publish` says was taken is there; what it says was not is sent again by the outbox."""
    number = seed()
    heard: dict[str, bytes] = {}
    target = urlsplit(mosquitto)
    watcher = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)
    watcher.on_message = lambda _c, _u, message: heard.update({message.topic: message.payload})
    watcher.connect(target.hostname or "", target.port or 0)
    watcher.subscribe("bw/v1/+/desired", qos=1)
    watcher.loop_start()
    publisher = Publisher(f"mqtt://127.0.0.1:{broken_broker.port}", None, None, "bw-controller")
    publisher.start()
    chaos = threading.Thread(target=play, args=(broken_broker, number, rounds))
    topics = [f"bw/v1/car-{n}/desired" for n in range(300)]
    said: dict[str, int] = {}  # topic → its newest turn that was taken

    def send(turn: int) -> None:
        taken = publisher.publish([(topic, f"{turn}".encode()) for topic in topics], timeout=2.0)
        said.update({topic: turn for topic, ok in zip(topics, taken, strict=True) if ok})

    try:
        eventually(lambda: send(0) or said, PATIENCE, "something is taken before anything breaks")
        chaos.start()
        turn = 0
        while chaos.is_alive():
            turn += 1
            send(turn)
        eventually(
            lambda: all(int(heard.get(topic, -1)) >= turn for topic, turn in said.items()),
            PATIENCE,
            "what was said to be taken is there, or a newer one",
        )
        last = [(topic, b"last") for topic in topics]
        eventually(lambda: all(publisher.publish(last)), PATIENCE, "all are taken in the end")
        eventually(
            lambda: heard == dict(last), PATIENCE, "the newest order of each device is the last"
        )
    finally:
        if chaos.is_alive():
            chaos.join()
        publisher.stop()
        watcher.disconnect()
        watcher.loop_stop()


def terminate_all(url: str) -> None:
    """The server ends every session but this one, whatever it was doing; several times."""
    engine = open_engine(url)
    others = text(
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
        "WHERE pid <> pg_backend_pid() AND datname = current_database()"
    )
    for _ in range(5):
        with engine.connect() as conn:
            conn.execute(others)
        time.sleep(0.3)
    engine.dispose()


@pytest.mark.parametrize("fault", [*FAULTS, "terminate"])
def test_a_controller_whose_database_is_cut_off_goes_on_by_itself(
    processes: Processes, postgres_url: str, mosquitto: str, tmp_path: Path, fault: str
) -> None:
    bare, clone = tmp_path / "fleet.git", tmp_path / "fleet"
    for words in (
        ["init", "-q", "--bare", "--initial-branch=main", str(bare)],
        ["clone", "-q", str(bare), str(clone)],
        ["-C", str(clone), "checkout", "-q", "-B", "main"],
        ["-C", str(clone), "-c", "user.name=a", "-c", "user.email=a@b.invalid",
         "commit", "-q", "--allow-empty", "-m", "Begin"],
        ["-C", str(clone), "push", "-q", "origin", "main"],
    ):  # fmt: skip
        subprocess.run(["git", *words], check=True, capture_output=True)
    engine = open_control(postgres_url)
    server = make_url(postgres_url)
    proxy = Proxy(server.host or "", server.port or 0)
    broken = server.set(host="127.0.0.1", port=proxy.port).render_as_string(hide_password=False)
    ours = processes.start(
        "controller", "serve", "--role", "controller", "--repo", str(bare), "--database", broken,
        "--broker", mosquitto, "--state-dir", str(tmp_path), "--poll-interval", "0.2",
        "--tick-interval", "0.1", BELLWETHER_LEASE="5",
    )  # fmt: skip

    def checked() -> float:
        with reading(engine) as conn:
            found = conn.execute(text("SELECT value ->> 'checked_at' FROM meta WHERE key = 'git'"))
            return float(found.scalar() or 0)

    def term() -> int:
        with reading(engine) as conn:
            return lease.look(conn).term

    try:
        eventually(checked, PATIENCE, "it works")
        before = term()
        if fault == "terminate":
            terminate_all(postgres_url)
        else:
            proxy.become(fault)
            time.sleep(1.5)
            proxy.become("pass")
        since = time.time()
        eventually(lambda: checked() > since, PATIENCE, "it works again")
        assert ours.child.poll() is None  # the same process,
        assert term() == before  # which nobody had to follow
    finally:
        ours.child.terminate()
        ours.child.wait(20)
        proxy.close()
        engine.dispose()
