"""What the demo plays on: a Git repository, bundles, the service and the fleet as child processes.

Everything lives below one directory. The demo commits to the repository and reads the public API;
nothing here reaches into the service, its database or its devices.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from controller.cli.errors import Failed

FLEET = "model-3"
ROLLOUT = "model-3-autopilot"
COMPONENT = "autopilot"
POLICY = "driving"
_RATE = 0.1  # interventions per hour of driving of a careful driver
PACE = 8.0  # hours of driving a second
_API_PATIENCE = 120.0  # seconds
_GIVES_UP = 3  # ends of its own in a minute that are forgiven
_FAULT_AFTER = 8.0  # hours of driving


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What follows from the number of devices."""

    devices: int

    @property
    def canary(self) -> int:
        return max(10, round(self.devices * 0.11))

    @property
    def report(self) -> float:
        """Seconds between two health messages of a device: two cores hear all of them."""
        return max(1.0, self.devices / 250)

    @property
    def silent_after(self) -> float:
        return max(8.0, 6 * self.report)

    @property
    def patience(self) -> float:
        """Seconds that an act may take before the demo gives up on it."""
        return 150.0 + self.devices * 0.3


def behaviour(fault: str, rise: float) -> dict[str, Any]:
    """behaviour.json of a release with this fault."""
    body: dict[str, Any] = {
        "boot": "ok",
        "events": {"intervention": {"per_device_hour": _RATE}},
        "levels": {"cabin_cpu": {"mean": 50, "sd": 6}},
        "exposure": {"device_hour": 1, "km": 60},
    }
    if fault == "boot":
        body["boot"] = {"fail": 0.85}
    elif fault == "silent":
        body["silent"] = {"share": 0.85}
    elif fault == "interventions":
        body["fault"] = {"after_hours": _FAULT_AFTER, "events": {"intervention": {"ratio": rise}}}
    return body


def bundle(file: Path, version: str, content: Mapping[str, Any]) -> Path:
    """A slots bundle: payload, a self-test, and how a simulated car behaves with it."""
    test = b"#!/bin/sh\ntest -s version\n"
    with tarfile.open(file, "w:gz") as archive:
        _member(archive, "version", f"{version}\n".encode(), 0o644)
        _member(archive, "behaviour.json", json.dumps(content, indent=2).encode(), 0o644)
        _member(archive, "selftest/10-version", test, 0o755)
    return file


def _member(archive: tarfile.TarFile, name: str, content: bytes, mode: int) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(content), mode
    archive.addfile(info, io.BytesIO(content))


# -- manifests ------------------------------------------------------------------------------------


def policy_text() -> str:
    return f"""\
apiVersion: bellwether.dev/v1
kind: HealthPolicy
metadata: {{name: {POLICY}}}
spec:
  score:
    preset: linear
    window: 30d
    minExposure: 20h
    factors:
      - {{metric: intervention, per: device_hour, good: "0.3", bad: "1.2", weight: 100}}
  gates:
    - {{metric: update_ok, type: proportion}}
    - {{metric: intervention, type: rate, per: device_hour, direction: increase,
       margin: {{ratio: "1.35"}}}}
    - {{metric: cabin_cpu, type: mean, direction: increase, margin: {{ratio: "1.2"}}, dryRun: true}}
  engine: {{alpha: "0.002"}}
  noData: inconclusive
"""


def fleet_text(size: Size) -> str:
    return f"""\
apiVersion: bellwether.dev/v1
kind: Fleet
metadata: {{name: {FLEET}, labels: {{product: {COMPONENT}}}}}
spec:
  selector: {{matchLabels: {{model: m3}}}}
  healthPolicy: {POLICY}
  baseline: {{{COMPONENT}: {release_name("10.1.0")}}}
  cohorts:
    - {{name: canary, select: {{score: {{min: 100}}, mode: stratified}}, limit: {size.canary}}}
    - {{name: early, select: {{score: {{min: 60}}, mode: stratified}}}}
    - {{name: general, rest: true}}
"""


def rollout_text(size: Size, version: str) -> str:
    """Durations of seconds; margins that this many devices can refute."""
    canary = _margin((size.canary + 1) // 2)  # a fix begins with half of those who ran the fault
    early = _margin(size.canary)
    return f"""\
apiVersion: bellwether.dev/v1
kind: Rollout
metadata: {{name: {ROLLOUT}}}
spec:
  fleet: {FLEET}
  release: {release_name(version)}
  strategy:
    steps:
      - {{cohort: canary, soak: 4s, margins: {{ratio: "2", failed: {canary}, lost: {canary}}}}}
      - {{cohort: early, percent: 50%, soak: 4s,
         margins: {{ratio: "1.35", failed: {early}, lost: {early}}}}}
      - {{cohort: early, percent: 100%, soak: 3s,
         margins: {{ratio: "1.35", failed: {early}, lost: {early}}}}}
      - {{cohort: general, percent: 100%, soak: 3s,
         margins: {{ratio: "1.35", failed: {early}, lost: {early}}}}}
    maxFailed: 0.5%
    abortFailed: {{count: 3, share: 20%}}
    silentAfter: {size.silent_after:g}s
    minReporting: 80%
    onFailure: rollback
    onNewRelease: supersede
"""


def _margin(devices: int) -> str:
    """The smallest share of failures that so many devices without one can refute, in percent."""
    from telemetry.evidence.outcome import needed
    from telemetry.policy import Engine

    engine = Engine()
    for percent in range(3, 90):
        if needed(engine, percent / 100) <= devices:
            return f"{percent}%"
    return "90%"


def release_name(version: str) -> str:
    return f"fsd-{version}"


# -- Git ------------------------------------------------------------------------------------------


class Repository:
    """A bare repository, as a Git host keeps one, and a person's clone of it."""

    def __init__(self, root: Path) -> None:
        self.bare = root / "fleet.git"
        self.clone = root / "fleet"
        self._git(root, "init", "-q", "--bare", "--initial-branch=main", str(self.bare))
        self._git(root, "init", "-q", "--initial-branch=main", str(self.clone))
        self._git(self.clone, "config", "user.name", "Release manager")
        self._git(self.clone, "config", "user.email", "release@example.invalid")
        self._git(self.clone, "config", "commit.gpgsign", "false")
        self._git(self.clone, "remote", "add", "origin", str(self.bare))

    def commit(self, files: Mapping[str, str], message: str) -> str:
        """Write, commit on top of what others pushed, push; answers the commit."""
        for name, text in files.items():
            path = self.clone / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        self._git(self.clone, "add", "--", *files)
        self._git(self.clone, "commit", "-q", "-m", message)
        for _ in range(10):
            self.pull()
            try:
                self._git(self.clone, "push", "-q", "origin", "HEAD:main")
                return self._git(self.clone, "rev-parse", "HEAD")
            except Failed:
                time.sleep(0.2)  # somebody pushed between our pull and our push
        raise Failed("the demo's repository takes no push")

    def pull(self) -> None:
        if self._git(self.bare, "branch", "--list", "main"):
            self._git(self.clone, "pull", "-q", "--rebase", "origin", "main")

    def holds(self) -> dict[str, str]:
        """File name → text of every hold that stands in Git."""
        self.pull()
        folder = self.clone / "holds"
        return {file.name: file.read_text() for file in sorted(folder.glob("*.yaml"))}

    def commit_of(self, path: str) -> str:
        return self._git(self.clone, "log", "-1", "--format=%H", "--", path)

    def _git(self, where: Path, *words: str) -> str:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
        environment |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
        done = subprocess.run(
            ["git", *words], cwd=where, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise Failed(f"git {' '.join(words)}: {done.stderr.strip()}")
        return done.stdout.strip()


# -- children -------------------------------------------------------------------------------------


@dataclass(slots=True)
class Children:
    """Our child processes, by name; each writes its output to a file of its own.

    One that was killed is started again, as an operating system's service manager does it, and
    continues from its disk; so is one that gave up once, after a kill beside it. One that gives up
    again and again has failed.
    """

    logs: Path
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    words: dict[str, tuple[str, ...]] = field(default_factory=dict)
    pid_file: Path | None = None
    died_at: float = 0.0  # monotonic: when one of them was last found gone
    stopped_at: float = 0.0  # monotonic: when one of them was last found stopped (SIGSTOP)
    _gave_up: dict[str, list[float]] = field(default_factory=dict)
    _written: dict[str, int] = field(default_factory=dict)

    def start(self, name: str, *words: str) -> Path:
        log = self.logs / f"{name}.log"
        with log.open("ab") as file:
            self.running[name] = subprocess.Popen(
                [sys.executable, "-m", "controller.cli", *words],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is ours to handle, in order
            )
        self.words[name] = words
        return log

    def check(self) -> None:
        """Raises Failed, with its last words, when a child gives up again and again."""
        for name, child in list(self.running.items()):
            code = child.poll()
            if code is None:
                continue
            if code >= 0 and self._gives_up(name):
                tail = (self.logs / f"{name}.log").read_text(errors="replace")[-1500:]
                raise Failed(f"{name} has ended (exit code {code}):\n{tail}")
            self.start(name, *self.words[name])
        self._look()

    def excused(self) -> float:
        """Monotonic: when one of them was last found stopped; patience counts from then on."""
        self.check()
        return self.stopped_at

    def _gives_up(self, name: str) -> bool:
        now = time.monotonic()
        lately = [at for at in self._gave_up.get(name, []) if now - at < 60.0]
        self._gave_up[name] = [*lately, now]
        return len(lately) >= _GIVES_UP

    def _look(self) -> None:
        """Notice who died since the last look and who is stopped, and name who runs now."""
        found = self.pids()
        if any(_is_stopped(pid) for pid in found.values()):
            self.stopped_at = time.monotonic()
        if found == self._written:
            return
        if not set(self._written.values()) <= set(found.values()):
            self.died_at = time.monotonic()
        self._written = found
        if self.pid_file is not None:
            self._write(self.pid_file, found)

    def _write(self, file: Path, found: Mapping[str, int]) -> None:
        """The file is replaced at once, so that no reader sees half of it."""
        fresh = file.with_name(f".{file.name}.new")
        fresh.write_text(json.dumps(found, indent=2) + "\n")
        fresh.replace(file)

    def pids(self) -> dict[str, int]:
        """Every process of ours, with those that they keep running: `serve.ingest`, `simulate.0`.

        What a role runs for a moment (git) is not named: its number may be another's soon.
        """
        import psutil

        found = {}
        for name, child in self.running.items():
            found[name] = child.pid
            with contextlib.suppress(psutil.Error):
                for below in psutil.Process(child.pid).children():
                    with contextlib.suppress(psutil.Error):
                        found[f"{name}.{_what(below)}"] = below.pid
        return found

    def stop(self) -> None:
        for child in reversed(self.running.values()):
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(20)
            if child.poll() is None:
                child.kill()
                child.wait()


def _is_stopped(pid: int) -> bool:
    import psutil

    with contextlib.suppress(psutil.Error):
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    return False


def _what(process: Any) -> str:
    """ingest, controller, api, mosquitto, or the number of a process that simulates devices."""
    role = process.environ().get("BELLWETHER_ROLE")
    if role:
        return str(role)
    last = Path((process.cmdline() or [""])[-1]).name  # device_agent.simulator …/plan-N.json
    if last.startswith("plan-"):
        return last.removeprefix("plan-").removesuffix(".json")
    return str(process.name())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# -- the public API -------------------------------------------------------------------------------


class PublicApi:
    """Reads only."""

    def __init__(self, server: str, waiting: Callable[[], float] = lambda: 0.0) -> None:
        """`waiting` is called while the server does not answer; it tells (monotonic) until when
        there was a known reason for that, from which on patience counts.
        """
        self.server = server
        self.waiting = waiting
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ready(self) -> bool:
        try:
            with self._opener.open(f"{self.server}/readyz", timeout=5) as answer:
                return bool(answer.status == 200)
        except (OSError, http.client.HTTPException):
            return False

    def get(self, path: str) -> Any:
        """None for what does not exist yet. A server that is being started again is waited for."""
        until = time.monotonic() + _API_PATIENCE
        while True:
            try:
                with self._opener.open(f"{self.server}/api/v1{path}", timeout=60) as answer:
                    return json.loads(answer.read())
            except urllib.error.HTTPError as error:
                with error:
                    if error.code == 404:
                        return None
                    said = error.read(500).decode(errors="replace")
                if error.code < 500 or time.monotonic() > until:
                    raise Failed(f"GET {path}: HTTP {error.code}: {said}") from None
            except (OSError, http.client.HTTPException, ValueError) as error:
                if time.monotonic() > until:
                    raise Failed(f"GET {path}: {error}") from None
            until = max(until, self.waiting() + _API_PATIENCE)
            time.sleep(0.3)

    def every(self, path: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        cursor = ""
        while True:
            page = self.get(f"{path}?limit=500{cursor}")
            found += page["items"]
            if not page["next"]:
                return found
            cursor = f"&cursor={page['next']}"
