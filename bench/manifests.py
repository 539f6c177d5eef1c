"""Manifests: a commit that changes a thousand of two thousand documents, until it may be accepted.

A bare repository on the same disk; each run pushes a commit that rewrites a thousand releases, and
times what the watcher does with it: fetch, list, read the blobs, parse, check all documents
together. What did not change is not parsed again. The peers of the same run: git's own plumbing
for the same commit (`diff-tree` and `cat-file --batch`), and the bare YAML loader in C on the
thousand documents, which gives plain data without places, types or checks.
"""

from __future__ import annotations

import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TypeVar

import yaml

from bench.report import Options, Row
from bench.world import texts
from controller.fleetrepo import FleetRepo
from controller.manifests.admission import admit
from controller.manifests.reader import Reading, read

T = TypeVar("T")
ALL, CHANGED = 2_000, 1_000
LIMIT = 500.0  # milliseconds
RUNS = 7


def run(options: Options) -> list[Row]:
    runs = options.runs or RUNS
    whole: list[float] = []
    cold: list[float] = []
    git: list[float] = []
    loader: list[float] = []
    with tempfile.TemporaryDirectory(prefix="bellwether-bench-") as folder:
        remote = _Remote(Path(folder) / "remote")
        ours = Path(folder) / "ours"
        repo = FleetRepo(str(remote.path), "main", "", ours)
        first = _timed(cold, partial(_read, repo, None))
        assert len(first.manifests.releases) == ALL, first.problems[:3]  # noqa: S101
        before, tip = first, remote.tip()
        for number in range(runs):
            changed = remote.change(number)
            before = _timed(whole, partial(_read, repo, before))
            if _versions(before) != {f"1.{number + 1}", "1.0"} or before.problems:
                raise AssertionError(f"read {_versions(before)}, {before.problems[:3]}")
            _timed(git, partial(_plumbing, ours, tip, remote.tip()))
            _timed(loader, partial(_bare, changed))
            tip = remote.tip()
    limit = f"promise; {CHANGED:,} of {ALL:,} documents"
    return [
        Row(
            name=f"a commit that changes {CHANGED:,} manifests",
            value=statistics.median(whole),
            unit="ms",
            limit=LIMIT,
            peer=limit,
            more={"worst": round(max(whole), 1)},
        ),
        Row(name=f"the first commit, {ALL:,} manifests", value=cold[0], unit="ms"),
        Row(name="git plumbing alone", value=statistics.median(git), unit="ms"),
        Row(name="bare C loader alone", value=statistics.median(loader), unit="ms"),
    ]


def _read(repo: FleetRepo, before: Reading | None) -> Reading:
    """What the watcher does with a new head."""
    commit = repo.fetch().commit
    reading = read(repo.read(commit), before)
    problems = [p for p in admit(reading) if p.severity == "error"]
    if problems:
        raise AssertionError(str(problems[0]))
    return reading


def _versions(reading: Reading) -> set[str]:
    return {release.version for release in reading.manifests.releases.values()}


def _bare(documents: list[str]) -> int:
    return len([yaml.load(text, yaml.CSafeLoader) for text in documents])


def _plumbing(place: Path, old: str, new: str) -> int:
    """The changed blobs, by git alone, from the clone that has them."""
    listed = subprocess.run(
        ["git", "diff-tree", "-r", old, new], cwd=place, check=True, capture_output=True
    ).stdout
    ask = b"\n".join(line.split()[3] for line in listed.splitlines()) + b"\n"
    found = subprocess.run(
        ["git", "cat-file", "--batch"], cwd=place, input=ask, check=True, capture_output=True
    )
    return len(found.stdout)


def _timed(times: list[float], work: Callable[[], T]) -> T:
    began = time.perf_counter()
    answer = work()
    times.append((time.perf_counter() - began) * 1_000)
    return answer


class _Remote:
    """A repository with a release a file, about 600 bytes each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        self._git("init", "-q", "-b", "main")
        (path / "policy.yaml").write_text(texts.policy())
        (path / "fleet.yaml").write_text(texts.fleet(baseline="app-0000"))
        (path / "releases").mkdir()
        self._write({number: _text(number, 0) for number in range(ALL)})

    def change(self, number: int) -> list[str]:
        """A commit that changes half of the releases; their texts."""
        self._write({i: _text(i, number + 1) for i in range(CHANGED)})
        return [_text(i, number + 1) for i in range(CHANGED)]

    def tip(self) -> str:
        return self._git("rev-parse", "main").strip()

    def _write(self, documents: Mapping[int, str]) -> None:
        for number, text in documents.items():
            (self.path / "releases" / f"app-{number:04}.yaml").write_text(text)
        self._git("add", ".")
        who = ("-c", "user.name=bench", "-c", "user.email=bench@localhost")
        self._git(*who, "commit", "-qm", "change")

    def _git(self, *words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=self.path, check=True, capture_output=True, text=True
        )
        return done.stdout


def _text(number: int, change: int) -> str:
    digest = f"sha256:{number:032x}{change:032x}"
    return f"""\
apiVersion: bellwether.dev/v1
kind: Release
metadata:
  name: app-{number:04}
  labels: {{team: driving, product: cars}}
  annotations: {{ticket: CAR-{number}, built-by: pipeline {change}}}
spec:
  version: "1.{change}"
  notes: |
    Release {number}, change {change}: better lanes at night, and a smaller model
    of the road ahead that fits the older computer.
  artifacts:
    - component: app
      digest: {digest}
      size: 48210321
      url: https://artifacts.example.com/app/{digest[7:]}
  upgradesFrom: [">=0.9"]
"""
