"""Watches the fleet repository: fetches, accepts or refuses the new head, keeps the last good one.

Rules, in order:

1. A head that does not descend from the accepted one freezes the fleet there, and says so.
2. With `--allowed-signers`, every commit since the accepted one must carry a good signature.
3. All documents are read and checked together; a broken one blocks the rollouts that reference it,
   nothing else; their last good state stays in force because they open nothing new.
   With `--release-signers`, so does a release without the signatures of enough of them.
4. Git away: the accepted head stays; after `stale_after` nothing widens.

What it found stands in `meta["git"]`, for status, API and metrics.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy import Connection, Engine, func, select

from controller import hold_files
from controller.fleetrepo import FleetRepo, RepoUnavailable
from controller.manifests.admission import admit
from controller.manifests.reader import Manifests, Problem, Reading, read
from controller.recorder import Recorder
from controller.release_signing import Signers
from controller.rollout.world import Head
from controller.store import rollouts as store
from controller.store.lease import Fenced
from controller.store.tables import devices, holds, releases
from telemetry import metrics
from telemetry.store.database import reading, writing
from telemetry.store.prepared import Prepared

log = structlog.get_logger()

STALE_AFTER = 24 * 3600.0  # gitStaleAfter


@dataclass(frozen=True, slots=True, kw_only=True)
class GitState:
    """What people see of the repository: `meta["git"]`."""

    url: str
    branch: str
    accepted: str | None = None
    author: str = ""
    accepted_at: float | None = None
    head: str | None = None
    checked_at: float | None = None
    heard_at: float | None = None
    refused: str = ""  # why the head is not the accepted commit
    problems: tuple[Mapping[str, Any], ...] = field(default_factory=tuple)


@dataclass(frozen=True, slots=True, kw_only=True)
class Basis:
    """What the admission of a tree depends on beside the tree."""

    registry: int | None  # the newest change of a device
    releases: tuple[tuple[str, str], ...]  # (name, digest) that was seen before
    recorded: tuple[tuple[str, str], ...]  # holds in force that Git has: (id, release)
    signers: Signers | None


# What every look at Git asks.
_LABELS = Prepared(select(devices.c.id, devices.c.labels))
_NEWEST = Prepared(select(func.max(devices.c.change)))
_DIGESTS = Prepared(select(releases.c.name, releases.c.digest).order_by(releases.c.name))
_RECORDED = Prepared(
    select(holds.c.id, holds.c.release)
    .where(holds.c.commit.is_not(None), holds.c.lifted_at.is_(None))
    .order_by(holds.c.id)
)


class GitWatch:
    """`poll` does one round; `current` answers the accepted head; `run` polls until stopped."""

    def __init__(
        self,
        engine: Engine,
        repo: FleetRepo,
        recorder: Recorder,
        *,
        url: str,
        branch: str,
        clock: Callable[[], float] = time.time,
        stale_after: float = STALE_AFTER,
        woken: Callable[[], None] = lambda: None,
        term: int | None = None,
        told: Callable[[], int] = lambda: 0,
        release_signers: Path | None = None,
    ) -> None:
        """`term`: the controller's, by which its writes are fenced; `release_signers`: the file of
        whose signatures a release needs."""
        self._release_signers = release_signers
        self._term = term
        self._engine, self._repo, self._recorder = engine, repo, recorder
        self._clock, self._stale_after, self._woken = clock, stale_after, woken
        self._told = told  # tells the forge how the commits fare
        self._current: Head | None = None
        self._reading: Reading | None = None  # of the last tree: what stays is not parsed again
        self._basis: Basis | None = None  # of the last admission
        self._state = GitState(url=url, branch=branch)
        self._wake = threading.Event()
        self._stopping = False
        self._restore()

    def current(self) -> Head | None:
        return self._current

    def wake(self) -> None:
        """Look now: a webhook came, or a hold waits to be recorded."""
        self._wake.set()

    def stop(self) -> None:
        self._stopping = True
        self._wake.set()

    def run(self, interval: float, jitter: Callable[[], float]) -> None:
        """Poll every `interval` seconds (spread by jitter() in 0…1) until `stop`."""
        while not self._stopping:
            try:
                self.poll(self._clock())
                self._told()
            except Fenced:
                return  # the loop says so, and ends us
            except Exception:  # the watcher's outermost turn: logged, and tried again
                log.exception("git")
            self._wake.wait(interval * (0.5 + jitter()))
            self._wake.clear()

    def poll(self, now: float) -> None:
        """Fetch once, take in what is new, and record what waits for Git."""
        self._recorder.keep_head()
        try:
            fetched = self._repo.fetch()
        except RepoUnavailable as error:
            metrics.count("bellwether_git_fetches_total", result="unavailable")
            self._note(now, heard=False, refused=str(error))
            return
        metrics.count("bellwether_git_fetches_total", result="ok")
        commit = fetched.commit
        if commit == self._state.accepted and self._current is not None:
            self._note(now, heard=True, refused="", head=commit)
            self._refresh(now)
        elif commit != self._state.accepted and (why := self._refusal(commit)):
            self._note(now, heard=True, refused=why, head=commit)
        else:
            self._accept(commit, now)
        if self._recorder.run_once(now):
            self._wake.set()

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        with writing(self._engine) as conn:
            if self._term is not None:
                store.fence(conn, self._term)
            yield conn

    def _refusal(self, commit: str) -> str:
        accepted = self._state.accepted
        if accepted is not None and not self._repo.descends(commit, accepted):
            return (
                f"{commit[:10]} does not descend from the accepted {accepted[:10]}: history was "
                "rewritten; the fleet stays at the accepted commit until a descendant is pushed"
            )
        unsigned = self._repo.verify(accepted, commit)
        return "; ".join(str(problem) for problem in unsigned[:3])

    def _accept(self, commit: str, now: float) -> None:
        info = self._repo.info(commit)
        self._current, problems = self._head(commit, info.author, self._look())
        manifests = self._current.manifests
        if manifests.holds or manifests.lifts:
            with self._writing() as conn:
                hold_files.take(conn, manifests, commit, now)
        self._state = GitState(
            url=self._state.url,
            branch=self._state.branch,
            accepted=commit,
            author=info.author,
            accepted_at=now,
            problems=tuple(_plain(problem) for problem in problems),
        )
        self._note(now, heard=True, refused="", head=commit)
        log.info("accepted", commit=commit, author=info.author, problems=len(problems))
        self._woken()

    def _head(self, commit: str, author: str, basis: Basis) -> tuple[Head, list[Problem]]:
        with reading(self._engine) as conn:
            registry = {row.id: row.labels for row in _LABELS.all(conn)}
        self._reading = read(self._repo.read(commit), self._reading)
        self._basis = basis
        known = dict(basis.releases)
        head, problems = assess(
            self._reading, commit, author, known=known, registry=registry, signers=basis.signers
        )
        return head, [*problems, *_vanished(basis.recorded, head.manifests)]

    def _look(self) -> Basis:
        with reading(self._engine) as conn:
            return Basis(
                registry=_NEWEST.one(conn)[0],
                releases=tuple((row.name, row.digest) for row in _DIGESTS.all(conn)),
                recorded=tuple((row.id, row.release) for row in _RECORDED.all(conn)),
                signers=self._signers(),
            )

    def _signers(self) -> Signers | None:
        """Read anew at each look. A file that is broken lets nobody new vouch: the last good one
        counts, and without one nothing is signed."""
        if self._release_signers is None:
            return None
        try:
            return Signers.load(self._release_signers)
        except ValueError as error:
            log.error("release_signers", detail=str(error))
            return self._basis.signers if self._basis is not None else Signers(people={})

    def _restore(self) -> None:
        """After a restart: the head that was accepted last, from the local clone, without Git."""
        with reading(self._engine) as conn:
            kept = store.get_meta(conn, "git")
        if not kept or kept.get("url") != self._state.url or not kept.get("accepted"):
            return
        problems = tuple(kept.pop("problems", ()))
        self._state = GitState(**kept, problems=problems)
        try:
            head, _ = self._head(kept["accepted"], kept["author"], self._look())
            self._current = replace(head, asked=False, heard=False) if head else None
        except (RepoUnavailable, OSError, ValueError):
            # The accepted commit stays the one to descend from; its tree comes with the fetch.
            log.warning("git", detail="the local clone is gone: waiting for the remote")

    def _refresh(self, now: float) -> None:
        """Devices were enrolled since: what depends on the registry is checked again."""
        basis = self._look()
        if self._state.accepted is None or basis == self._basis:
            return
        head, problems = self._head(self._state.accepted, self._state.author, basis)
        plain = tuple(_plain(problem) for problem in problems)
        if plain != self._state.problems:
            values = {**_state(self._state), "problems": plain}
            self._state = GitState(**values)
            self._current = head
            self._note(now, heard=True, refused="", head=self._state.accepted)

    def _note(self, now: float, *, heard: bool, refused: str, head: str | None = None) -> None:
        values = {**_state(self._state), "checked_at": now, "refused": refused}
        if heard:
            values |= {"heard_at": now, "head": head}
        self._state = GitState(**values)
        last = self._state.heard_at or now
        if self._current is not None:
            stale = now - last > self._stale_after
            was = self._current.heard
            self._current = replace(self._current, stale=stale, asked=True, heard=was or heard)
        with self._writing() as conn:
            store.put_meta(conn, "git", _json(self._state))


def assess(
    content: Reading,
    commit: str,
    author: str,
    *,
    known: Mapping[str, str],
    registry: Mapping[str, Mapping[str, str]],
    signers: Signers | None = None,
) -> tuple[Head, list[Problem]]:
    """What a tree says, and what is wrong with it; `known`: release name → digest seen before;
    `signers`: whose signatures a release needs, None where nobody's."""
    problems = [*content.problems, *admit(content, registry), *_rewritten(content, known)]
    problems += _unsigned(content, signers) if signers is not None else ()
    blocked: dict[str, str] = {}
    for problem in problems:
        if problem.severity != "error":
            continue
        for name in problem.blocks or content.manifests.rollouts:
            blocked.setdefault(name, str(problem))
    head = Head(commit=commit, author=author, manifests=content.manifests, blocked=blocked)
    return head, problems


def _rewritten(content: Reading, known: Mapping[str, str]) -> list[Problem]:
    """Releases are immutable: a name that already meant another digest is an error."""
    found = []
    for name, release in content.manifests.releases.items():
        if known.get(name, release.digest) == release.digest:
            continue
        message = (
            f"release {name} is immutable and was {known[name][:19]}… before: "
            "give the changed one a new name"
        )
        found.append(_of_release(content, name, "spec.artifacts", message))
    return found


def _unsigned(content: Reading, signers: Signers) -> Iterator[Problem]:
    """A release that is to be rolled out needs its people; what runs already is not judged."""
    for name in sorted({rollout.release for rollout in content.manifests.rollouts.values()}):
        release = content.manifests.releases.get(name)
        if release is not None and (why := signers.lacking(release)):
            yield _of_release(content, name, "spec.signatures", why)


def _of_release(content: Reading, name: str, field: str, message: str) -> Problem:
    path, _, line = content.manifests.origin.get(("Release", name), "?:1").rpartition(":")
    users = frozenset(r.name for r in content.manifests.rollouts.values() if r.release == name)
    return Problem(
        path=path,
        line=int(line),
        col=1,
        field=field,
        message=message,
        severity="error",
        blocks=users or frozenset({name}),
    )


def _vanished(recorded: Sequence[tuple[str, str]], manifests: Manifests) -> Iterator[Problem]:
    """Holds in force whose file is gone: only a Lift ends one, so that a bad merge ends none."""
    for hold, release in recorded:
        if hold not in manifests.holds:
            yield Problem(
                path=f"holds/{hold}.yaml",
                line=1,
                col=1,
                field="",
                message=f"the file of this hold on {release} is gone and the hold is in force "
                "still: write a Lift to end it, or bring the file back",
                severity="notice",
            )


def _plain(problem: Problem) -> dict[str, Any]:
    return {
        "path": problem.path,
        "line": problem.line,
        "col": problem.col,
        "field": problem.field,
        "message": problem.message,
        "severity": str(problem.severity),
        "text": str(problem),
    }


def _state(state: GitState) -> dict[str, Any]:
    values = asdict(state)
    values["problems"] = state.problems
    return values


def _json(state: GitState) -> dict[str, Any]:
    return {**_state(state), "problems": [dict(problem) for problem in state.problems]}
