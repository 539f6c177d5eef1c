"""Simulated devices on a real broker and real disks, with a director of the test's own."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from paho.mqtt import client as mqtt

from controller.cli.stage import behaviour, bundle
from controller.keys import DirectorKey
from device_agent import protocol
from device_agent.agent import Identity
from device_agent.installers.slots import Slots
from device_agent.journal import Journal
from device_agent.machine import hash_file
from device_agent.outbox import Outbox
from device_agent.protocol import ComponentOrder, Desired, Health, Kind, Reported, State
from device_agent.simulator import device as simulated
from device_agent.simulator.fleet import Fleet
from device_agent.simulator.plan import MOST, Image, Plan, Script, scripts, split

COMPONENT = "autopilot"


class Director:
    """The server's side of the wire: keeps what devices say, acknowledges, publishes orders."""

    def __init__(self, port: int, key: DirectorKey) -> None:
        self.key = key
        self.last: dict[str, Reported] = {}
        self.health: dict[str, list[Health]] = {}
        self.changed = threading.Condition()
        self.client = mqtt.Client(
            mqtt.CallbackAPIVersion.VERSION2, client_id="director", protocol=mqtt.MQTTv5
        )
        self.client.on_message = self._heard
        self.client.on_connect = lambda client, *_: client.subscribe("bw/v1/+/#", qos=1)
        self.client.connect("127.0.0.1", port)
        self.client.loop_start()

    def stop(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()

    def order(self, device: str, generation: int, file: Path, url: str, release: str) -> None:
        desired = Desired(
            device=device,
            term=1,
            generation=generation,
            attempt=f"try-{generation}",
            kind=Kind.INSTALL,
            components={
                COMPONENT: ComponentOrder(
                    release=release,
                    digest=hash_file(file),
                    size=file.stat().st_size,
                    urls=(url,),
                )
            },
            issued_at="2026-01-01T00:00:00.000Z",
            not_after="2099-01-01T00:00:00.000Z",
        )
        topic = protocol.topic(device, protocol.Channel.DESIRED)
        self.client.publish(topic, self.key.sign(desired), qos=1, retain=True)

    def until(self, ready: Any, seconds: float = 30.0) -> None:
        with self.changed:
            assert self.changed.wait_for(ready, seconds), {
                d: (r.state, r.reason) for d, r in self.last.items()
            }

    def _heard(self, client: mqtt.Client, _: Any, message: mqtt.MQTTMessage) -> None:
        device, channel = protocol.parse_topic(message.topic)
        if channel not in (protocol.Channel.REPORTED, protocol.Channel.HEALTH):
            return
        kind = Reported if channel is protocol.Channel.REPORTED else Health
        said: Any = protocol.decode(kind, bytes(message.payload))
        with self.changed:
            if isinstance(said, Reported):
                before = self.last.get(device)
                if before is None or (said.boot_count, said.seq) > (before.boot_count, before.seq):
                    self.last[device] = said
            else:
                self.health.setdefault(device, []).append(said)
            self.changed.notify_all()
        nonce = said.nonce if isinstance(said, Reported) else None
        ack = protocol.Ack(boot=said.boot, ranges=((said.seq, said.seq),), nonce=nonce)
        client.publish(protocol.topic(device, protocol.Channel.ACK), protocol.encode(ack))


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    """A Mosquitto of our own, open on a free loopback port."""
    binary = shutil.which("mosquitto", path="/usr/sbin:/usr/bin:/usr/local/sbin:/opt/homebrew/sbin")
    assert binary is not None, "mosquitto is missing: scripts/test installs it"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    file = tmp_path / "mosquitto.conf"
    file.write_text(f"listener {free} 127.0.0.1\nallow_anonymous true\nset_tcp_nodelay true\n")
    file.chmod(0o644)
    with (tmp_path / "mosquitto.log").open("wb") as log:
        process = subprocess.Popen([binary, "-c", str(file)], stdout=log, stderr=log)
    until = time.monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", free), timeout=1).close()
            break
        except OSError:
            assert time.monotonic() < until, "mosquitto does not listen"
    yield free
    process.terminate()
    process.wait(10)


@pytest.fixture
def director(port: int, tmp_path: Path) -> Iterator[Director]:
    found = Director(port, DirectorKey.load_or_create(tmp_path / "director.key"))
    yield found
    found.stop()


@pytest.fixture
def artifacts(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    folder = tmp_path / "artifacts"
    folder.mkdir()
    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *words: Quiet(*words, directory=str(folder))
    )
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join(5)


class Running:
    """A `Fleet` in a thread of its own."""

    def __init__(self, plan: Plan) -> None:
        self.said: list[Any] = []
        self.fleet = Fleet(plan, self.said.append)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self.fleet.run())
        self._loop.close()

    def __enter__(self) -> Running:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self.fleet.stop)
        self._thread.join(20)
        assert not self._thread.is_alive()


def enrolled(root: Path, count: int, port: int, key: DirectorKey, server: str) -> tuple[str, ...]:
    names = tuple(f"car-{n:02d}" for n in range(count))
    for name in names:
        home = root / name
        home.mkdir(parents=True)
        identity = Identity(
            device=name,
            keys=(key.public_hex,),
            server=server,
            broker_url=f"mqtt://127.0.0.1:{port}",
            broker_username=name,
            broker_password="x",
        )
        (home / "identity.json").write_text(identity.to_json())
    return names


def test_devices_move_go_back_and_bring_their_history(
    port: int, director: Director, artifacts: tuple[Path, str], tmp_path: Path
) -> None:
    folder, url = artifacts
    old = bundle(folder / "1.tar.gz", "1", behaviour("none", 1))
    new = bundle(folder / "2.tar.gz", "2", behaviour("none", 1))
    bad_body = {**behaviour("none", 1), "boot": "fail"}
    bad = bundle(folder / "3.tar.gz", "3", bad_body)
    names = enrolled(tmp_path / "cars", 8, port, director.key, url)
    plan = Plan(
        root=str(tmp_path / "cars"),
        devices=names,
        history_days=5,
        health_interval=0.5,
        trial_soak=0.1,
        images=(Image(component=COMPONENT, release="r1", bundle=str(old)),),
    )
    with Running(plan):
        director.until(lambda: len(director.last) == 8)
        for name in names:
            assert director.last[name].components[COMPONENT].digest == hash_file(old)
            director.order(name, 1, new, f"{url}/2.tar.gz", "r2")
        director.until(lambda: all(r.state is State.COMMITTED for r in director.last.values()))
        for name in names:
            director.order(name, 2, bad, f"{url}/3.tar.gz", "r3")
        director.until(lambda: all(r.state is State.ROLLED_BACK for r in director.last.values()))
        director.until(
            lambda: all(
                {m.seq for m in director.health.get(n, ()) if m.boot == "factory"}
                == set(range(1, 6))
                for n in names
            )
        )
    for name in names:
        last = director.last[name]
        assert last.reason == "boot_failed"
        assert [entry.release for entry in last.history] == ["r1", "r2", "r3", "r2"]
        slot = Slots(tmp_path / "cars" / name / "components").active(COMPONENT)
        assert slot is not None
        assert slot.digest == hash_file(new)
        journal = Journal(tmp_path / "cars" / name / "journal.db")
        assert journal.load().running[COMPONENT].release == "r2"
        journal.close()


def test_a_silent_release_is_left_by_the_device_itself(
    port: int, director: Director, artifacts: tuple[Path, str], tmp_path: Path
) -> None:
    folder, url = artifacts
    old = bundle(folder / "1.tar.gz", "1", behaviour("none", 1))
    mute = bundle(folder / "2.tar.gz", "2", {"silent": True})
    names = enrolled(tmp_path / "cars", 3, port, director.key, url)
    plan = Plan(
        root=str(tmp_path / "cars"),
        devices=names,
        trial_soak=0.1,
        trial_deadline=2.0,
        images=(Image(component=COMPONENT, release="r1", bundle=str(old)),),
    )
    with Running(plan):
        director.until(lambda: len(director.last) == 3)
        for name in names:
            director.order(name, 1, mute, f"{url}/2.tar.gz", "r2")
        director.until(
            lambda: all(
                r.state is State.ROLLED_BACK and r.reason == "link_lost"
                for r in director.last.values()
            )
        )
    for last in director.last.values():
        assert [entry.release for entry in last.history] == ["r1", "r2", "r1"]


def test_scripted_faults_end_and_devices_come_back(
    port: int, director: Director, tmp_path: Path
) -> None:
    names = enrolled(tmp_path / "cars", 4, port, director.key, "http://127.0.0.1:9")
    plan = Plan(
        root=str(tmp_path / "cars"),
        devices=names,
        faults=(
            Script(at=1.0, do="offline", lasting=1.0, devices="car-00"),
            Script(at=1.0, do="restart", devices="car-01"),
        ),
    )
    with Running(plan):
        director.until(lambda: len(director.last) == 4)
        director.until(lambda: director.last["car-01"].boot_count == 2)
        seen = len(director.health.get("car-00", ()))
        director.until(lambda: len(director.health.get("car-00", ())) > seen + 3)
    assert director.last["car-02"].boot_count == 1


def test_a_device_that_cannot_write_ends_alone_and_is_started_again(
    port: int, director: Director, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = enrolled(tmp_path / "cars", 3, port, director.key, "http://127.0.0.1:9")
    plan = Plan(root=str(tmp_path / "cars"), devices=names, health_interval=0.5)
    full = threading.Event()

    class Disks(Outbox):
        def __init__(self, path: Path, **more: Any) -> None:
            self._car = path.parent.name
            if full.is_set() and self._car == "car-00":
                raise sqlite3.OperationalError("unable to open database file")
            super().__init__(path, **more)

        def put(self, *words: Any) -> None:
            if full.is_set() and self._car == "car-00":
                raise sqlite3.OperationalError("database or disk is full")
            super().put(*words)

    monkeypatch.setattr(simulated, "Outbox", Disks)
    monkeypatch.setattr(simulated, "RESTART", 0.2)
    with Running(plan):
        director.until(lambda: len(director.last) == 3)
        boots = {name: director.last[name].boot for name in names}
        full.set()
        seen = len(director.health.get("car-01", ()))
        director.until(lambda: len(director.health.get("car-01", ())) > seen + 3)
        full.clear()
        director.until(lambda: director.last["car-00"].boot != boots["car-00"])
        seen = len(director.health.get("car-00", ()))
        director.until(lambda: len(director.health.get("car-00", ())) > seen + 1)
    assert {n for n in names if director.last[n].boot != boots[n]} == {"car-00"}


def test_a_process_whose_parent_was_killed_before_it_looked_ends(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    file = tmp_path / "plan-0.json"
    file.write_text(Plan(root=str(tmp_path), devices=()).to_json())
    words = [sys.executable, "-m", "device_agent.simulator", str(file)]
    environment = os.environ | {"BELLWETHER_PARENT": str(gone.pid)}
    assert subprocess.run(words, env=environment, timeout=60, check=False).returncode == 0


def test_a_plan_travels_as_json() -> None:
    plan = Plan(
        root="/x",
        devices=("a", "b"),
        images=(Image(component="c", release="r", bundle="/b"),),
        faults=(Script(at=1, do="clock", by=-3600),),
    )
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    "data",
    [
        {},
        [1],
        [{"at": 1}],
        [{"at": 1, "do": "explode"}],
        [{"do": "restart"}],
        [{"at": "x", "do": "restart"}],
        [{"at": 1, "do": "restart", "who": "car-1"}],
    ],
)
def test_faults_that_do_not_fit_are_refused(data: Any) -> None:
    with pytest.raises(ValueError, match="faults"):
        scripts(data)


def test_a_process_never_gets_more_than_its_limit(tmp_path: Path) -> None:
    names = [f"car-{n}" for n in range(2 * MOST + 1)]
    parts = list(split(names, 1))
    assert len(parts) == 3
    assert sorted(name for part in parts for name in part) == sorted(names)
    with pytest.raises(ValueError, match="at most"):
        Fleet(Plan(root=str(tmp_path), devices=tuple(names)), lambda _: None)
    assert json.loads(Plan(root="x", devices=()).to_json())["devices"] == []
