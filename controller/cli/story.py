"""The demo's story, act by act: commits on one side, what the public API answers on the other.

10.1.0 with its history → 10.2.0 for perfect scores, then wider → 10.3.0 → its fault → rollback with
its sentence, hold in Git → 10.3.1 as fix-forward. An act that does not happen as told raises
`Untold` with what was seen instead.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from controller.cli import stage
from controller.cli.errors import Failed
from controller.cli.stage import COMPONENT, FLEET, ROLLOUT, release_name

_PUBLISH_PATIENCE = 120.0  # seconds: the same bytes may be published again
_KILLED_FOR_EVER = 4.0  # times an act's patience
_LOOK = 0.5  # seconds between two looks at the API
SLIGHT = 2.0  # a rise below this may also end in a wait that says why


class Untold(Failed):
    """The story went another way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    devices: int = 300
    seed: int = 7
    fault: str = "interventions"  # interventions | boot | silent | none
    rise: float = 6.0
    database: str | None = None


@dataclass
class Story:
    wish: Wish
    root: Path
    tell: Callable[[str], None]
    acts: list[dict[str, Any]] = field(default_factory=list)
    server: str = ""

    def __post_init__(self) -> None:
        self.size = stage.Size(devices=self.wish.devices)
        self.children = stage.Children(logs=self.root)
        port = stage.free_port()
        self.server = f"http://127.0.0.1:{port}"
        self.api = stage.PublicApi(self.server, self.children.excused)
        self.repository = stage.Repository(self.root)

    # -- the whole of it --------------------------------------------------------------------------

    def acts_of_releases(self) -> None:
        """Everything after `set_up` and `baseline`."""
        self.goes_out("10.2.0", "intervention handling reworked")
        if self.wish.fault == "none":
            self.goes_out("10.3.0", "smoother lane changes")
            return
        caught = self.fails("10.3.0", "smoother lane changes")
        self.fixed("10.3.1", "10.3.0", caught=caught)

    def devices(self) -> list[dict[str, Any]]:
        """For the JSON: what each device says of itself."""
        return [
            {
                "id": device["id"],
                "cohort": device["cohort"],
                "score": device["scoreWhenDrawn"]
                if device["scoreWhenDrawn"] is not None
                else (device["score"] or {}).get("value"),
                "history": versions(device),
            }
            for device in self.api.every("/devices")
        ]

    # -- acts -------------------------------------------------------------------------------------

    def set_up(self, policy: str | None = None) -> None:
        words = ["--repo", str(self.repository.bare), "--branch", "main"]
        words += ["--state-dir", str(self.root / "state"), "--listen", self.server[7:]]
        words += ["--poll-interval", "0.5", "--tick-interval", "0.5"]
        if self.wish.database:
            words += ["--database", self.wish.database]
        self.tell(f"Starting `bellwether serve` on {self.server}, with its own Mosquitto")
        manifests = {
            "policy.yaml": policy or stage.policy_text(),
            "fleet.yaml": stage.fleet_text(self.size),
        }
        # The first commit names a release, so its artifact must be known: published below.
        self._files = manifests
        self.repository.commit({"README.md": "The demo's fleet.\n"}, "Begin the fleet's repository")
        self.children.start("serve", "serve", *words)
        self._wait(self.api.ready, 180.0, "the service does not get ready")

    def baseline(self) -> None:
        """10.1.0 is in every car, and a month of driving is on record."""
        image = self._bundle("10.1.0")
        text = self._publish("10.1.0", image)
        commit = self.repository.commit(
            {**self._files, "releases/10.1.0.yaml": text}, "Fleet of model 3, which runs 10.1.0"
        )
        self.tell(f"Starting {self.size.devices} cars, each with the real agent, over MQTT")
        log = self._simulate(image)
        processes = max(1, -(-self.size.devices // 400))
        self._wait(
            lambda: log.read_text(errors="replace").count('"history"') >= processes,
            self.size.patience,
            "the recorded history of the fleet does not arrive",
        )
        self._wait(
            lambda: self._counts().get("10.1.0", 0) == self.size.devices,
            self.size.patience,
            "not every device reports 10.1.0",
        )
        sentence = (
            f"{self.size.devices} of {self.size.devices} devices run 10.1.0, each with 30 days on "
            "record"
        )
        self._act("baseline 10.1.0", commit, None, sentence)

    def goes_out(self, version: str, why: str) -> None:
        """A healthy release: perfect scores first, then everybody."""
        commit = self.release(version, why)
        rollout = self._opened(commit)
        canary = self._canary(rollout, version, commit)
        self._perfect(canary, rollout["id"])
        seen = self._follow(rollout["id"], commit, version)
        if seen["state"] != "Completed":
            raise Untold(f"{version} should complete, and is {seen['state']}: {seen['sentence']}")
        self._everybody(version)
        self._act(f"complete {version}", commit, seen)

    def fails(self, version: str, why: str) -> bool:
        """The faulty release. True: caught and rolled back; False: it waits and says why."""
        commit = self.release(version, why)
        rollout = self._opened(commit)
        self._act(f"canary {version}", commit, rollout)
        slight = self.wish.fault == "interventions" and self.wish.rise < SLIGHT
        seen = self._follow(rollout["id"], commit, version, may_wait=slight)
        if seen["state"] not in ("RollingBack", "RolledBack", "Held"):
            if slight and seen["state"] in ("Soaking", "Inconclusive", "Paused"):
                self._act(f"wait {version}", commit, seen)
                return False
            raise Untold(f"{version} should be caught: {seen['state']}: {seen['sentence']}")
        sentence = self._verdict(rollout["id"])
        self._wait(
            lambda: version not in self._counts(),
            self.size.patience + 4 * self.size.silent_after,
            f"devices still run {version} after its rollback",
        )
        self._act(f"rollback {version}", commit, self._rollout(rollout["id"]), sentence)
        held = self._wait(
            self._held, self.size.patience, f"the hold of {version} does not reach Git"
        )
        commit = self.repository.commit_of(f"holds/{held}")
        told = f"HELD — holds/{held} in Git rejects {version}: no commit brings it back"
        self._act(f"hold {version}", commit, None, told)
        return True

    def fixed(self, version: str, broken: str, *, caught: bool) -> None:
        """Fix-forward: to those who ran the fault first, then through every step."""
        commit = self.release(version, f"repairs {broken}", fixes=broken)
        rollout = self._opened(commit)
        self._act(f"fix-forward {version}", commit, rollout)
        seen = self._follow(rollout["id"], commit, version)
        if seen["state"] != "Completed":
            raise Untold(f"{version} should complete, and is {seen['state']}: {seen['sentence']}")
        self._everybody(version)
        self._act(f"complete {version}", commit, seen)
        if caught:
            self._went_back(broken, version)

    # -- what must hold ---------------------------------------------------------------------------

    def _perfect(self, canary: list[dict[str, Any]], rollout: str) -> None:
        low = [d["id"] for d in canary if (d["scoreWhenDrawn"] or 0.0) < 100.0]
        if low:
            raise Untold(f"the canary of {rollout} has devices without a perfect score: {low[:5]}")

    def _everybody(self, version: str) -> None:
        self._wait(
            lambda: self._counts() == {version: self.size.devices},
            self.size.patience,
            f"not every device runs {version}",
        )

    def _went_back(self, broken: str, version: str) -> None:
        for device in self.api.every("/devices"):
            history = versions(device)
            if broken not in history:
                continue
            at = history.index(broken)
            if history[at - 1 : at + 2] != [history[at - 1], broken, history[at - 1]]:
                raise Untold(f"{device['id']} did not go back to what it ran before: {history}")
            if history[-1] != version:
                raise Untold(f"{device['id']} did not end on {version}: {history}")

    # -- steps of an act --------------------------------------------------------------------------

    def release(self, version: str, why: str, *, fixes: str | None = None) -> str:
        """Publish, then the commit of a release manager: a release, and one line of the rollout."""
        text = self._publish(version, self._bundle(version))
        if fixes:
            text = text.rstrip("\n") + f"\n  fixes: {release_name(fixes)}\n"
        files = {
            f"releases/{version}.yaml": text,
            "rollout.yaml": stage.rollout_text(self.size, version),
        }
        commit = self.repository.commit(files, f"Roll out {version}: {why}")
        self.tell(f"git push: {commit[:7]} Roll out {version}: {why}")
        return commit

    def _bundle(self, version: str) -> Path:
        fault = self.wish.fault if version == "10.3.0" else "none"
        content = stage.behaviour(fault, self.wish.rise)
        return stage.bundle(self.root / f"{COMPONENT}-{version}.tar.gz", version, content)

    def _publish(self, version: str, file: Path) -> str:
        """The Release document that `bellwether release publish` prints."""
        import subprocess
        import sys

        words = ["release", "publish", str(file), "--component", COMPONENT, "--version", version]
        words += ["--name", release_name(version), "--server", self.server]
        until = time.monotonic() + _PUBLISH_PATIENCE
        while True:
            done = subprocess.run(
                [sys.executable, "-m", "controller.cli", *words],
                capture_output=True,
                text=True,
                check=False,
            )
            if not done.returncode:
                return done.stdout
            if time.monotonic() > until:
                raise Failed(f"release publish {version}: {done.stderr.strip()}")
            until = max(until, self.children.excused() + _PUBLISH_PATIENCE)
            time.sleep(1.0)

    def _simulate(self, image: Path) -> Path:
        size, wish = self.size, self.wish
        words = ["--server", self.server, "--dir", str(self.root / "cars")]
        words += ["--devices", str(size.devices), "--fleet", FLEET, "--seed", str(wish.seed)]
        words += ["--pace", str(stage.PACE), "--history", "30"]
        words += ["--processes", str(max(1, -(-size.devices // 400)))]
        words += ["--factory", f"{COMPONENT}={release_name('10.1.0')}={image}"]
        words += ["--health-interval", str(size.report), "--trial-soak", "1"]
        # A car that gets no link on a new release goes back by itself, and tells of it.
        words += ["--trial-deadline", str(size.silent_after + 6)]
        return self.children.start("simulate", "simulate", *words)

    def _opened(self, commit: str) -> dict[str, Any]:
        def ours() -> dict[str, Any] | None:
            for rollout in self.api.get("/rollouts")["items"]:
                if rollout["commit"] == commit:
                    return dict(rollout)
            return None

        found: dict[str, Any] = self._wait(
            ours, self.size.patience, "the commit opens no rollout", self._git_problem
        )
        return found

    def _canary(self, rollout: dict[str, Any], version: str, commit: str) -> list[dict[str, Any]]:
        def drawn() -> list[dict[str, Any]]:
            return [
                device
                for device in self.api.every("/devices")
                if (member := device["membership"]) is not None
                and member["rollout"] == rollout["id"]
                and member["arm"] == "exposed"
                and member["step"] == 0
            ]

        found: list[dict[str, Any]] = self._wait(
            drawn, self.size.patience, "no device is drawn for the canary"
        )
        self._act(f"canary {version}", commit, self._rollout(rollout["id"]))
        return found

    def _follow(
        self, rollout: str, commit: str, version: str, *, may_wait: bool = False
    ) -> dict[str, Any]:
        """The rollout when it has come to an end, telling each step on the way."""
        step, told, since = -1, "", time.monotonic()
        while True:
            self.children.check()
            seen = self._rollout(rollout)
            state, sentence = seen["state"], seen["sentence"]
            if state in ("Completed", "RollingBack", "RolledBack", "Held", "NoMembers"):
                return seen
            if state in ("Inconclusive", "Superseded"):
                return seen
            if seen["step"] != step:
                if step >= 0:
                    self._act(f"widen {version}", commit, seen)
                step, since = seen["step"], time.monotonic()
            words = re.sub(r"[0-9.]+", "", f"{state} {sentence}")[:40]
            if words != told:
                told = words
                if not self.acts or self.acts[-1]["sentence"] != sentence:  # the act said it
                    self.tell(f"  {sentence}")
            waited = self._waited(since)
            if may_wait and waited > 60.0 and state == "Soaking":
                return seen
            if waited > self.size.patience:
                raise Untold(f"{version} stands still: {state}: {sentence}")
            time.sleep(_LOOK)

    def _verdict(self, rollout: str) -> str:
        """The sentence of the decision that rejected the release."""
        for decision in self.api.get(f"/rollouts/{rollout}/decisions?limit=500")["items"]:
            if decision["verdict"] == "roll_back":
                return str(decision["sentence"])
        return str(self._rollout(rollout)["sentence"])

    def _held(self) -> str | None:
        return next(iter(self.repository.holds()), None)

    # -- looking ----------------------------------------------------------------------------------

    def _rollout(self, rollout: str) -> dict[str, Any]:
        return dict(self.api.get(f"/rollouts/{rollout}"))

    def _counts(self) -> dict[str, int]:
        found: Counter[str] = Counter()
        for device in self.api.every("/devices"):
            release = (device["components"].get(COMPONENT) or {}).get("release", "nothing")
            found[version_of(release)] += 1
        return dict(found)

    def _git_problem(self) -> str:
        git = (self.api.get("/fleets") or {}).get("git") or {}
        return f"{git.get('refused', '')} {json.dumps(git.get('problems', []))[:800]}"

    def _wait(
        self,
        ready: Callable[[], Any],
        seconds: float,
        otherwise: str,
        why: Callable[[], str] | None = None,
    ) -> Any:
        began = time.monotonic()
        while not (found := ready()):
            self.children.check()
            if self._waited(began) > seconds:
                raise Untold(f"{otherwise} ({seconds:.0f} s) {why() if why else ''}".strip())
            time.sleep(_LOOK)
        return found

    def _waited(self, since: float) -> float:
        """Seconds since then, or since one of our processes was killed or stood still: it needs its
        time to come back. But somebody who goes on killing does not make us wait for ever."""
        now, since = time.monotonic(), max(since, self.children.stopped_at)
        return max(now - max(since, self.children.died_at), (now - since) / _KILLED_FOR_EVER)

    def _act(
        self, name: str, commit: str, rollout: dict[str, Any] | None, sentence: str = ""
    ) -> None:
        words = sentence or str(rollout["sentence"] if rollout else "")
        self.acts.append(
            {
                "act": name,
                "at": datetime.now(UTC).isoformat(timespec="milliseconds")[:-6] + "Z",
                "commit": commit,
                "rollout": rollout["id"] if rollout else None,
                "state": rollout["state"] if rollout else None,
                "devices": self._counts(),
                "sentence": words,
            }
        )
        self.tell(f"ACT {len(self.acts)}: {name} — {words}")


def version_of(release: str) -> str:
    return release.removeprefix("fsd-")


def versions(device: dict[str, Any]) -> list[str]:
    """The device's own report: what it activated and went back to, repeats once."""
    found: list[str] = []
    for entry in device["history"]:
        version = version_of(entry["release"])
        if entry["component"] == COMPONENT and found[-1:] != [version]:
            found.append(version)
    return found


__all__ = ["ROLLOUT", "Story", "Untold", "Wish", "versions"]
