"""The broker child and its rights, on a real Mosquitto."""

from __future__ import annotations

import os
import queue
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import paho.mqtt.client as mqtt
import psutil
import pytest
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.subscribeoptions import SubscribeOptions

from controller.broker_admin import (
    ADMIN,
    CONTROLLER,
    INGEST,
    BrokerAdmin,
    BrokerChild,
    BrokerFailed,
    BrokerUnavailable,
    device_password,
)

WAIT = 10


class Client:
    """One MQTT 5 session that notes what the broker answers."""

    def __init__(self, broker: BrokerChild, name: str, password: str, client_id: str = "") -> None:
        self.codes: queue.Queue[str] = queue.Queue()
        self.subscribed: queue.Queue[bool] = queue.Queue()
        self.published: queue.Queue[bool] = queue.Queue()
        self.got: queue.Queue[tuple[str, bytes]] = queue.Queue()
        self.gone: queue.Queue[str] = queue.Queue()
        self._mqtt = mqtt.Client(
            CallbackAPIVersion.VERSION2, client_id=client_id or name, protocol=mqtt.MQTTv5
        )
        self._mqtt.username_pw_set(name, password)
        self._mqtt.on_connect = lambda c, d, f, code, p: self.codes.put(str(code))
        self._mqtt.on_disconnect = lambda c, d, f, code, p: self.gone.put(str(code))
        self._mqtt.on_subscribe = lambda c, d, m, codes, p: self.subscribed.put(
            not codes[0].is_failure
        )
        self._mqtt.on_publish = lambda c, d, m, code, p: self.published.put(not code.is_failure)
        self._mqtt.on_message = lambda c, d, m: self.got.put((m.topic, m.payload))
        self._mqtt.connect("127.0.0.1", broker.port)
        self._mqtt.loop_start()
        self.code = self.codes.get(timeout=WAIT)

    def may_read(self, topic: str) -> bool:
        self._mqtt.subscribe(topic, options=SubscribeOptions(qos=1))
        return self.subscribed.get(timeout=WAIT)

    def may_write(self, topic: str, payload: bytes = b"x", *, retain: bool = False) -> bool:
        self._mqtt.publish(topic, payload, qos=1, retain=retain)
        return self.published.get(timeout=WAIT)

    def close(self) -> None:
        self._mqtt.disconnect()
        self._mqtt.loop_stop()


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[BrokerChild]:
    with BrokerChild(tmp_path) as child:
        yield child


@pytest.fixture
def admin(broker: BrokerChild) -> Iterator[BrokerAdmin]:
    admin = BrokerAdmin(broker.url, *broker.credentials(ADMIN))
    yield admin
    admin.close()


def words(broker: BrokerChild, device: str) -> tuple[str, str]:
    return device, device_password(broker.secret, device, 1)


def test_only_our_loopback_port_listens(broker: BrokerChild) -> None:
    process = psutil.Process(broker.pid)
    listening = [
        (c.laddr.ip, c.laddr.port)
        for c in process.net_connections(kind="inet")
        if c.status == psutil.CONN_LISTEN
    ]
    assert listening == [("127.0.0.1", broker.port)]


@pytest.mark.skipif(os.geteuid() != 0, reason="as a normal user there is no root to drop")
def test_as_root_the_broker_runs_as_somebody_else_who_owns_his_files(broker: BrokerChild) -> None:
    uids = psutil.Process(broker.pid).uids()
    assert 0 not in (uids.real, uids.effective, uids.saved)
    assert broker.directory.stat().st_uid == uids.real
    assert stat.S_IMODE(broker.directory.stat().st_mode) == 0o700


def test_the_secret_is_for_us_alone(broker: BrokerChild, tmp_path: Path) -> None:
    assert stat.S_IMODE((tmp_path / "broker.secret").stat().st_mode) == 0o600


def test_a_device_touches_its_own_topics_only(broker: BrokerChild, admin: BrokerAdmin) -> None:
    admin.add_devices([words(broker, "car-1"), words(broker, "car-2")])
    car = Client(broker, *words(broker, "car-1"))
    assert car.code == "Success"
    for channel in ("desired", "ack"):
        assert car.may_read(f"bw/v1/car-1/{channel}")
        assert not car.may_write(f"bw/v1/car-1/{channel}")
        assert not car.may_read(f"bw/v1/car-2/{channel}")
    for channel in ("reported", "health", "presence"):
        assert car.may_write(f"bw/v1/car-1/{channel}")
        assert not car.may_write(f"bw/v1/car-2/{channel}")
        assert not car.may_read(f"bw/v1/car-2/{channel}")
    for topic in (
        "#",
        "bw/v1/+/desired",
        "$SYS/#",
        "$CONTROL/dynamic-security/v1/response",
        "$share/bw-ingest/bw/v1/+/reported",
        "$share/bw-ingest/bw/v1/+/health",
        "$share/mine/bw/v1/car-2/health",
        "bw/service/probe",
    ):
        assert not car.may_read(topic), topic
    assert not car.may_write("$CONTROL/dynamic-security/v1", b'{"commands":[]}')
    assert not car.may_write("bw/service/probe")
    car.close()


def test_services_reach_devices_and_back(broker: BrokerChild, admin: BrokerAdmin) -> None:
    admin.add_devices([words(broker, "car-1")])
    ingest = Client(broker, *broker.credentials(INGEST))
    controller = Client(broker, *broker.credentials(CONTROLLER))
    car = Client(broker, *words(broker, "car-1"))
    assert ingest.may_read("$share/bw-ingest/bw/v1/+/health")
    assert car.may_read("bw/v1/car-1/desired")
    assert car.may_write("bw/v1/car-1/health", b"h")
    assert ingest.got.get(timeout=WAIT) == ("bw/v1/car-1/health", b"h")
    assert controller.may_write("bw/v1/car-1/desired", b"d", retain=True)
    assert car.got.get(timeout=WAIT) == ("bw/v1/car-1/desired", b"d")
    assert not ingest.may_write("bw/v1/car-1/desired")
    assert not controller.may_read("bw/v1/+/health")
    for client in (ingest, controller, car):
        client.close()


def test_nobody_takes_the_client_id_of_another(broker: BrokerChild, admin: BrokerAdmin) -> None:
    admin.add_devices([words(broker, "car-1"), words(broker, "car-2")])
    victim = Client(broker, *words(broker, "car-1"))
    thief = Client(broker, *words(broker, "car-2"), client_id="car-1")
    assert thief.code == "Not authorized"
    assert victim.may_write("bw/v1/car-1/health")
    for client in (victim, thief):
        client.close()


def test_who_is_unknown_or_wrong_is_refused(broker: BrokerChild, admin: BrokerAdmin) -> None:
    admin.add_devices([words(broker, "car-1")])
    for name, password in (("car-1", "guess"), ("car-9", "x"), (ADMIN, "x")):
        client = Client(broker, name, password)
        assert client.code == "Not authorized"
        client.close()
    with pytest.raises(BrokerUnavailable, match="refused"):
        BrokerAdmin(broker.url, ADMIN, "guess").list_devices()


def test_a_removed_device_is_cut_off_at_once(broker: BrokerChild, admin: BrokerAdmin) -> None:
    admin.add_devices([words(broker, "car-1")])
    car = Client(broker, *words(broker, "car-1"))
    admin.remove_device("car-1")
    assert car.gone.get(timeout=WAIT)
    assert car.codes.get(timeout=WAIT) == "Not authorized"  # its reconnect
    car.close()


def test_accounts_outlive_a_broker_that_was_killed(broker: BrokerChild, admin: BrokerAdmin) -> None:
    admin.add_devices([words(broker, "car-1")])
    port, pid = broker.port, broker.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    psutil.Process(pid).wait(WAIT)
    broker.start()
    assert broker.port == port
    assert admin.list_devices() == {"car-1"}


def test_a_broker_that_forgot_is_filled_again(broker: BrokerChild, admin: BrokerAdmin) -> None:
    admin.add_devices([words(broker, "car-1"), words(broker, "old")])
    broker.stop()
    (broker.directory / "dynamic-security.json").write_text("{ spoilt")
    broker.start()
    assert admin.list_devices() == set()
    admin.ensure_services(broker.secret)
    assert admin.sync([words(broker, "car-1"), words(broker, "car-2")]) == (2, 0)
    assert admin.sync([words(broker, "car-2")]) == (0, 1)
    assert admin.list_devices() == {"car-2"}


def test_adding_twice_is_harmless(broker: BrokerChild, admin: BrokerAdmin) -> None:
    admin.add_devices([words(broker, "car-1")])
    admin.add_devices([words(broker, "car-1")])
    admin.remove_device("car-1")
    admin.remove_device("car-1")
    assert admin.list_devices() == set()


def test_a_hundred_devices_are_known_from_the_start(tmp_path: Path) -> None:
    child = BrokerChild(tmp_path)
    child.start([words(child, f"car-{i}") for i in range(100)])
    try:
        admin = BrokerAdmin(child.url, *child.credentials(ADMIN))
        assert len(admin.list_devices()) == 100
        admin.close()
    finally:
        child.stop()


def test_the_orphan_of_a_killed_controller_is_ended(broker: BrokerChild, tmp_path: Path) -> None:
    orphan = psutil.Process(broker.pid)
    second = BrokerChild(tmp_path)
    second.start()
    try:
        assert not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE
        assert second.port == broker.port
    finally:
        second.stop()


def test_a_taken_port_says_what_to_do(broker: BrokerChild, tmp_path: Path) -> None:
    with pytest.raises(BrokerFailed, match="is taken"):
        BrokerChild(tmp_path / "other", port=broker.port).start()
