"""A small fleet on real parts for the fault tests: service, broker, Git, cars that run the agent.

Each test rolls the next version out, breaks something in the middle of it, looks that nothing is
held against the release meanwhile, mends it, and waits until the rollout has completed by itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from controller.cli import stage
from controller.cli.story import Story, Wish, version_of
from telemetry.store import seen

from .conftest import eventually

CARS = 24
SILENT_AFTER = 4.0  # seconds: what the outages are measured by
PATIENCE = 400.0
UNDER_WAY = frozenset({"Pending", "Progressing", "Soaking"})

# Without a rate: so few cars prove what they can prove, that the update works.
POLICY = f"""\
apiVersion: bellwether.dev/v1
kind: HealthPolicy
metadata: {{name: {stage.POLICY}}}
spec:
  score:
    preset: linear
    window: 30d
    minExposure: 20h
    factors:
      - {{metric: intervention, per: device_hour, good: "0.3", bad: "1.2", weight: 100}}
  gates:
    - {{metric: update_ok, type: proportion}}
  engine: {{alpha: "0.002"}}
"""

ROLLOUT = """\
apiVersion: bellwether.dev/v1
kind: Rollout
metadata: {name: %(rollout)s}
spec:
  fleet: %(fleet)s
  release: %(release)s
  strategy:
    steps:
      - {cohort: canary, soak: 2s, margins: {failed: 60%%, lost: 60%%}}
      - {cohort: early, soak: 2s, margins: {failed: 60%%, lost: 60%%}}
      - {cohort: general, soak: 1s, margins: {failed: 60%%, lost: 60%%}}
    abortFailed: {count: 2, share: 10%%}
    silentAfter: %(silent)gs
"""


@dataclass
class Estate:
    """A service with its fleet, all on 10.1.0 at first."""

    root: Path
    database: str | None = None
    version: int = 0
    proven: str = "10.1.0"
    standing: dict[str, int] = field(default_factory=dict)  # version → cars, as seen last
    _documents: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.story = Story(
            Wish(devices=CARS, seed=21, fault="none", database=self.database),
            self.root,
            tell=lambda _words: None,
        )

    def start(self) -> None:
        self.story.set_up(POLICY)
        self.story.baseline()
        self.standing = self.story._counts()

    def stop(self) -> None:
        self.story.children.stop()

    # -- a rollout --------------------------------------------------------------------------------

    def roll_out(self) -> str:
        """Commit the next version; answers it when a car runs it."""
        version = self.publish()
        self.push(version)
        eventually(lambda: self.standing_of(version) > 0, PATIENCE, f"a car runs {version}")
        return version

    def publish(self, *, boots: bool = True, fixes: str = "") -> str:
        """The next version, whose document is committed by `push`."""
        self.version += 1
        version = f"10.2.{self.version}"
        behaviour = stage.behaviour("none", 1.0) | ({} if boots else {"boot": "fail"})
        file = self.root / f"{stage.COMPONENT}-{version}.tar.gz"
        text = self.story._publish(version, stage.bundle(file, version, behaviour))
        if fixes:
            text = text.rstrip("\n") + f"\n  fixes: {stage.release_name(fixes)}\n"
        self._documents[version] = text
        return version

    def push(self, version: str, silent_after: float = SILENT_AFTER) -> None:
        """Commit its rollout; back when that has opened."""
        release = stage.release_name(version)
        words = {
            "rollout": stage.ROLLOUT,
            "fleet": stage.FLEET,
            "release": release,
            "silent": silent_after,
        }
        files = {
            f"releases/{version}.yaml": self._documents[version],
            "rollout.yaml": ROLLOUT % words,
        }
        self.story.repository.commit(files, f"Roll out {version}")
        eventually(lambda: self.rollout(release), PATIENCE, f"{version} opens")

    def rollout(self, release: str) -> dict[str, Any]:
        """The newest rollout of a release; empty before there is one."""
        for found in self.story.api.get("/rollouts")["items"]:
            if found["release"] == release:
                return dict(found)
        return {}

    def git(self) -> dict[str, Any]:
        """What the controller says of the fleet repository."""
        return dict(self.story.api.get("/fleets")["git"])

    def standing_of(self, version: str) -> int:
        self.standing = self.story._counts()
        return self.standing.get(version, 0)

    def completes(self, version: str, cars: int = CARS) -> None:
        release = stage.release_name(version)

        def done() -> bool:
            self.story.children.check()
            seen = self.rollout(release)
            assert seen["state"] in UNDER_WAY | {"Completed"}, seen["sentence"]
            return seen["state"] == "Completed" and self.standing_of(version) >= cars

        eventually(done, PATIENCE, f"{version} completes by itself")
        self.proven = version

    def nothing_moves(self, version: str, seconds: float, settle: float) -> None:
        """From `settle` seconds on nothing widens, nobody is counted silent, nothing goes back."""
        release = stage.release_name(version)
        time.sleep(settle)
        before = self.rollout(release)
        until = time.monotonic() + seconds - settle
        while time.monotonic() < until:
            seen = self.rollout(release)
            assert seen["state"] in UNDER_WAY, seen["sentence"]
            assert seen["step"] == before["step"]
            assert not self.harmed(seen["id"])
            time.sleep(0.5)

    def harmed(self, rollout: str) -> list[str]:
        """Members of the rollout that count as failed or silent."""
        found = []
        for device in self.story.api.every("/devices"):
            member = device["membership"]
            if member and member["rollout"] == rollout and member["state"] in ("failed", "silent"):
                found.append(f"{device['id']}: {member['state']} {member['reason']}")
        return found

    def goes_back(self, version: str) -> None:
        release = stage.release_name(version)
        ended = ("RolledBack", "RollingBack")
        eventually(lambda: self.rollout(release)["state"] in ended, PATIENCE, "it is caught")
        eventually(lambda: self.story.repository.holds(), PATIENCE, "its hold is in Git")
        eventually(lambda: not self.standing_of(version), PATIENCE, "nobody runs it any more")

    def ordered(self, device: str) -> str:
        """The version that a device was told last; empty before its first order."""
        file = self.root / "state" / "control.db"
        with contextlib.closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as db:
            row = db.execute(
                "SELECT components FROM desired WHERE device = ?", (device,)
            ).fetchone()
        told = json.loads(row[0]) if row else {}
        return version_of(told[stage.COMPONENT]["release"]) if stage.COMPONENT in told else ""

    def told(self, version: str, devices: list[str]) -> list[str]:
        """Who of these was told this version, when somebody was."""
        found: list[str] = []

        def somebody() -> bool:
            found[:] = [name for name in devices if self.ordered(name) == version]
            return bool(found)

        eventually(somebody, PATIENCE, f"one of {devices} is told {version}")
        return found

    # -- cars in processes of their own -----------------------------------------------------------

    def enrol(self, name: str, count: int) -> list[str]:
        """More cars, with perfect scores, that run by the process of this name; their ids."""
        image = self.root / f"{stage.COMPONENT}-10.1.0.tar.gz"
        words = ["--server", self.story.server, "--dir", str(self.root / name), "--name", name]
        words += ["--devices", str(count), "--fleet", stage.FLEET, "--careful", "1"]
        words += ["--history", "30", "--health-interval", "1", "--pace", str(stage.PACE)]
        words += ["--factory", f"{stage.COMPONENT}={stage.release_name('10.1.0')}={image}"]
        log = self.story.children.start(name, "simulate", *words)
        eventually(lambda: '"history"' in log.read_text(), PATIENCE, f"{name} are on record")
        names = [f"{name}-{n:04d}" for n in range(1, count + 1)]
        up = f"{name} run {self.proven}, as newcomers do"
        eventually(lambda: all(self.ran(n)[-1] == self.proven for n in names), PATIENCE, up)
        return names

    def reroute(self, name: str, port: int) -> None:
        """From now on these cars find their broker at another port."""
        self.end(name)
        for file in (self.root / name).glob("*/identity.json"):
            identity = json.loads(file.read_text())
            identity["broker"]["url"] = f"mqtt://127.0.0.1:{port}"
            file.write_text(json.dumps(identity))
        children = self.story.children
        children.start(name, *children.words[name])

    def end(self, name: str) -> None:
        process = self.story.children.running.pop(name, None)
        if process is not None:
            process.terminate()
            process.wait(60)

    def broker_port(self) -> int:
        return int((self.root / "state" / "broker.port").read_text())

    def ran(self, device: str) -> list[str]:
        """By its own journal: every version that it has ever started, and what it runs now."""
        journal = self.root / device.rpartition("-")[0] / device / "journal.db"
        with contextlib.closing(sqlite3.connect(f"file:{journal}?mode=ro", uri=True)) as db:
            (body,) = db.execute("SELECT body FROM record").fetchone()
        return [version_of(entry["release"]) for entry in json.loads(body)["history"]]

    # -- its processes ----------------------------------------------------------------------------

    def pid(self, name: str) -> int:
        """serve, serve.ingest, serve.mosquitto, simulate.0, …: the one that runs now."""
        found: dict[str, int] = {}

        def there() -> bool:
            self.story.children.check()
            found.update(self.story.children.pids())
            return name in found and psutil.pid_exists(found[name])

        eventually(there, PATIENCE, f"{name} runs")
        return found[name]

    @contextlib.contextmanager
    def frozen(self, *names: str) -> Iterator[None]:
        stopped = [self.pid(name) for name in names]
        try:
            for pid in stopped:
                os.kill(pid, signal.SIGSTOP)
            yield
        finally:
            for pid in stopped:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def forget_the_broker(self) -> None:
        """Kill Mosquitto and delete all that it had kept, before anybody starts it again."""
        with self.frozen("serve"):
            broker = psutil.Process(self.pid("serve.mosquitto"))
            home = Path(broker.cmdline()[-1]).parent
            broker.kill()
            for file in home.glob("mosquitto.db*"):
                file.unlink()
            (home / "dynamic-security.json").unlink()


def lost(state: Path, cars: Path) -> dict[tuple[str, str], list[int]]:
    """(device, boot) → messages that the device no longer keeps and the server never counted."""
    found: dict[tuple[str, str], list[int]] = {}
    with contextlib.closing(sqlite3.connect(state / "telemetry.db")) as db:
        boots = db.execute("SELECT device, boot, high, missing FROM telemetry_boots").fetchall()
    for device, boot, high, missing in boots:
        box = cars / device / "outbox.db"
        if not box.exists():
            continue  # another process has it
        bits = seen.unpack(missing)
        gaps = {high - 1 - k for k in range(bits.bit_length()) if bits >> k & 1} - {0}
        with contextlib.closing(sqlite3.connect(box)) as kept:
            rows = kept.execute("SELECT seq FROM message WHERE boot = ?", (boot,))
            gaps -= {n for (n,) in rows}
        if gaps:
            found[device, boot] = sorted(gaps)
    return found
