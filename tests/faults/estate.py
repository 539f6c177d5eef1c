"""A small fleet on real parts for the fault tests: service, broker, Git, cars that run the agent.

Each test rolls the next version out, breaks something in the middle of it, looks that nothing is
held against the release meanwhile, mends it, and waits until the rollout has completed by itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from controller.cli import stage
from controller.cli.story import Story, Wish

from .conftest import eventually

CARS = 24
SILENT_AFTER = 5.0  # seconds: what the outages are measured by
PATIENCE = 240.0
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
    standing: dict[str, int] = field(default_factory=dict)  # release → cars, as seen last

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
        """Commit the next version; answers it when the canary is being told."""
        self.version += 1
        version = f"10.2.{self.version}"
        text = self.story._publish(version, self.story._bundle(version))
        words = {
            "rollout": stage.ROLLOUT,
            "fleet": stage.FLEET,
            "release": stage.release_name(version),
            "silent": SILENT_AFTER,
        }
        files = {f"releases/{version}.yaml": text, "rollout.yaml": ROLLOUT % words}
        self.story.repository.commit(files, f"Roll out {version}")
        release = stage.release_name(version)
        eventually(lambda: self.rollout(release), PATIENCE, f"{version} opens")
        eventually(lambda: self.standing_of(version) > 0, PATIENCE, f"a car runs {version}")
        return version

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

    def completes(self, version: str) -> None:
        release = stage.release_name(version)

        def done() -> bool:
            self.story.children.check()
            seen = self.rollout(release)
            assert seen["state"] in UNDER_WAY | {"Completed"}, seen["sentence"]
            return seen["state"] == "Completed" and self.standing_of(version) == CARS

        eventually(done, PATIENCE, f"{version} completes by itself")

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
