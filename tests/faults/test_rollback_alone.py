"""A rollback over HTTP while Git, then the ingest, then the telemetry database are away."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import paho.mqtt.client as mqtt
import psutil
import pytest

from device_agent.protocol import (
    ComponentReport,
    Reported,
    State,
    canonical,
    open_envelope,
    to_wire,
)

from .conftest import Processes, eventually

DIGESTS = {str(v): "sha256:" + format(v, "064x") for v in range(1, 6)}


class Device:
    """One device on the real broker: it obeys each order at once, and keeps them all."""

    def __init__(self, enrolled: dict[str, Any]) -> None:
        self.orders: list[Any] = []
        self._seq = 0
        self._versions = {digest: version for version, digest in DIGESTS.items()}
        self._lock = threading.Lock()
        broker = enrolled["broker"]
        self.id = broker["username"]
        where = urlsplit(broker["url"])
        self._client = mqtt.Client(
            mqtt.CallbackAPIVersion.VERSION2, client_id=self.id, protocol=mqtt.MQTTv5
        )
        self._client.username_pw_set(self.id, broker["password"])
        self._client.on_message = self._told
        self._client.connect(where.hostname or "", where.port or 1883)
        self._client.subscribe(f"bw/v1/{self.id}/desired", qos=1)
        self._client.loop_start()
        self.report("1")

    def _told(self, _client: Any, _data: Any, message: Any) -> None:
        if message.payload:
            order = open_envelope(message.payload)[0]
            with self._lock:
                self.orders.append(order)
            if "app" in order.components:
                self.report(self._versions[order.components["app"].digest], order)

    def report(self, version: str, order: Any = None) -> None:
        self._seq += 1
        told = {} if order is None else {
            "term": order.term, "generation": order.generation, "attempt": order.attempt,
        }  # fmt: skip
        message = Reported(
            boot="b",
            boot_count=1,
            seq=self._seq,
            state=State.IDLE if order is None else State.COMMITTED,
            components={
                "app": ComponentReport(
                    release=f"app-{version}", digest=DIGESTS[version], committed=True
                )
            },
            **told,
        )
        self._client.publish(
            f"bw/v1/{self.id}/reported", canonical(to_wire(message)), qos=1, retain=True
        )

    def newest(self) -> tuple[str, str]:
        """(kind, version) of the last order."""
        with self._lock:
            if not self.orders:
                return "", ""
            order = self.orders[-1]
        digest = order.components["app"].digest if "app" in order.components else ""
        return str(order.kind), self._versions.get(digest, "")

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


class Repo:
    def __init__(self, root: Path) -> None:
        self.bare, self._work = root / "fleet.git", root / "work"
        subprocess.run(["git", "init", "-q", "--bare", "-b", "main", str(self.bare)], check=True)
        subprocess.run(["git", "clone", "-q", str(self.bare), str(self._work)], check=True)

    def commit(self, version: str) -> None:
        """Push app `version` to everybody, over whatever the controller pushes meanwhile."""
        (self._work / "fleet.yaml").write_text("---\n".join(_documents(version)))
        self._git("add", "-A")
        self._git("commit", "-q", "-m", f"app {version}")
        eventually(self._pushed, 60, f"app {version} is pushed")

    def _pushed(self) -> bool:
        if self._git("push", "-q", "origin", "HEAD:main", check=False):
            return True
        self._git("pull", "-q", "--rebase", "origin", "main")
        return False

    def _git(self, *words: str, check: bool = True) -> bool:
        who = ("-c", "user.name=ann", "-c", "user.email=ann@example.com")
        done = subprocess.run(
            ["git", "-C", str(self._work), *who, *words], check=check, capture_output=not check
        )
        return done.returncode == 0


def _documents(version: str) -> list[str]:
    step = {"cohort": "general", "soak": "1h", "maxSoak": "24h"}
    specs: list[tuple[str, str, dict[str, Any]]] = [
        ("Fleet", "cars", {"selector": {"matchLabels": {"model": "m3"}}, "healthPolicy": "driving",
                           "cohorts": [{"name": "general", "rest": "true"}]}),
        ("HealthPolicy", "driving", {"gates": [{"metric": "update_ok", "type": "proportion"}]}),
        ("Rollout", "cars", {"fleet": "cars", "release": f"app-{version}",
                             "strategy": {"steps": [step]}}),
        *(
            ("Release", f"app-{v}", {
                "version": v,
                "artifacts": [{"component": "app", "digest": d, "size": "10",
                               "url": "http://127.0.0.1:9/x"}],
            })
            for v, d in DIGESTS.items()
        ),
    ]  # fmt: skip
    return [
        json.dumps(
            {"apiVersion": "bellwether.dev/v1", "kind": kind, "metadata": {"name": name},
             "spec": spec}
        )
        + "\n"
        for kind, name, spec in specs
    ]  # fmt: skip


class Service:
    def __init__(self, url: str, state: Path) -> None:
        self.url, self.state = url, state
        self._client = httpx2.Client(base_url=f"{url}/api/v1", timeout=20)

    def close(self) -> None:
        self._client.close()

    def ready(self) -> bool:
        try:
            return httpx2.get(f"{self.url}/readyz").status_code == 200
        except httpx2.TransportError:
            return False

    def post(self, path: str, body: Any, **headers: str) -> Any:
        answer = self._client.post(path, json=body, headers=headers)
        assert answer.is_success, answer.text
        return answer.json()

    def rollout(self) -> dict[str, Any]:
        answer = self._client.get("/rollouts/cars")
        return dict(answer.json()) if answer.is_success else {}

    def rollback(self, reason: str) -> None:
        self.post("/rollouts/cars:rollback", {"reason": reason}, **{"If-Match": "*"})

    def audited(self, reason: str) -> bool:
        rows = self._client.get("/audit", params={"action": "rollback", "limit": 100}).json()
        return any(row["detail"]["reason"] == reason for row in rows["items"])

    def holds_in_git(self) -> bool:
        holds = self.rollout().get("holds", ())
        return bool(holds) and all(hold["commit"] for hold in holds)


@pytest.fixture
def fleet(tmp_path: Path, processes: Processes) -> Iterator[tuple[Repo, Service, Device, int]]:
    repo = Repo(tmp_path)
    repo.commit("1")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    state = tmp_path / "state"
    serving = processes.start(
        "serve", "serve", "--repo", str(repo.bare), "--state-dir", str(state),
        "--listen", f"127.0.0.1:{port}", "--poll-interval", "0.3", "--tick-interval", "0.1",
    )  # fmt: skip
    service = Service(f"http://127.0.0.1:{port}", state)
    eventually(service.ready, 180, "the service is ready")
    made = service.post("/devices", {"id": "car-1", "fleet": "cars", "labels": {"model": "m3"}})
    device = Device(service.post("/devices:enrol", {"token": made["token"]}))
    yield repo, service, device, serving.child.pid
    device.close()
    service.close()


def role(parent: int, name: str) -> psutil.Process:
    for child in psutil.Process(parent).children(recursive=True):
        if child.environ().get("BELLWETHER_ROLE") == name:
            return child
    raise AssertionError(f"no process of role {name}")


def updated(repo: Repo, device: Device, version: str) -> None:
    repo.commit(version)
    eventually(lambda: device.newest() == ("install", version), 120, f"car-1 is told app-{version}")


@pytest.mark.story
def test_a_rollback_is_on_the_wire_whatever_else_is_away(
    fleet: tuple[Repo, Service, Device, int],
) -> None:
    repo, service, device, pid = fleet

    updated(repo, device, "2")
    gone = repo.bare.rename(repo.bare.with_name("gone"))
    service.rollback("without git")
    eventually(lambda: device.newest() == ("rollback", "1"), 90, "the order back, without Git")
    assert service.audited("without git")
    gone.rename(repo.bare)
    eventually(service.holds_in_git, 60, "the hold is in Git when Git is back")

    updated(repo, device, "3")
    ingest = role(pid, "ingest")
    ingest.send_signal(signal.SIGSTOP)
    try:
        service.rollback("without ingest")
        eventually(lambda: device.newest() == ("rollback", "1"), 90, "the order back, no ingest")
        assert service.audited("without ingest")
    finally:
        ingest.send_signal(signal.SIGCONT)

    updated(repo, device, "4")
    database = service.state / "telemetry.db"
    assert database.stat().st_size > 0
    for file in (database, *service.state.glob("telemetry.db-*")):
        with file.open("r+b") as opened:  # in place: whoever has it open reads rubbish from now on
            size = opened.seek(0, 2)
            opened.seek(0)
            opened.write(b"\xff" * size)
    service.rollback("without telemetry")
    eventually(lambda: device.newest() == ("rollback", "1"), 90, "the order back, no telemetry")
    assert service.audited("without telemetry")
    shown = service.post("/stop", {"scope": "all", "reason": "and a stop"})
    assert shown["state"] == "recorded"
