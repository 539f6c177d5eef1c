"""The remote fleet repository in memory, behind `controller.fleetrepo.FleetRepo`'s own methods.

A commit is a tree and its parent; ids follow from both. `clone` is what the controller's disk
holds: fetched commits survive its death, and are lost with its disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha1

from bench.world.points import Points
from controller.fleetrepo import CommitInfo, Fetched, RepoUnavailable, SignatureProblem


@dataclass(frozen=True, slots=True)
class Commit:
    id: str
    parent: str | None
    tree: Mapping[str, bytes]
    author: str
    message: str
    at: float


class Repository:
    """What everybody pushes to."""

    def __init__(self) -> None:
        self.commits: dict[str, Commit] = {}
        self.head: str | None = None
        self.up = True

    def push(self, tree: Mapping[str, bytes], author: str, message: str, at: float) -> str:
        """One commit on the head; answers its id."""
        text = repr((self.head, sorted(tree.items()), author, message))
        name = sha1(text.encode()).hexdigest()  # noqa: S324 - as Git names commits
        self.commits[name] = Commit(name, self.head, dict(tree), author, message, at)
        self.head = name
        return name

    def tree(self) -> dict[str, bytes]:
        return dict(self.commits[self.head].tree) if self.head else {}

    def parent(self) -> str | None:
        """The commit before the head; the head itself where there is none."""
        return (self.commits[self.head].parent or self.head) if self.head else None


class Clone:
    """`FleetRepo` for the watcher and the recorder."""

    def __init__(self, remote: Repository, points: Points) -> None:
        self._remote, self._points = remote, points
        self._here: dict[str, Commit] = {}

    def fetch(self) -> Fetched:
        self._points.reach("git.fetch")
        if not self._remote.up or self._remote.head is None:
            raise RepoUnavailable("git fetch: the remote does not answer")
        self._here.update(self._remote.commits)
        return Fetched(commit=self._remote.head)

    def read(self, commit: str) -> dict[str, bytes]:
        return dict(self._commit(commit).tree)

    def descends(self, new: str, old: str) -> bool:
        at: str | None = new
        while at is not None:
            if at == old:
                return True
            found = self._here.get(at)
            at = found.parent if found else None
        return False

    def verify(self, old: str | None, new: str) -> list[SignatureProblem]:
        return []

    def info(self, commit: str) -> CommitInfo:
        found = self._commit(commit)
        return CommitInfo(
            commit=found.id,
            author=found.author,
            committer=found.author,
            at=found.at,
            message=found.message,
        )

    def record(self, files: Mapping[str, str], message: str, name: str) -> str:
        tip = self.fetch().commit
        there = self._remote.tree()
        missing = {path: text.encode() for path, text in files.items() if path not in there}
        if not missing:
            return tip
        self._points.reach("git.push")
        made = self._remote.push(there | missing, "Bellwether <bellwether@localhost>", message, 0.0)
        self._here.update(self._remote.commits)
        self._points.reach("git.pushed")
        return made

    def _commit(self, name: str) -> Commit:
        found = self._here.get(name)
        if found is None:
            raise RepoUnavailable(f"git cat-file: {name} is not here")
        return found
